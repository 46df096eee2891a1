"""WHAT CAN BE ASKED: the methods, their settings and the dataset layouts they read."""
