"""Which tokens of which sequences go through the model next, and whose pages make room.

A step is ``schedule``, the engine's work, ``update``; requests are added and cancelled at any
moment. Nothing here reads a clock or draws a random number, so equal calls give equal steps.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Mapping
from operator import attrgetter

from ziphius.config.errors import BadInput
from ziphius.inference.pages import PagePool
from ziphius.inference.sequence import Chunk, QueueFull, Sequence, Stats, Step

FOREVER = float("inf")


class Scheduler:
    """Continuous batching over a pool of pages.

    - Higher priority first, then first come first served; the n answers of a request in their
      order. Only the first request in the queue may start, so that none is passed over for ever.
    - A step decodes all running sequences that can, then fills up with chunks of prompts, at most
      ``prefill_chunk`` tokens of each and ``max_step_tokens`` in all.
    - A sequence starts when all its tokens have pages. When one that runs needs a page and none is
      free, the last in order loses its pages and waits again, its output kept. A sequence that is
      first in order therefore always goes on, and every request ends.
    - Drafts take only pages that are free, and no page longer than a step.
    - Of n answers one computes the prompt, the others fork it; each then computes the prompt's last
      token again, for its logits.

    ``recompute`` tokens of a known prefix are computed again (1 for MTP, see ``PageTable.begin``).
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int = 64,
        max_step_tokens: int = 2048,
        prefill_chunk: int = 512,
        max_waiting: int = 1024,
        max_waiting_tokens: int = 1_000_000,
        recompute: int = 0,
    ) -> None:
        limits = {
            "max_running": max_running, "prefill_chunk": prefill_chunk, "max_waiting": max_waiting,
            "max_waiting_tokens": max_waiting_tokens,
        }  # fmt: skip
        for name, limit in limits.items():
            if limit < 1:
                raise BadInput(f"{name} = {limit}: at least 1 is needed")
        if max_step_tokens < max_running:
            raise BadInput(
                f"max_step_tokens = {max_step_tokens}: each of {max_running} running sequences "
                f"needs a token a step: use {max_running} or more, or lower max_running"
            )
        self.pool = pool
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.prefill_chunk, self.recompute = prefill_chunk, recompute
        self.max_waiting, self.max_waiting_tokens = max_waiting, max_waiting_tokens
        # Both in order.
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._waiting_tokens = 0
        self._refused: tuple[Sequence, int, int] | None = None  # with how few free, many running
        self._in_flight: Step | None = None
        self._next_deadline = FOREVER  # of those that have not ended, or earlier
        self._arrivals = 0
        self._prefix_queries = self._prefix_hits = 0
        self._forks = self._preemptions = self._expired = 0

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self._waiting

    def stats(self) -> Stats:
        """Return the numbers of this moment."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            pages=self.pool.n_pages,
            used=self.pool.used,
            cached=self.pool.cached,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            forks=self._forks,
            preemptions=self._preemptions,
            expired=self._expired,
        )

    # --- requests ---------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        n: int = 1,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float = FOREVER,
        prompt_logprobs: bool = False,
    ) -> list[Sequence]:
        """Put a request into the queue; return its ``n`` sequences.

        Raises BadInput for what can never run, and QueueFull, which passes: a request is taken
        whole or not at all, and each of its n counts. ``deadline`` is compared with ``schedule``'s
        ``now``. Only the first sequence is asked for ``prompt_logprobs``. With ``max_tokens=0`` the
        prompt is scored and no token is chosen.
        """
        if not prompt or max_tokens < 0 or n < 1:
            raise BadInput(
                f"a prompt of {len(prompt)} tokens, {max_tokens} new ones and n = {n}: "
                "at least 1, 0 and 1 are needed"
            )
        # The last token is never fed.
        pages = -(-max(len(prompt), len(prompt) + max_tokens - 1) // self.pool.page_size)
        if pages > self.pool.n_pages:
            raise BadInput(
                f"a prompt of {len(prompt)} tokens and {max_tokens} new ones need {pages} pages of "
                f"the cache, which has {self.pool.n_pages}: shorten the prompt, ask for fewer "
                "tokens or give the cache more memory"
            )
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull("requests", len(self._waiting), self.max_waiting)
        if self._waiting and self._waiting_tokens + len(prompt) > self.max_waiting_tokens:
            raise QueueFull("tokens", self._waiting_tokens, self.max_waiting_tokens)
        sequences = [
            Sequence(
                prompt,
                max_tokens,
                self.pool,
                arrival=self._arrivals,
                index=index,
                priority=priority,
                salt=salt,
                deadline=deadline,
                prompt_logprobs=prompt_logprobs and index == 0,
            )
            for index in range(n)
        ]
        self._arrivals += 1
        self._next_deadline = min(self._next_deadline, deadline)
        for sequence in sequences:
            if n > 1:
                sequence.group = sequences
            self._wait(sequence)
        return sequences

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence; False if it has ended already.

        If it is in the step that is being computed, its pages are given back by ``update``.
        """
        if sequence.state == "ended":
            return False
        self._end(sequence)
        return True

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> Step:
        """Return the next step. If it has chunks, ``update`` must follow. ``now``: see deadlines.

        Pages are taken from sequences before any are given to others, so no page that the step
        copies or writes changes hands within it.
        """
        if self._in_flight is not None:
            raise ValueError("the last step was not updated")
        step = Step()
        if now >= self._next_deadline:
            self._expire(now, step)
        self._make_room(step)
        budget = self._decode(step)
        for sequence in self._running:
            if budget > 0 and len(sequence.tokens) - sequence.computed > 1:
                budget -= self._feed(sequence, step, budget)
        if budget > 0 and self._waiting and not step.preempted:
            self._admit(step, budget)
        if step.chunks:
            self._in_flight = step
        return step

    def update(
        self,
        step: Step,
        confirmed: Mapping[Sequence, list[int]],
        finished: Collection[Sequence] = (),
    ) -> None:
        """Take the results of a step: the tokens chosen for each sequence, and which are finished.

        A sequence whose chunk ``ends`` needs at least one token (accepted drafts, then one more)
        unless it is finished; others get none. Sequences that have been cancelled are ignored.
        """
        if step is not self._in_flight:
            if step.chunks:
                raise ValueError("that step is not being computed")
            return
        for chunk in step.chunks:
            if chunk.sequence.state == "running":
                chunk.expect(confirmed.get(chunk.sequence, []), chunk.sequence in finished)
        self._in_flight = None
        size = self.pool.page_size
        for chunk in step.chunks:
            sequence = chunk.sequence
            table = sequence.table
            if sequence.state == "ended":
                table.release()
                continue
            if chunk.ends:
                tokens = sequence.tokens
                new = confirmed.get(sequence)
                if new:
                    tokens += new
                    sequence.computed = len(tokens) - 1
                else:
                    sequence.computed = len(tokens)
                if chunk.drafts:
                    table.trim(len(tokens))
                sequence.drafts = []
            else:
                sequence.computed = chunk.start + len(chunk.tokens)
            if sequence.computed // size > table.published:
                table.publish(sequence.tokens, sequence.computed)
            if sequence.scored < sequence.prompt_length:
                sequence.scored = min(sequence.computed, sequence.prompt_length)
        for sequence in finished:
            if sequence.state != "ended":
                self._end(sequence)

    def drop(self, step: Step) -> None:
        """End the sequences of a step that broke off, at whatever point."""
        for chunk in step.chunks:
            self.cancel(chunk.sequence)
        if step is self._in_flight:
            self.update(step, {})

    def check(self) -> None:
        """Raise AssertionError unless the accounts are right (for tests)."""
        flying = self._in_flight.chunks if self._in_flight else []
        ended = [chunk.sequence for chunk in flying if chunk.sequence.state == "ended"]
        everyone = [*self._running, *self._waiting, *ended]
        assert len(set(everyone)) == len(everyone), "a sequence is in two places"
        self.pool.check(sequence.table for sequence in everyone)
        for queue, state in ((self._running, "running"), (self._waiting, "waiting")):
            assert all(sequence.state == state for sequence in queue), state
            assert sorted(queue, key=attrgetter("order")) == queue, "out of order"
        assert len(self._running) <= self.max_running, "too many run"
        for sequence in self._running:
            table, computed = sequence.table, sequence.computed
            assert computed < len(sequence.tokens) <= sequence.max_length, "computed"
            assert computed <= table.capacity, "rows without pages"
            assert table.shared <= len(sequence.tokens), "shared"
            assert not self.pool.reuse or table.published >= computed // self.pool.page_size
        for sequence in self._waiting:
            assert not sequence.table.pages, "pages while waiting"
            assert not sequence.computed, "computed while waiting"
        assert self._waiting_tokens == sum(sequence.load for sequence in self._waiting), (
            "waiting tokens"
        )

    # --- parts of a step --------------------------------------------------------------------------

    def _expire(self, now: float, step: Step) -> None:
        live = self._running + self._waiting
        step.expired = [sequence for sequence in live if sequence.deadline <= now]
        for sequence in step.expired:
            self._end(sequence)
        self._expired += len(step.expired)
        left = (sequence.deadline for sequence in live if sequence.state != "ended")
        self._next_deadline = min(left, default=FOREVER)

    def _make_room(self, step: Step) -> None:
        """Give each running sequence pages up to its last token, the first in order first."""
        running, size = self._running, self.pool.page_size
        for sequence in running:  # it may get shorter, at its end
            table, length = sequence.table, len(sequence.tokens)
            while length > len(table.pages) * size and not table.extend(length):
                last = running[-1]
                self._preempt(last, step)
                if last is sequence:
                    break

    def _decode(self, step: Step) -> int:
        """Feed the last token of those that lack no other, with drafts; return the budget left."""
        size, chunks = self.pool.page_size, step.chunks
        for sequence in self._running:
            tokens, start = sequence.tokens, sequence.computed
            if len(tokens) - start == 1:
                table = sequence.table
                slot = table.pages[start // size] * size + start % size
                slots = [slot if start >= table.shared else -1]
                chunks.append(Chunk(sequence, start, [tokens[start]], slots, 1, True))
        budget = self.max_step_tokens - len(chunks)
        for chunk in chunks:
            if chunk.sequence.drafts:
                budget -= self._draft(chunk, budget)
        return budget

    def _draft(self, chunk: Chunk, budget: int) -> int:
        """Add as many drafts to a chunk that ends as have a use and room; return their number."""
        sequence = chunk.sequence
        table, length = sequence.table, len(sequence.tokens)
        # One token follows the last accepted draft.
        count = min(len(sequence.drafts), budget, sequence.max_length - length - 1)
        if count > 0 and not table.extend(length + count):
            count = min(count, table.capacity - length)
        if count <= 0:
            return 0
        chunk.tokens += sequence.drafts[:count]
        chunk.slots += table.slots(length, length + count)
        chunk.logits += count
        chunk.drafts = count
        return count

    def _feed(self, sequence: Sequence, step: Step, budget: int) -> int:
        """Feed the next tokens of a sequence that lacks several; return their number."""
        tokens, start = sequence.tokens, sequence.computed
        end = min(start + min(self.prefill_chunk, budget), len(tokens))
        ends = end == len(tokens)
        logits = int(ends)
        unscored = max(start, sequence.scored)
        if unscored < min(end, sequence.prompt_length):
            logits = end - unscored
        slots = sequence.table.slots(start, end)
        chunk = Chunk(sequence, start, tokens[start:end], slots, logits, ends)
        step.chunks.append(chunk)
        fed = end - start
        if ends and sequence.drafts:
            fed += self._draft(chunk, budget - fed)
        return fed

    def _admit(self, step: Step, budget: int) -> None:
        """Start waiting sequences in order, until one has no room."""
        waiting, running = self._waiting, self._running
        place = 0
        while place < len(waiting) and len(running) < self.max_running and budget > 0:
            sequence = waiting[place]
            computing, source = sequence.siblings()
            if computing and source is None:
                place += 1  # its turn comes when the prompt is computed
                continue
            if not (self._fork(sequence, source, step) if source else self._begin(sequence)):
                return
            self._unwait(sequence)
            sequence.state = "running"
            insort(running, sequence, key=attrgetter("order"))
            budget -= self._feed(sequence, step, budget)

    def _begin(self, sequence: Sequence) -> bool:
        free, running = self.pool.free, len(self._running)
        if self._refused is not None:
            refused, before, beside = self._refused
            if refused is sequence and free <= before and running >= beside:
                return False  # spares a long prompt's look-up at each step that it waits
        # A page for each that runs, so that a prompt is not computed just to be preempted.
        spare = min(running, self.pool.n_pages // 8)
        limit = sequence.scored if sequence.scored < sequence.prompt_length else None
        start = sequence.table.begin(
            sequence.tokens, recompute=self.recompute, limit=limit, spare=spare
        )
        if start is None:
            self._refused = (sequence, free, running)
            return False
        self._refused = None
        sequence.computed = start
        if sequence.cached < 0:
            sequence.cached = sequence.table.shared
            self._prefix_queries += sequence.prompt_length
            self._prefix_hits += sequence.cached
        return True

    def _fork(self, sequence: Sequence, source: Sequence, step: Step) -> bool:
        fork = source.table.fork(sequence.prompt_length)
        if fork is None:
            return False
        sequence.table, copies = fork
        sequence.computed = sequence.prompt_length - 1
        sequence.cached = sequence.prompt_length
        step.copies += copies
        self._forks += 1
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._running.remove(sequence)
        sequence.table.release()
        sequence.computed = 0
        sequence.drafts = []
        self._wait(sequence)
        step.preempted.append(sequence)
        self._preemptions += 1

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self._waiting, sequence, key=attrgetter("order"))
        self._waiting_tokens += sequence.load

    def _unwait(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._waiting_tokens -= sequence.load

    def _end(self, sequence: Sequence) -> None:
        if sequence.state == "waiting":
            self._unwait(sequence)
        else:
            self._running.remove(sequence)
        sequence.state = "ended"
        sequence.drafts = []
        flying = self._in_flight.chunks if self._in_flight else ()
        if not any(chunk.sequence is sequence for chunk in flying):
            sequence.table.release()
