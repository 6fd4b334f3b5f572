"""Starting processes on this machine and on clusters, and starting them again. Laptop-safe: imports no JAX."""
