"""A checkpoint for the tests of this folder."""

from pathlib import Path

import pytest

from tests.support import random_model
from ziphius.checkpoint.huggingface import save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint with one MTP module, and its manifest."""
    save(random_model(), tmp_path / "saved")
    return tmp_path / "saved"
