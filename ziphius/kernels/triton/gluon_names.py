"""What Triton 3.6 and later ones call differently in Gluon."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

LOAD = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
STORE = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
BARRIER = getattr(gl, "barrier", None) or gl.thread_barrier
