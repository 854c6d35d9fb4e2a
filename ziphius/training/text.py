"""The run's text in every form it is needed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.config.data import DataConfig
from ziphius.config.errors import BadInput
from ziphius.config.moment import WHOLE_RUN
from ziphius.config.pretrain import TrainingConfig
from ziphius.config.recipe import Recipe
from ziphius.data.corpus import Corpus, read_corpus
from ziphius.data.documents import Document
from ziphius.data.encode import EncodedDocuments
from ziphius.data.heldout import HeldoutRows, heldout_rows
from ziphius.data.in_turn import InTurn, stretches
from ziphius.data.loader import Loader
from ziphius.data.prepared import Prepared, open_prepared, prepared_folder
from ziphius.data.projects import LongDocuments
from ziphius.data.removed import tell_reasons
from ziphius.data.tokenizer import load_tokenizer, train_tokenizer
from ziphius.data.tokens import Tokens
from ziphius.training.watch import Watch

Sources = Sequence[tuple[Tokens, float]]
"""Documents as token ids, and their source's weight."""


@dataclass(frozen=True)
class Text:
    """Documents, tokenizer, batches and held-out rows of one recipe.

    ``corpus`` holds the training documents in memory, or says where they were prepared.
    """

    corpus: Corpus | Prepared
    tokenizer: Tokenizer
    loader: Loader | InTurn
    heldout: HeldoutRows
    sources: Sources

    def lasting(self, recipe: Recipe) -> Text:
        """Return the text of the same recipe for pre-training of another length.

        Raises BadInput where at some time no source is read.
        """
        if all(span == WHOLE_RUN for span in self.corpus.spans):
            return self
        self.loader.close()
        loader = _pretraining_batches(recipe, self.corpus, self.sources, self.tokenizer)
        return replace(self, loader=loader)

    def describe(self) -> dict[str, Any]:
        """Return what a summary says about the text."""
        corpus = self.corpus
        return {
            "corpus": corpus.description,
            "corpus_files": _documents(corpus),
            "corpus_bytes": corpus.train_bytes + corpus.heldout_bytes,
            "corpus_sha256": corpus.sha256,
            "corpus_skipped": corpus.skipped,
            "removed": {
                count.reason: {"documents": count.documents, "bytes": count.bytes}
                for count in corpus.removed_counts
            },
            "heldout_packages": list(corpus.heldout_packages),
            "heldout_bytes": self.heldout.bytes,
            "vocab_size": self.tokenizer.get_vocab_size(),
        }


def prepare_text(recipe: Recipe, watch: Watch) -> Text:
    """Read the corpus, train or load the tokenizer, and encode everything.

    The folder of ``ziphius prepare`` brings its own tokenizer and tokens. Raises BadInput for text
    that cannot be used, and for too little of it.
    """
    corpus = _open(recipe, watch)
    sources: Sources
    if isinstance(corpus, Prepared):
        tokenizer, sources = corpus.tokenizer, corpus.sources
    else:
        tokenizer = _tokenizer(recipe, corpus, watch)
        watch.say("encoding the text")
        sources = tuple(
            (EncodedDocuments(documents, tokenizer), weight)
            for documents, weight in corpus.train_by_source
        )
    _require_room(tokenizer, recipe)
    length = recipe.pretrain.sequence_length
    heldout = heldout_rows(corpus.heldout, tokenizer, length, recipe.run.validate_bytes)
    loader = _pretraining_batches(recipe, corpus, sources, tokenizer)
    return Text(corpus, tokenizer, loader, heldout, sources)


def _pretraining_batches(
    recipe: Recipe, corpus: Corpus | Prepared, sources: Sources, tokenizer: Tokenizer
) -> Loader | InTurn:
    """Return the batches of a mixture that may change during the run."""
    config = recipe.pretrain
    streams = []
    for number, (begin, places) in enumerate(stretches(corpus.spans, config.total_tokens)):
        read = [sources[place] for place in places]
        seed = recipe.run.seed + number  # what is read again comes in another order
        loader = _loader(recipe, config, read, tokenizer, recipe.data.fim_rate, seed=seed)
        streams.append((begin, loader))
    return streams[0][1] if len(streams) == 1 else InTurn(streams)


def prepare_long_text(
    recipe: Recipe, config: TrainingConfig, tokenizer: Tokenizer, watch: Watch
) -> Text:
    """Read a recipe's corpus as rows of whole files of a project, ``config.sequence_length`` long.

    The held-out files too lie one behind the other. No file is rearranged to fill its middle: what
    a row is to teach is how far its parts see one another. Raises BadInput as ``prepare_text``
    does, and for prepared text of another tokenizer.
    """
    corpus, longest = _open(recipe, watch), config.sequence_length + 1
    if isinstance(corpus, Prepared):
        if corpus.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise BadInput(
                f"data.source: {corpus.path} was prepared with another tokenizer than the "
                "checkpoint's: prepare it with the checkpoint's as tokenizer.path"
            )
        sources = [(LongDocuments(tokens, longest), weight) for tokens, weight in corpus.sources]
    else:
        watch.say("encoding the text")
        sources = [
            (LongDocuments(EncodedDocuments(documents, tokenizer), longest), weight)
            for documents, weight in corpus.train_by_source
        ]
    _require_room(tokenizer, recipe)
    total = recipe.pretrain.total_tokens
    *_, (_, last) = stretches(corpus.spans, total)
    sources = [sources[place] for place in last]
    watch.say(
        f"{sum(source.files for source, _ in sources):,} files in "
        f"{sum(len(source.lengths) for source, _ in sources):,} documents of whole files"
    )
    heldout = heldout_rows(
        corpus.heldout, tokenizer, config.sequence_length, recipe.run.validate_bytes
    )
    loader = _loader(recipe, config, sources, tokenizer, 0.0, seed=recipe.run.seed, table="extend")
    return Text(corpus, tokenizer, loader, heldout, sources)


def heldout_documents(config: DataConfig) -> tuple[Document, ...]:
    """Return the documents that are held out of training: files, for records have no length.

    Records are returned where nothing else is held out.
    """
    folder = prepared_folder(config)
    heldout = (read_corpus(config) if folder is None else open_prepared(folder)).heldout
    return tuple(document for document in heldout if not document.is_record) or heldout


def _open(recipe: Recipe, watch: Watch) -> Corpus | Prepared:
    folder = prepared_folder(recipe.data)
    corpus = read_corpus(recipe.data) if folder is None else open_prepared(folder)
    watch.say(_announcement(corpus))
    return corpus


def _announcement(corpus: Corpus | Prepared) -> str:
    return (
        f"{corpus.description}: {_documents(corpus):,} documents, "
        f"{(corpus.train_bytes + corpus.heldout_bytes) / 1e6:.1f} MB, "
        f"sha256 {corpus.sha256[:12]}; left out: {tell_reasons(corpus.removed_counts)}"
    )


def _documents(corpus: Corpus | Prepared) -> int:
    train = corpus.documents if isinstance(corpus, Prepared) else len(corpus.train)
    return train + len(corpus.heldout)


def _tokenizer(recipe: Recipe, corpus: Corpus, watch: Watch) -> Tokenizer:
    if recipe.tokenizer.path is not None:
        return load_tokenizer(Path(recipe.tokenizer.path))
    watch.say(f"training a byte-level BPE tokenizer of {recipe.tokenizer.vocab_size} tokens")
    texts = (document.text for document in corpus.train)
    return train_tokenizer(texts, recipe.tokenizer.vocab_size)


def _require_room(tokenizer: Tokenizer, recipe: Recipe) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= recipe.model.vocab_size:
        raise BadInput(
            f"the tokenizer has token ids up to {largest}, model.vocab_size is "
            f"{recipe.model.vocab_size}: set model.vocab_size to more than that"
        )


def _loader(
    recipe: Recipe,
    config: TrainingConfig,
    sources: Sources,
    tokenizer: Tokenizer,
    fim_rate: float,
    *,
    seed: int,
    table: str = "pretrain",
) -> Loader:
    loader = Loader(
        sources,
        tokenizer,
        sequence_length=config.sequence_length,
        seed=seed,
        fim_rate=fim_rate,
        token_split_rate=recipe.data.token_split_rate,
        workers=recipe.data.workers,
        table=table,
    )
    # Now, not when a batch that grows has outgrown the text.
    loader.require_rows(max(config.batch_size, config.batch_size_start or 0))
    return loader
