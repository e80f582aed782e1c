"""The reference backend: one tiled attention in plain PyTorch, on any device and dtype, with gradients.

`tiled` is the attention, `reference_backend` finds in a cache what it reads, `nonfinite` keeps NaN and infinities where they
belong. It is what every other backend must equal, and what runs where no other can.
"""
