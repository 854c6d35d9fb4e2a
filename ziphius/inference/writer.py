"""A checkpoint that writes: model, tokenizer, and the ids where a text begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ziphius.checkpoint.huggingface import TOKENIZER_FILE, checkpoint_folder, load
from ziphius.data.tokenizer import read_tokenizer
from ziphius.inference.generate import check_prompt, encode_prompt, generate_text
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer


@dataclass(frozen=True)
class Writer:
    """What it takes to go on from a text."""

    model: Transformer
    tokenizer: Tokenizer
    first_ids: tuple[int, ...]
    stop_ids: frozenset[int]

    def check(self, prompt: str) -> None:
        """Raise BadInput for a prompt that cannot be gone on from."""
        check_prompt(self.model, encode_prompt(self.tokenizer, prompt, self.first_ids))

    def write(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        """Yield pieces of the text after ``prompt`` as they are generated."""
        return generate_text(
            self.model,
            self.tokenizer,
            prompt,
            params,
            first_ids=self.first_ids,
            stop_ids=self.stop_ids,
        )


def load_writer(path: Path, dtype: str | None = None, *, mtp: bool = True) -> Writer:
    """Load a checkpoint with its tokenizer; texts begin with its config's ``bos_token_id``.

    Raises BadInput as ``load`` does, and when there is no readable tokenizer.json.
    """
    folder = checkpoint_folder(path)
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    model = load(folder, dtype, mtp=mtp)
    last = model.config.eos_token_id
    stop_ids = frozenset(last if isinstance(last, tuple) else (last,))
    return Writer(model, tokenizer, (model.config.bos_token_id,), stop_ids)
