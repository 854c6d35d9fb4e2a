"""The run's text in every form it is needed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.config.recipe import Recipe
from ziphius.data.corpus import Corpus, read_corpus
from ziphius.data.encode import EncodedDocuments
from ziphius.data.heldout import HeldoutRows, heldout_rows
from ziphius.data.loader import Loader
from ziphius.data.prepared import Prepared, open_prepared, prepared_folder
from ziphius.data.removed import tell_reasons
from ziphius.data.tokenizer import load_tokenizer, train_tokenizer
from ziphius.data.tokens import Tokens
from ziphius.training.watch import Watch


@dataclass(frozen=True)
class Text:
    """Documents, tokenizer, batches and held-out rows of one recipe.

    ``corpus`` holds the training documents in memory, or says where they were prepared.
    """

    corpus: Corpus | Prepared
    tokenizer: Tokenizer
    loader: Loader
    heldout: HeldoutRows

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
    folder = prepared_folder(recipe.data)
    corpus = read_corpus(recipe.data) if folder is None else open_prepared(folder)
    watch.say(_announcement(corpus))
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
    return Text(corpus, tokenizer, _loader(recipe, sources, tokenizer), heldout)


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
    recipe: Recipe, sources: Sequence[tuple[Tokens, float]], tokenizer: Tokenizer
) -> Loader:
    config = recipe.pretrain
    loader = Loader(
        sources,
        tokenizer,
        sequence_length=config.sequence_length,
        seed=recipe.run.seed,
        fim_rate=recipe.data.fim_rate,
        token_split_rate=recipe.data.token_split_rate,
        workers=recipe.data.workers,
    )
    # Now, not when a batch that grows has outgrown the text.
    loader.require_rows(max(config.batch_size, config.batch_size_start or 0))
    return loader
