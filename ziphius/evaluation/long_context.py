"""What a longer context is worth: needles and positions, before and after, with YaRN and without.

The figures are a JSON object that a run's folder keeps as ``needle.json`` and its report draws:

    lengths, depths      of the needle maps; samples and others of a cell
    trained              how long the rows were in every phase
    maps                 name -> shares of right answers [lengths][depths]
    edges                borders of stretches of a long row, in tokens
    positions            name -> mean nats a token of every stretch

The names are ``before`` (the checkpoint that was extended), ``after``, and ``without YaRN``: the
extended weights with the positions of before, a control that has to be worse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.files import write_atomic
from ziphius.checkpoint.folder import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.huggingface import load
from ziphius.config.errors import BadInput
from ziphius.data.documents import Document
from ziphius.data.heldout import heldout_rows
from ziphius.data.tokenizer import read_tokenizer
from ziphius.evaluation.needle import NeedleTest, needle_map
from ziphius.evaluation.positions import by_position, doubling_edges
from ziphius.inference.llm import LLM
from ziphius.inference.twin import share
from ziphius.model.transformer import Transformer

BEFORE, AFTER, WITHOUT = "before", "after", "without YaRN"
NEEDLE_FILE = "needle.json"
Tell = Callable[[str, int, int], None]


def lengths_between(before: int, trained: Sequence[int]) -> tuple[int, ...]:
    """Return how long needle prompts are to be: the context before, doubled, and what was trained.

    None is longer than the longest rows.
    """
    found = set(trained)
    while before < max(trained):
        found.add(before)
        before *= 2
    return tuple(sorted(found))


def write_needles(figures: Mapping[str, Any], folder: Path) -> None:
    """Write a run's needle.json, whole or not at all."""
    text = json.dumps(figures, indent=1) + "\n"
    write_atomic(folder / NEEDLE_FILE, text.encode())


def with_context(model: Transformer, context: int, *, yarn: bool = True) -> Transformer:
    """Return a model of the same weights for up to ``context`` positions, YaRN kept or left out.

    The weights are shared, not copied.
    """
    changes: dict[str, Any] = {"max_position_embeddings": context}
    if not yarn:
        changes["rope_scaling"] = None
    config = model.config.model_copy(update=changes)
    other = Transformer(config, model.precision, kernels=model.kernels, device="meta")
    share(model, other, model.device)
    return other.eval()


def long_context(
    before: Path,
    after: Path,
    documents: Sequence[Document],
    test: NeedleTest,
    *,
    trained: Sequence[int] = (),
    position_bytes: int = 600_000,
    options: Mapping[str, Any] | None = None,
    on_progress: Tell | None = None,
) -> dict[str, Any]:
    """Measure the checkpoints before and after an extension, and the control.

    ``documents`` are held-out text: haystack, and the long rows, of which ``position_bytes`` are
    read at most. ``options`` are those of ``LLM.of``. ``on_progress`` gets a name, done and all.
    Raises BadInput for checkpoints without a tokenizer, and too little text.
    """
    longest = max(test.lengths)
    tokenizer = _tokenizer(after)
    old, new = load(before), load(after)
    models = {
        BEFORE: with_context(old, longest),
        AFTER: with_context(new, longest),
        WITHOUT: with_context(new, longest, yarn=False),
    }
    texts = [document.text for document in documents]
    rows = heldout_rows(documents, tokenizer, longest, position_bytes)
    edges = doubling_edges(longest)
    maps: dict[str, Any] = {}
    positions: dict[str, Any] = {}
    tokens: tuple[int, ...] = ()
    for name, model in models.items():
        llm = LLM.of(model, tokenizer, **{"cache_tokens": 4 * longest, **(options or {})})

        def tell(done: int, total: int, name: str = name) -> None:
            if on_progress is not None:
                on_progress(name, done, total)

        maps[name] = needle_map(llm, texts, test, tell).round(4).tolist()
        found = by_position(llm.model, rows, edges)
        positions[name], tokens = [round(nats, 4) for nats in found.nats], found.tokens
    return {
        "lengths": list(test.lengths),
        "depths": list(test.depths),
        "samples": test.samples,
        "others": test.others,
        "seed": test.seed,
        "trained": list(trained),
        "context_before": old.config.max_position_embeddings,
        "maps": maps,
        "edges": list(edges),
        "tokens": list(tokens),
        "positions": positions,
    }


def _tokenizer(path: Path) -> Tokenizer:
    folder = checkpoint_folder(path)
    if not (folder / TOKENIZER_FILE).is_file():
        raise BadInput(f"{folder}: has no {TOKENIZER_FILE}: needles are text")
    return read_tokenizer(folder / TOKENIZER_FILE)
