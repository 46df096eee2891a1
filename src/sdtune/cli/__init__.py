"""THE FACE: the command line."""
