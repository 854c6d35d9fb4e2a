"""What a quickstart reads: the standard library, tasks, and what teaches a network to look back.

Nothing finds a needle that was not taught to, and in this order (``evaluation.recall``): copies and
nothing else at first, facts among the text afterwards, and long documents of facts where the
context grows. Everything but the library is generated, and lies in the cache by its content. None
of it is held out: what is told of held-out text is told of packages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ziphius.config.recipe import Recipe

_LIBRARY = "stdlib"
# Of pre-training: until then copies alone; and until then copies and dense facts among the text.
_COPYING, _DENSE = "35%", "70%"


class Part(NamedTuple):
    """A kind of text: its share, relative to the others that are read with it, and when it is."""

    share: float
    begin: str = "0%"
    end: str = "100%"


_PRETRAINED = {
    "plain": Part(1, end=_COPYING),
    _LIBRARY: Part(0.63, _COPYING),
    "tasks": Part(0.05, _COPYING),
    "copies": Part(0.06, _COPYING, _DENSE),
    "dense": Part(0.12, _COPYING, _DENSE),
    "spread": Part(0.14, _COPYING),
}
_EXTENDED = {
    _LIBRARY: Part(0.2),
    "copies": Part(0.1),
    "dense": Part(0.1),
    "spread": Part(0.15),
    "long": Part(0.45),
}
_CHARACTERS = 2_000_000  # of each at most, and three times as many of what is read alone
_SHORTEST = 200  # characters: about as many as the fewest facts take
_ALIKE = 0.7  # of the copies, are of one kind of words
_SPELLED = ("dense",)  # besides the library the tokenizer is trained on
# What is said twice has to be told from its neighbours: documents do not see each other, and most
# of eight frequencies of position, not two of four, turn within a row. 625 is to 256 tokens what
# the published 10,000 is to 4,096. At the preset's own rate copying comes late or never. Near
# duplicates would be looked for twice, and facts look alike.
_SETTINGS = (
    "data.deduplicate=exact",
    "data.document_mask=true",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "model.rope_theta=625",
    "pretrain.steps=4000",
    "pretrain.learning_rate=1.5e-3",
    "pretrain.final_learning_rate=3e-4",
    "pretrain.decay_start=50%",
)
# Bits per byte of long rows take long.
_LONGER_MEASURED = "run.validate_bytes=120000"


@dataclass(frozen=True)
class Mixture:
    """Settings, as ``--set`` takes them: those of all stages, and what an extension adds."""

    settings: tuple[str, ...]
    extension: tuple[str, ...] = ()


def mixture(preset: str, overrides: Sequence[str], say: Callable[[str], None]) -> Mixture:
    """Generate what is mixed into the text of a preset; return the settings that name it.

    What is set by hand stands. Who names text by hand gets no other, and nothing else that copying
    needs. Raises BadInput for a cache that cannot be written.
    """
    from ziphius.config.recipe import load_recipe
    from ziphius.data.corpus import read_corpus

    if any(setting.startswith("data.source") for setting in overrides):
        return Mixture(tuple(overrides))
    settings = (*_SETTINGS, *overrides)
    recipe = load_recipe(preset, settings)
    say("writing tasks, copies, and facts to recall")
    texts = [document.text for document in read_corpus(recipe.data).train]
    made = {name: list(some) for name, some in _documents(recipe, texts)}
    files = {name: _written(recipe, name, some) for name, some in made.items()}
    own = []
    if recipe.tokenizer.path is None:
        say(f"training a byte-level BPE tokenizer of {recipe.tokenizer.vocab_size} tokens")
        spelled = [document for name in _SPELLED for document in made[name]]
        own.append(f"tokenizer.path={_tokenizer(recipe, [*texts, *spelled])}")
    by_hand = any(setting.startswith("run.validate_bytes") for setting in overrides)
    longer = () if by_hand else (_LONGER_MEASURED,)
    return Mixture(
        (*settings, *own, _sources(files, _PRETRAINED)), (*longer, _sources(files, _EXTENDED))
    )


def _documents(recipe: Recipe, texts: Sequence[str]) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the documents of each kind, by name."""
    from ziphius.alignment.questions import mixture_of
    from ziphius.alignment.tasks.documents import task_documents
    from ziphius.evaluation.recall import copy_documents, recall_documents

    assert recipe.distill is not None, "the preset has the table"
    seed = recipe.run.seed
    tasks = mixture_of(recipe.distill.tasks, "distill.tasks")
    row = max(_SHORTEST, 3 * recipe.pretrain.sequence_length)  # characters
    longest = max(row, 3 * max(recipe.extend.lengths) if recipe.extend else 0)

    def facts(
        number: int, low: int, high: int, told: tuple[float, float], **more: int
    ) -> Iterator[str]:
        size, mean = (low, high), (high - low) / math.log(high / low)
        count = max(200, int(_CHARACTERS / mean))
        return recall_documents(
            texts, count, seed=seed + number, characters=size, told=told, **more
        )

    yield "tasks", task_documents(tasks, _CHARACTERS // 400, seed=seed)
    yield "plain", copy_documents(texts, 3 * _CHARACTERS // 260, seed=seed)
    yield "copies", copy_documents(texts, _CHARACTERS // 260, seed=seed + 1, alike=_ALIKE)
    # In tightly packed short ones it pays to look back, in others how far.
    yield "dense", facts(0, row // 4, row, (0.8, 1.0))
    yield "spread", facts(1, row // 4, 2 * row, (0.1, 0.8))
    # Of many facts, so that the last sentence of most lies far back.
    yield "long", facts(2, longest // 12, longest, (0.05, 0.5), facts=200, most=300)


def _sources(files: Mapping[str, Path], parts: Mapping[str, Part]) -> str:
    import json

    entries = []
    for name, part in parts.items():
        path, held = json.dumps(str(files.get(name, name))), json.dumps(name == _LIBRARY)
        read = f'weight = {part.share}, begin = "{part.begin}", end = "{part.end}"'
        entries.append(f"{{path = {path}, holdout = {held}, {read}}}")
    return f"data.sources=[{', '.join(entries)}]"


def _written(recipe: Recipe, name: str, documents: Iterable[str]) -> Path:
    """Write documents into the cache; return the file."""
    import json

    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    return _cached(recipe.run.cache, f"{name}.jsonl", "".join(lines))


def _tokenizer(recipe: Recipe, texts: Iterable[str]) -> Path:
    """Train the tokenizer: on the library, and on so much of the rest that it can be spelled.

    All that is generated would take a third of the vocabulary (``dev/LOG.md``).
    """
    from ziphius.data.tokenizer import train_tokenizer

    made = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    return _cached(recipe.run.cache, "tokenizer.json", made.to_str())


def _cached(cache: str, name: str, text: str) -> Path:
    """Write a text into the cache, under its own digest."""
    import hashlib

    from ziphius.checkpoint.files import write_atomic
    from ziphius.config.errors import BadInput

    folder = Path(cache).expanduser().absolute() / "text"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{folder}: {error.strerror}: name a folder for it by --set run.cache=FOLDER"
        ) from None
    data, (stem, ending) = text.encode(), name.split(".")
    path = folder / f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
    if not path.is_file():
        write_atomic(path, data)
    return path
