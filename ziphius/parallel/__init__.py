"""Parallelism and its kin, applied to the model from outside."""
