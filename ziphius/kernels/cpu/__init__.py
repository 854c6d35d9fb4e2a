"""Kernels in C++ for processors: the sources, and the library that is built of them."""
