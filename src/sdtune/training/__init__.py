"""HOW IT IS DONE: the trainer, in the container or as a local process."""
