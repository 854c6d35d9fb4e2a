"""The C++ kernels as a shared library: built by the system's compiler on first use, then kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ziphius.config.errors import BadInput

COMPILER = "g++"
# No -ffast-math: infinities and NaN keep their meaning, and the process its subnormal numbers.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}

# Arguments of every function: p a tensor or nothing, n an integer, d a floating-point number.
SIGNATURES = {
    "add": "npppnn",
    "adamw": "nnppppndddddddn",
    "attention_forward": "npppppppnnnnndn",
    "attention_backward": "npppppppppppnnnnndn",
    "choose": "npppnnnnnn",
    "cross_entropy": "npppnnn",
    "draw": "npppppnnn",
    "e5m6_decode": "npppnnn",
    "e5m6_encode": "npnppnnn",
    "expand_forward": "npppnpppppnnnnnnn",
    "expand_backward": "nppppppppnnnnnnn",
    "fp8_gemm": "nppppnppnnnnn",
    "fp8_gemm_along_k": "nppppppnnnnn",
    "gate": "npppnnnnddn",
    "grouped_rows": "nnppppnnnnn",
    "grouped_weight_gradient": "nnppppnnnn",
    "join": "npppnnn",
    "latent_append": "npnpppppnnndn",
    "latent_attend": "nppnpnppnpnnnndn",
    "latent_turn": "nppppnnnnnn",
    "log_sums": "npppppnnn",
    "mixture": "npppppnnnnnn",
    "norm_forward": "npnnpppnndn",
    "norm_backward": "npnpppppnnn",
    "permute": "npppnnnn",
    "permute_tiles": "npppppnnnnn",
    "project": "npnnn",
    "quantize_blocks": "npppppnnnnn",
    "quantize_regroup": "nppppnpnnnnn",
    "quantize_rows": "npnppppnpnnnnn",
    "sigmoids": "nppnn",
    "swiglu_forward": "nppnppnnn",
    "swiglu_backward": "nppnppppnpnnn",
    "swiglu_fp8_backward": "nnppppppnpnpnpnnn",
    "swiglu_fp8_forward": "npnpnpppppppnnnn",
    "swiglu_fp8_turned": "npppppppnpnnnnn",
    "unpermute": "npppnnnn",
    "widen_row": "nppnn",
}
_LETTERS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "d": ctypes.c_double}


class Call(NamedTuple):
    """A call that was made: its function, what it was given, and what must not go away."""

    name: str
    given: Sequence[Any]
    kept: Sequence[Any]


class Library:
    """The loaded kernels. Copies share it, and another process loads it from the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recorded = threading.local()
        handle = ctypes.CDLL(str(path))
        self._functions = {name: getattr(handle, name) for name in SIGNATURES}
        for name, letters in SIGNATURES.items():
            self._functions[name].argtypes = [_LETTERS[letter] for letter in letters]
            self._functions[name].restype = None
        self.handle = handle

    def call(self, name: str, dtype: torch.dtype, *arguments: Any, behind: Any = None) -> None:
        """Call a function for elements of ``dtype`` on torch's number of threads.

        Tensors are given by their memory: layout and size are the caller's business. ``behind`` are
        the owners of memory that arguments only have addresses of.
        """
        given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        given = [TYPES[dtype], *given, torch.get_num_threads()]
        self._functions[name](*given)
        if (calls := getattr(self._recorded, "calls", None)) is not None:
            calls.append(Call(name, given, (arguments, behind)))

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Keep the calls that this thread makes, with the memory that they use."""
        calls: list[Call] = []
        self._recorded.calls = calls
        try:
            yield calls
        finally:
            del self._recorded.calls

    def __deepcopy__(self, memo: object) -> Library:
        return self

    def __reduce__(self) -> tuple[type[Library], tuple[Path]]:
        return Library, (self.path,)


def build(folder: Path) -> Library:
    """Load the kernels from ``folder``, after compiling them into it unless they are there.

    The file's name is the digest of sources, flags, compiler and processor, so a folder may be
    shared. Raises BadInput where the compiler is missing or fails.
    """
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    headers = sorted(Path(__file__).parent.glob("*.h"))
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    digest.update(_compile(["-march=native", "-dM", "-E", "-x", "c++", os.devnull]))
    digest.update(torch.__version__.encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    target = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            objects = [f"{work}/{path.stem}.o" for path in sources]
            for path, made in zip(sources, objects, strict=True):
                _compile([*FLAGS, "-c", str(path), "-o", made])
            _compile(["-shared", *objects, *_openmp(), "-o", f"{work}/kernels.so"])
            os.replace(f"{work}/kernels.so", target)
    return Library(target)


def _openmp() -> Sequence[str]:
    """torch's own OpenMP runtime: two runtimes in a process would fight for the processors."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]


def _compile(arguments: Sequence[str]) -> bytes:
    try:
        run = subprocess.run([COMPILER, *arguments], capture_output=True)
    except OSError as error:
        raise BadInput(
            f"compiled kernels: {COMPILER}: {error.strerror}: install it, or set run.kernels=torch"
        ) from None
    if run.returncode:
        lines = run.stderr.decode("utf-8", "replace").splitlines() or ["no message"]
        raise BadInput(f"compiled kernels: {COMPILER}: {lines[0]}: set run.kernels=torch")
    return run.stdout
