"""Attention kernels: one tiled reference in plain PyTorch that every faster kernel is checked against."""
