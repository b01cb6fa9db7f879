"""Triton kernels and their launchers, one folder for each op family; installed as `stamp_kernels.triton_kernels`."""
