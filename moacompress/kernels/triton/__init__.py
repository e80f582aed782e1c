"""Attention under rules in Triton, for GPUs.

`triton_backend` is what the dispatcher sees, and imports without Triton; `decode_kernels` needs it. `work_lists` says on the
host which program attends to what, and `tile_sizes` how large its tiles are. Without a GPU Triton's interpreter runs the same
kernels: `TRITON_INTERPRET=1`.
"""
