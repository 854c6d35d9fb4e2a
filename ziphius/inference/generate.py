"""Text from a model: prefill, then a token at a time over the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.inference.cache import LatentCache
from ziphius.inference.noise import Noise, fresh_seed
from ziphius.inference.params import SamplingParams
from ziphius.inference.sampler import Sampler
from ziphius.inference.stop import AnswerText, Finish
from ziphius.inference.vocabulary import Vocabulary
from ziphius.model.transformer import Transformer

PREFILL_CHUNK = 512


@torch.no_grad()
def generate_tokens(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    *,
    cached: bool = True,
    vocabulary: Vocabulary | None = None,
) -> Iterator[int]:
    """Yield new token ids after ``prompt``, up to ``max_tokens`` or a stop id, which is yielded.

    What is about the text (stop strings, ...) is the caller's; ``bad_words`` need ``vocabulary``.

    With ``cached=False`` every token computes the whole sequence again in the expanded form; that
    is the slow specification of the cached, absorbed one. Raises BadInput for an empty prompt, ids
    outside the vocabulary, a prompt that fills ``max_position_embeddings``, and what is asked of
    the engine alone: several answers, log-probabilities, a grammar.
    """
    check_prompt(model, prompt)
    params.check_vocabulary(model.config.vocab_size)
    _check_plain(params)
    room = model.config.max_position_embeddings - len(prompt)
    device = model.lm_head.weight.device
    noise = Noise(fresh_seed() if params.seed is None else params.seed)
    sampler = Sampler(params, prompt, noise, stop_ids=stop_ids, vocabulary=vocabulary)
    steps = room if params.max_tokens is None else min(params.max_tokens, room)
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
        logits_V = model.lm_head(hidden_BTD[0, -1])
        token = sampler.choose(logits_V, ids[len(prompt) :]).token
        ids.append(token)
        yield token
        if token in sampler.stop_ids:
            return


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
    ids, vocabulary = encode_prompt(tokenizer, prompt, first_ids), Vocabulary(tokenizer)
    answer = AnswerText(vocabulary, params, stop_ids)
    for token in generate_tokens(model, ids, params, stop_ids, vocabulary=vocabulary):
        if piece := answer.push(token):
            yield piece
        if answer.finish:
            return
    if piece := answer.end(Finish("length")):  # of the context
        yield piece


def encode_prompt(tokenizer: Tokenizer, prompt: str, first_ids: Sequence[int] = ()) -> list[int]:
    """Return ``first_ids`` and the prompt's tokens. Raises BadInput for text that is not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadInput("the prompt is not valid UTF-8: give text in UTF-8") from None
    return [*first_ids, *tokenizer.encode(prompt, add_special_tokens=False).ids]


def _check_plain(params: SamplingParams) -> None:
    if (
        params.n > 1
        or params.constraint
        or (params.logprobs, params.prompt_logprobs) != (None,) * 2
    ):
        raise BadInput(
            "n, logprobs, prompt_logprobs and grammars are the engine's: leave them out here"
        )


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
