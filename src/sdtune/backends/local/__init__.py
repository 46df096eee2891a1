"""A run as a process on this machine."""
