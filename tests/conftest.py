"""Settings of the whole suite: few threads, one arithmetic, quiet libraries."""

import os

# Before torch and transformers are imported: the suite runs in several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Where there is no GPU its kernels are interpreted, which is decided when one is decorated.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from ziphius.kernels.cpu.library import COMPILER, Library, build
from ziphius.kernels.select import Kernels, answering_kernels

torch.set_num_threads(1)

# The same examples on every machine; no example has a deadline, because the cores are shared.
settings.register_profile("ziphius", derandomize=True, deadline=None)
settings.load_profile("ziphius")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes tests of faults long."""
    parser.addoption("--chaos", action="store_true", help="thousands of faults, not dozens")


@pytest.fixture(scope="session")
def chaos(pytestconfig: pytest.Config) -> bool:
    """Whether tests of faults are to take their time."""
    return bool(pytestconfig.getoption("--chaos"))


@pytest.fixture(autouse=True)
def _torch_defaults() -> None:
    """Start every test from the same global generator and default dtype."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small programs to train on; nobody changes it."""
    from tests.training.support import write_text

    return write_text(tmp_path_factory.mktemp("words") / "text")


@pytest.fixture(scope="session")
def kernel_folder(pytestconfig: pytest.Config) -> Path:
    """Where the compiled kernels are kept between runs."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed")
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("kernels"))


@pytest.fixture(scope="session")
def library(kernel_folder: Path) -> Library:
    """The compiled kernels, built once."""
    return build(kernel_folder)


@pytest.fixture(params=["torch", "compiled"])
def answering(request: pytest.FixtureRequest) -> Kernels:
    """The kernels that answer: torch's, and the compiled ones."""
    if request.param == "torch":
        return answering_kernels(None)
    return answering_kernels(request.getfixturevalue("kernel_folder"))
