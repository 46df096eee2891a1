"""What the kohya trainer is made of: sd-scripts runs as a process of its own, perhaps in a Python of its own."""
