"""Attention kernels as backends behind one protocol.

`backend` is the protocol and its arguments, `dispatch` chooses; `reference/` is one tiled attention in plain PyTorch that
every other backend is checked against, `cpu/` the compiled kernels. A new backend is a folder and one entry in `dispatch`.
Nothing here knows of the runtime, of transformers, or of what a plan is for.
"""
