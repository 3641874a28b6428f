"""Triton kernels, one file per op: @triton.jit functions, then launch(). Installed as
sma_fast.kernels; importing this package does not import triton."""
