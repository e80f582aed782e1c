"""Attention kernels: one tiled reference in plain PyTorch that every faster kernel is checked against, and the faster ones.

`dispatch` chooses between them; `cpu/` holds the C++ sources and, once built, their library. Nothing here knows of the runtime.
"""
