"""USE CASES: what the command line does, as functions."""
