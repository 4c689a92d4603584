"""Triton kernels, one module per operation, each beside its torch twin in ``reference``.

A module holds jit functions, a typed wrapper that checks the layout contract and launches by
keyword, one function that chooses the launch configuration, and ``variants()``: every configuration
that is shipped, which is what the ahead-of-time check compiles.
"""
