"""The Plan and what is asked of it."""
