"""Kernels for GPUs, one file an operation; each is imported only where it is chosen."""
