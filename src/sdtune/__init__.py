"""sdtune: fine-tune Stable Diffusion on Google Cloud, or on this machine."""

__version__ = "0.1.0"
