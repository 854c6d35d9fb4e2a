"""Drafts from the MTP module: how many, by whom, and whether they pay (report section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.inference.answer import Answer
from ziphius.inference.errors import RequestError
from ziphius.inference.forward import Forward
from ziphius.inference.paged import Feed
from ziphius.inference.sequence import Chunk, Sequence

Mode = Literal["off", "auto", "on"]
# Steps of each kind that are timed before one is chosen, and steps until they are timed again.
TRIAL, TERM = 12, 400


class Late(NamedTuple):
    """A hidden state whose MTP row found no page yet, and its position."""

    position: int
    hidden_D: Tensor


@dataclass
class Trace:
    """What the drafter knows of a sequence: whether every MTP row so far is there."""

    complete: bool = True
    late: Late | None = None


@dataclass
class Acceptance:
    """Drafts by their place behind the last token: how many were judged, and how many accepted."""

    judged: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def note(self, drafts: int, accepted: int) -> None:
        """Count a step of one sequence. A draft behind a rejected one is not judged."""
        while len(self.judged) < drafts:
            self.judged.append(0)
            self.accepted.append(0)
        for place in range(min(drafts, accepted + 1)):
            self.judged[place] += 1
            self.accepted[place] += place < accepted

    @property
    def rates(self) -> list[float]:
        """The share accepted, by place."""
        return [a / j if j else 0.0 for a, j in zip(self.accepted, self.judged, strict=True)]


class Pace:
    """Chooses between plain and speculating steps by the tokens a second that each has given.

    For each size of the running batch, rounded to a power of two, both kinds are tried for a few
    steps, then the faster one runs for a term. Only speed depends on the choice.
    """

    def __init__(self, mode: Mode, depth: int) -> None:
        if mode not in ("off", "auto", "on"):
            raise BadInput(f"speculation = '{mode}': use off, auto or on")
        if depth < 1:
            raise BadInput(f"draft depth = {depth}: use 1 or more")
        self.mode, self.depth = mode, depth
        self._rounds: dict[int, list[list[tuple[int, float]]]] = {}
        self._left: dict[int, tuple[bool, int]] = {}

    def drafts(self, running: int) -> int:
        """Return how deep to draft for the next step."""
        if self.mode != "auto":
            return self.depth if self.mode == "on" else 0
        size = running.bit_length()
        plain, drafting = self._rounds.setdefault(size, [[], []])
        if len(drafting) < TRIAL:
            return self.depth
        if len(plain) < TRIAL:
            return 0
        better, left = self._left.get(size, (_speed(drafting) > _speed(plain), TERM))
        if left == 0:
            del self._left[size]
            self._rounds[size] = [[], []]
            return self.depth
        self._left[size] = (better, left - 1)
        return self.depth if better else 0

    def note(self, running: int, drafting: bool, tokens: int, seconds: float) -> None:
        """Count a decoding step."""
        if self.mode == "auto":
            trials = self._rounds.setdefault(running.bit_length(), [[], []])[drafting]
            if len(trials) < TRIAL:
                trials.append((tokens, seconds))


def _speed(trials: List[tuple[int, float]]) -> float:
    # The median of single steps: one slow step of a busy machine decides nothing.
    speeds = sorted(tokens / max(seconds, 1e-9) for tokens, seconds in trials)
    return speeds[len(speeds) // 2]


class Drafter:
    """Keeps the MTP layer's rows and proposes tokens for the next step.

    After a step's tokens are known, position i of every chunk meets token i + 1; its row goes to
    the slot of that token. So the rows of a page depend on the tokens of that page and of those
    before it, as the main layers' do, and prefixes can be shared.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def skip(self, chunks: List[Chunk]) -> None:
        """Note that a step's MTP rows are not computed."""
        for chunk in chunks:
            _trace(chunk.sequence).complete = False

    def propose(
        self, chunks: List[Chunk], hidden_ND: Tensor, answers: List[Answer | None], depth: int
    ) -> None:
        """Write the rows of a step and set the drafts of its sequences.

        ``hidden`` are the states of all tokens fed, ``answers`` belong to the chunks, None where
        nothing may be drafted.
        """
        feeds, rows, going = [], [], []
        offset = 0
        for chunk, answer in zip(chunks, answers, strict=True):
            states_nD = hidden_ND[offset : offset + len(chunk.tokens)]
            offset += len(chunk.tokens)
            feed = self._feed(chunk, states_nD)
            if feed is None:
                continue
            feeds.append(feed[0])
            rows.append(feed[1])
            if answer is not None and chunk.ends and _trace(chunk.sequence).late is None:
                going.append((len(feeds) - 1, chunk.sequence, answer))
        if not feeds:
            return
        out_ND = self.forward.draft(feeds, torch.cat(rows))
        ends = torch.tensor([len(feed.tokens) for feed in feeds]).cumsum(0) - 1
        last = [int(ends[place]) for place, _, _ in going]
        self._continue(out_ND[last], [(s, a) for _, s, a in going], depth)

    def _feed(self, chunk: Chunk, states_nD: Tensor) -> tuple[Feed, Tensor] | None:
        sequence, trace = chunk.sequence, _trace(chunk.sequence)
        if sequence.state != "running":
            return None
        start, end = chunk.start, sequence.computed
        if trace.late is not None and trace.late.position == start - 1:
            states_nD = torch.cat((trace.late.hidden_D.unsqueeze(0), states_nD))
            start -= 1
        trace.late = None
        count = min(end, len(sequence.tokens) - 1) - start
        if count > 0 and not sequence.table.extend(start + count + 1):
            count -= 1
            trace.late = Late(start + count, states_nD[count].clone())
        if count <= 0:
            return None
        first, behind = start + 1, start + 1 + count
        # The step's own slots: a page that it filled is published by now, and full of main rows.
        fed = chunk.start + len(chunk.tokens)
        slots = chunk.slots[first - chunk.start : behind - chunk.start]
        if behind > fed:
            slots = slots + sequence.table.slots(fed, behind)
        tokens = sequence.tokens[first:behind]
        return Feed(sequence.table.pages, first, tokens, slots), states_nD[:count]

    def _continue(self, out_nD: Tensor, going: List[tuple[Sequence, Answer]], depth: int) -> None:
        """Draft one token after the other; each is the next one's input, with the hidden state."""
        drafts: list[list[int]] = [[] for _ in going]
        places = list(range(len(going)))
        for level in range(depth):
            if not places:
                break
            logits = self.forward.draft_logits(out_nD).numpy()
            kept, feeds, states = [], [], []
            for row, place in enumerate(places):
                sequence, answer = going[place]
                try:
                    token = answer.guess(logits[row], drafts[place])
                except RequestError:  # the model's own logits will tell
                    continue
                drafts[place].append(token)
                slot = len(sequence.tokens) + level
                if level + 1 < depth and sequence.table.extend(slot + 1):
                    kept.append(place)
                    states.append(out_nD[row])
                    where = sequence.table.slots(slot, slot + 1)
                    feeds.append(Feed(sequence.table.pages, slot, [token], where))
            places = kept
            if feeds:
                out_nD = self.forward.draft(feeds, torch.stack(states))
        for (sequence, _), tokens in zip(going, drafts, strict=True):
            if _trace(sequence).complete:
                sequence.drafts = tokens


def _trace(sequence: Sequence) -> Trace:
    if not isinstance(sequence.data, Trace):
        sequence.data = Trace()
    return sequence.data
