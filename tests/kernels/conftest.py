"""The compiled kernels, built once and kept between runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ziphius.kernels.cpu.library import COMPILER, Library, build


@pytest.fixture(scope="session")
def kernel_folder(pytestconfig: pytest.Config) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed")
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("kernels"))


@pytest.fixture(scope="session")
def library(kernel_folder: Path) -> Library:
    return build(kernel_folder)
