"""Arithmetic: one file an operation, a plain PyTorch reference and a table of versions in each."""
