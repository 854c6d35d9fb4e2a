"""Log-probabilities in OpenAI's two shapes: of chats, and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ziphius.inference.logprobs import Scored
from ziphius.serving.answers import Usage
from ziphius.serving.api.sampling import SamplingFields
from ziphius.serving.served import Served


def of_chat(served: Served, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return an entry a token, with the alternatives that were asked for."""
    return [
        {
            **_entry(served, one.token, one.logprob),
            "top_logprobs": [_entry(served, other.token, other.logprob) for other in one.top],
        }
        for one in scored
    ]


def _entry(served: Served, token: int, logprob: float) -> dict[str, Any]:
    text, spelled = served.spell(token)
    return {"token": text, "logprob": finite(logprob), "bytes": spelled}


def of_completion(
    served: Served,
    scored: Sequence[Scored | None],
    token_ids: Sequence[int],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """Return the four lists. The first token of a prompt has no log-probability: None.

    A token's own number is also among its alternatives, the very same float, so that whoever asks
    whether it is the likeliest finds it equal.
    """
    tops: list[dict[str, float] | None] = []
    for one in scored:
        if one is None:
            tops.append(None)
            continue
        top = {name(served, other.token): finite(other.logprob) for other in one.top}
        top.setdefault(name(served, one.token), finite(one.logprob))
        tops.append(top)
    return {
        "tokens": [name(served, token) for token in token_ids],
        "token_logprobs": [None if one is None else finite(one.logprob) for one in scored],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def cut(scored: Sequence[Scored | None], count: int) -> list[Scored | None]:
    """Return log-probabilities with so many alternatives at most."""
    return [None if one is None else one._replace(top=one.top[:count]) for one in scored]


def work(fields: SamplingFields, usage: Usage) -> int:
    """Return about how many characters a whole answer's log-probabilities have."""
    asked = getattr(fields, "top_logprobs", None) or getattr(fields, "logprobs", None)
    of_prompt = fields.prompt_logprobs
    if getattr(fields, "echo", False) and asked is not None:
        of_prompt = max(of_prompt or 0, asked)
    entries = usage.completion * (1 + int(asked)) if asked is not None else 0
    entries += usage.prompt * (1 + of_prompt) if of_prompt is not None else 0
    return 20 * entries


def name(served: Served, token: int) -> str:
    """Return a token's text, or where it is a part of a character, its bytes as OpenAI has them."""
    text, spelled = served.spell(token)
    if "\N{REPLACEMENT CHARACTER}" in text and bytes(spelled) != text.encode():
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
    return text


def finite(logprob: float) -> float:
    """Return a number that JSON has: what cannot come is as OpenAI writes it."""
    return max(logprob, -9999.0)


def by_id(served: Served, scored: Sequence[Scored | None] | None) -> list[Any] | None:
    """Return vLLM's shape of a prompt's log-probabilities: by token id."""
    if scored is None:
        return None
    return [
        None
        if one is None
        else {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": served.spell(token)[0],
            }
            for token, logprob, rank in [*one.top, (one.token, one.logprob, one.rank)]
        }
        for one in scored
    ]
