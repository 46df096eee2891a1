"""Fused kernels: of the UNet's elementwise half, what it computes between matrix products and convolutions; and AdamW.

One file per kernel, with its plain reference in torch beside it. The functions take the reference themselves where
their tensors are not on a GPU. They need Triton, which torch brings along on machines with CUDA: import them only where
``sdtune.training.components.fused`` has found it. ``benchmarks/kernel_speed.py`` compares and measures them on a GPU.

CUDA graphs: no function reads a value of the device, and block sizes follow from shapes alone. A kernel is compiled at
the first call with its shapes, which must be before the capture.
"""
