"""The compiled backend for the CPU: its C++ sources, their library once it is built, and what stands between them and torch.

`library` finds and loads it, `operators` tells torch what it must know of the operators, `cpu_backend` is the backend. Of the
sources only the files named `binding*` know torch, through `torch_abi.h`.
"""
