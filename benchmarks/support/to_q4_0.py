"""A BF16 GGUF as Q4_0, by llama.cpp itself: ``to_q4_0.py SOURCE TARGET THREADS``."""

from __future__ import annotations

import ctypes
import sys

Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0


def main() -> None:
    import llama_cpp

    source, target, threads = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q4_0, int(threads)
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        sys.exit(f"llama.cpp could not quantise {source}: {status}")


if __name__ == "__main__":
    main()
