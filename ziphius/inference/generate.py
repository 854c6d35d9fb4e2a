"""Text from a model: prefill, then a token at a time over the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.inference.cache import LatentCache
from ziphius.inference.sampler import SamplingParams, sample
from ziphius.model.transformer import Transformer

# A byte that does not complete a character decodes to this; more bytes may mend it.
REPLACEMENT = "\ufffd"
PREFILL_CHUNK = 512


@torch.no_grad()
def generate_tokens(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    *,
    cached: bool = True,
) -> Iterator[int]:
    """Yield new token ids after ``prompt``, up to ``max_tokens`` or a stop id (not yielded).

    With ``cached=False`` every token computes the whole sequence again in the expanded form; that
    is the slow specification of the cached, absorbed one. Raises BadInput for an empty prompt, ids
    outside the vocabulary, and a prompt that fills ``max_position_embeddings``.
    """
    check_prompt(model, prompt)
    room = model.config.max_position_embeddings - len(prompt)
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(params.seed)
    steps = min(params.max_tokens, room)
    cache = LatentCache(model, batch=1, capacity=len(prompt) + steps) if cached else None
    ids, fed = list(prompt), 0
    if cache is not None:
        # All but the last chunk of a long prompt, so that scores are never prompt times prompt.
        while len(ids) - fed > PREFILL_CHUNK:
            model.trunk(torch.tensor([ids[fed : fed + PREFILL_CHUNK]], device=device), cache)
            fed += PREFILL_CHUNK
    for _ in range(steps):
        hidden_BTD, _ = model.trunk(torch.tensor([ids[fed:]], device=device), cache)
        fed = len(ids) if cached else 0
        # Only the last position's logits are wanted: those of a whole prompt would be large.
        token = sample(model.lm_head(hidden_BTD[0, -1]), params, generator)
        if token in stop_ids:
            return
        ids.append(token)
        yield token


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    *,
    first_ids: Sequence[int] = (),
    stop_ids: Collection[int] = (),
) -> Iterator[str]:
    """Yield pieces of text after ``prompt`` as they are generated; joined they are the answer.

    ``first_ids`` (the beginning-of-sentence token) go before the prompt's own tokens.
    """
    ids = encode_prompt(tokenizer, prompt, first_ids)
    return stream_decode(tokenizer, generate_tokens(model, ids, params, stop_ids))


def encode_prompt(tokenizer: Tokenizer, prompt: str, first_ids: Sequence[int] = ()) -> list[int]:
    """Return ``first_ids`` and the prompt's tokens. Raises BadInput for text that is not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadInput("the prompt is not valid UTF-8: give text in UTF-8") from None
    return [*first_ids, *tokenizer.encode(prompt, add_special_tokens=False).ids]


def stream_decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield text as soon as it is final: a piece waits while it ends inside a character."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        if not text.endswith(REPLACEMENT):
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending, skip_special_tokens=False)


def check_prompt(model: Transformer, prompt: Sequence[int]) -> None:
    """Raise BadInput for a prompt that ``generate_tokens`` cannot go on from."""
    if not prompt:
        raise BadInput("the prompt is empty: give at least one token to go on from")
    V = model.config.vocab_size
    outside = [token for token in prompt if not 0 <= token < V]
    if outside:
        raise BadInput(
            f"token id {outside[0]} is outside the model's vocabulary of {V}: "
            "the tokenizer belongs to another model"
        )
    if len(prompt) >= model.config.max_position_embeddings:
        raise BadInput(
            f"the prompt has {len(prompt)} tokens and the model's context "
            f"{model.config.max_position_embeddings}: shorten the prompt"
        )
