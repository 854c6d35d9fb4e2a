"""A checkpoint as GGUF, by llama.cpp's own conversion script: ``to_gguf.py LLAMA.CPP ARGUMENTS``.

The script asks for the name of a tokenizer's pre-tokenizer by a hash of what it does to a text, and
knows published tokenizers only. Ours split as DeepSeek-V3's does: it is told so.
"""

from __future__ import annotations

import sys
from pathlib import Path

PRE_TOKENIZER = "deepseek-v3"


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import convert_hf_to_gguf as script
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    sys.argv[:] = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    script.main()


if __name__ == "__main__":
    main()
