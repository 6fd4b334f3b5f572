"""Starting processes on this machine and on clusters, and starting them again. Laptop-safe: imports no JAX.

One file per engine that exists already. Each renders what it will run (`--dry-run` prints that) and hands it to the
user's own client as an argument list; what a shell elsewhere must read is quoted.
"""
