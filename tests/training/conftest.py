"""Processes for runs over several ranks."""

from tests.parallel.conftest import pool

__all__ = ["pool"]
