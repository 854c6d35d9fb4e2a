"""A checkpoint that later stages begin with, and processes for runs over several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.alignment.support import make_start
from tests.parallel.conftest import pool

__all__ = ["pool"]


@pytest.fixture(scope="session")
def start(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small network; nobody changes it."""
    return make_start(words, tmp_path_factory.mktemp("runs") / "start")
