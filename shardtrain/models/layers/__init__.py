"""Layers that the model families share. Logical axes stand beside every shape."""
