"""The checkpoint that later stages begin with."""

from __future__ import annotations

from tests.alignment.conftest import start

__all__ = ["start"]
