"""Triton kernels and their launchers, one module per op family; installed as `stamp_kernels.triton_kernels`."""
