"""Small steps at fixed addresses, so that their kernels can be called again without the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ziphius.inference.paged import Batch, PagedCache
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.cpu.program import Program, Unrepeatable
from ziphius.kernels.latent import LatentPages
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer

MOST_TOKENS = 64  # larger steps spend little of their time between kernels
MOST_BYTES = 64 * 2**20  # of all programs' intermediate results together
# Part of a model over a step: rotary tables, cache and rows [1, N, ..] to several rows [N, ..].
Part = Callable[..., tuple[Tensor, ...]]


class Repeats:
    """A program for every part of a model and number of tokens; the latest used ones are kept."""

    def __init__(self, model: Transformer, cache: PagedCache, library: Library) -> None:
        self.model, self.cache, self.library = model, cache, library
        self.forget()

    def forget(self) -> None:
        """Begin anew: the addresses of weights have changed."""
        self.steps: OrderedDict[tuple[Part, int, int], Step] = OrderedDict()
        self.why_not: str | None = None
        self.most_tokens = MOST_TOKENS

    def run(self, part: Part, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...] | None:
        """Compute a part of the model over a batch; the result is valid until the next step.

        None where the step is too large, or the part computes by more than kernels.
        """
        N = batch.tokens_BT.shape[1]
        if self.most_tokens < N or self.why_not is not None:
            return None
        key = (part, N, torch.get_num_threads())
        if (step := self.steps.get(key)) is not None:
            self.steps.move_to_end(key)
            step.load(batch, rows)
            return step.program.repeat()
        try:
            step = Step(part, self, batch, rows)
        except Unrepeatable as error:
            self.why_not = str(error)
            return None
        self._keep(key, step)
        return step.program.result

    def _keep(self, key: tuple[Part, int, int], step: Step) -> None:
        if step.nbytes > MOST_BYTES:  # of a large model, whose kernels are long
            self.most_tokens = key[1] - 1
            return
        self.steps[key] = step
        while sum(kept.nbytes for kept in self.steps.values()) > MOST_BYTES:
            self.steps.popitem(last=False)


class Step:
    """A part of the model over ``N`` tokens whose rows, places and results stay where they are."""

    def __init__(
        self, part: Part, repeats: Repeats, batch: Batch, rows: tuple[Tensor, ...]
    ) -> None:
        self.model, self.cache, self.first = repeats.model, repeats.cache, batch.turned
        N, c = batch.tokens_BT.shape[1], self.model.config
        self.rows = tuple(map(torch.empty_like, rows))
        self.turns = Rope(
            *torch.empty(2, N, c.qk_rope_head_dim // 2, dtype=self.model.precision.high)
        )
        self.slots_N, self.sequence_N, self.position_N = torch.empty(3, N, dtype=torch.int64)
        # A draft behind the last position may have a page of its own.
        n_pages = -(-c.max_position_embeddings // self.cache.page_size) + 1
        self.tables = torch.zeros(N, n_pages, dtype=torch.int64)
        self.load(batch, rows)
        self.program = Program(repeats.library, lambda: part(self.turns, self, *self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes that this step keeps."""
        return self.program.nbytes + self.tables.nbytes + sum(x.nbytes for x in self.rows)

    def load(self, batch: Batch, rows: tuple[Tensor, ...]) -> None:
        """Put a batch of the same size, and its rows, where the program reads them."""
        place, turns = batch.layer(0), batch.rope(self.model, len(self.slots_N))
        for mine, given in zip((*self.rows, *self.turns), (*rows, *turns), strict=True):
            mine.copy_(given)
        self.slots_N.copy_(place.slots_N)
        self.sequence_N.copy_(place.sequence_N)
        self.position_N.copy_(place.position_N)
        sequences, pages = place.tables.shape
        self.tables[:sequences, :pages].copy_(place.tables)

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the tokens."""
        return self.turns

    def layer(self, index: int) -> LatentPages:
        """Return a layer's pages and the tokens' places in them."""
        where = (self.slots_N, self.tables, self.sequence_N, self.position_N)
        return LatentPages(self.cache.pages[index], *where, first=self.first)
