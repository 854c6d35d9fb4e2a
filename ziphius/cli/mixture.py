"""What a quickstart reads: the standard library, tasks, and what teaches a network to look back.

Nothing finds a needle that was not taught to, and in this order (``evaluation.recall``): copies and
nothing else at first, facts among the text afterwards, and long documents of facts where the
context grows. Everything but the library is generated, and lies in the cache by its content. None
of it is held out: what is told of held-out text is told of packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ziphius.config.recipe import Recipe

_COPYING = "20%"  # of pre-training, on copies alone
# Shares of the tokens after that, and of the longer rows'; the library is the rest.
_PRETRAINED = {"tasks": 0.05, "copies": 0.08, "dense": 0.1, "spread": 0.12}
_EXTENDED = {"copies": 0.1, "dense": 0.1, "spread": 0.15, "long": 0.45}
_CHARACTERS = 4_000_000  # of each, about: some are read once, some twice
_ALIKE = 0.7  # of the copies, are of one kind of words
# What is said twice has to be told from what lies beside it: documents do not see each other, and of
# eight frequencies of position, not four, most turn visibly within a row: 625 is to its 256 tokens
# what the published 10,000 is to 4,096. The rate is what copying stands; it ends where the longer
# context is learned.
_SETTINGS = (
    "data.document_mask=true",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "model.rope_theta=625",
    "pretrain.steps=4000",
    "pretrain.learning_rate=2.5e-3",
    "pretrain.final_learning_rate=3e-4",
    "pretrain.decay_start=50%",
)


@dataclass(frozen=True)
class Mixture:
    """Settings, as ``--set`` takes them: those of all stages, and what an extension adds."""

    settings: tuple[str, ...]
    extension: tuple[str, ...] = ()


def mixture(preset: str, overrides: Sequence[str]) -> Mixture:
    """Generate what is mixed into the text of a preset; return the settings that name it.

    What is set by hand stands. Who names text by hand gets no other. Raises BadInput for a cache
    that cannot be written.
    """
    from ziphius.config.recipe import load_recipe

    settings = (*_SETTINGS, *overrides)
    recipe = load_recipe(preset, settings)
    if any(setting.startswith("data.source") for setting in overrides) or recipe.distill is None:
        return Mixture(tuple(overrides))
    files = {name: _cached(recipe.run.cache, name, text) for name, text in _texts(recipe)}
    copying = _source(str(files.pop("plain")), 1, end=_COPYING)
    return Mixture(
        (
            *settings,
            _sources(copying, *_mixed(files, _PRETRAINED, _COPYING)),
            "data.deduplicate=exact",  # near duplicates would be looked for twice: facts look alike
        ),
        (_sources(*_mixed(files, _EXTENDED)),),
    )


def _texts(recipe: Recipe) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the documents of each kind, by name."""
    from ziphius.alignment.questions import mixture_of
    from ziphius.alignment.tasks.documents import task_documents
    from ziphius.data.corpus import read_corpus
    from ziphius.evaluation.recall import copy_documents, recall_documents

    assert recipe.distill is not None, "asked before"
    seed = recipe.run.seed
    # As the run reads it.
    read = read_corpus(recipe.data.model_copy(update={"deduplicate": "exact"}))
    lines = [document.text for document in read.train]
    tasks = mixture_of(recipe.distill.tasks, "distill.tasks")
    row = 3 * recipe.pretrain.sequence_length  # characters
    longest = 3 * max(recipe.extend.lengths) if recipe.extend else row

    def facts(number: int, low: int, high: int, told: tuple[float, float]) -> Iterator[str]:
        count = max(200, 3 * _CHARACTERS // (low + 2 * high))
        return recall_documents(
            lines, count, seed=seed + number, characters=(low, high), told=told, facts=32
        )

    yield "tasks", task_documents(tasks, _CHARACTERS // 800, seed=seed)
    yield "plain", copy_documents(lines, _CHARACTERS // 260, seed=seed)
    yield "copies", copy_documents(lines, _CHARACTERS // 260, seed=seed + 1, alike=_ALIKE)
    yield "dense", facts(0, row // 4, row, (0.8, 1.0))
    yield "spread", facts(1, row // 4, 2 * row, (0.1, 0.8))
    yield "long", facts(2, longest // 12, longest, (0.05, 0.5))


def _mixed(files: Mapping[str, Path], shares: Mapping[str, float], begin: str = "0%") -> list[str]:
    library = _source("stdlib", round(1 - sum(shares.values()), 3), begin=begin, holdout=True)
    return [library, *(_source(str(files[n]), share, begin=begin) for n, share in shares.items())]


def _source(
    path: str, weight: float, *, begin: str = "0%", end: str = "100%", holdout: bool = False
) -> str:
    read = f'begin = "{begin}", end = "{end}"'
    return f'{{path = "{path}", weight = {weight}, holdout = {str(holdout).lower()}, {read}}}'


def _sources(*sources: str) -> str:
    return f"data.sources=[{', '.join(sources)}]"


def _cached(cache: str, name: str, documents: Iterable[str]) -> Path:
    """Write documents into the cache, under their own digest."""
    import hashlib
    import json

    from ziphius.checkpoint.files import write_atomic
    from ziphius.config.errors import BadInput

    text = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    folder = Path(cache).expanduser().absolute() / "text"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{folder}: {error.strerror}: name a folder for it by --set run.cache=FOLDER"
        ) from None
    path = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        write_atomic(path, text)
    return path
