"""What a response's length is worth: bounded, so that it never outweighs being right."""

from __future__ import annotations

from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.config.errors import BadInput


def overlong_penalty(longest: int, margin: int) -> Reward:
    """Return a penalty from 0 to -1 that grows over the last ``margin`` tokens before ``longest``.

    It is 0 up to ``longest - margin`` tokens, falls evenly, and is -1 from ``longest`` on: where a
    response is cut, there is still a slope to learn from. Raises BadInput for other margins than
    1 to ``longest``.
    """
    if not 1 <= margin <= longest:
        raise BadInput(f"length margin {margin}: use 1 to the longest length, {longest} tokens")

    def reward(response: Response) -> float:
        return -min(max((response.tokens - (longest - margin)) / margin, 0.0), 1.0)

    return reward


def short_and_right(right: Reward, longest: int) -> Reward:
    """Return a bonus from 0 to 1 for a right response: 1 for no tokens, 0 from ``longest`` on.

    ``right`` decides how right it is, in 0 to 1; what is wrong gets nothing for being short.
    Raises BadInput for a length under 1.
    """
    if longest < 1:
        raise BadInput(f"longest length {longest}: use at least 1 token")

    def reward(response: Response) -> float:
        worth = min(max(right(response), 0.0), 1.0)
        return worth * (1 - min(max(response.tokens / longest, 0.0), 1.0))

    return reward
