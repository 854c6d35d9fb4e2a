"""The tables of a report: what happened, the text, the machine, the settings, the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ziphius.report.checks import rollbacks, skipped
from ziphius.report.formats import duration, plain, si, size, tidy, whole
from ziphius.report.read import Run

_REASONS = 12  # rows of skipped steps


@dataclass(frozen=True)
class Row:
    """A line of a table: a name and a text."""

    name: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote, after a prompt."""

    prompt: str
    text: str
    note: str


# Keys of the summary by table: name there, name on the page, how it is written.
Known = tuple[tuple[str, str, Callable[[Any], str]], ...]


def _bytes(value: float) -> str:
    return f"{size(value)} ({whole(value)} bytes)"


_CORPUS: Known = (
    ("corpus", "text", plain),
    ("corpus_files", "files", whole),
    ("corpus_bytes", "size", _bytes),
    ("corpus_sha256", "sha256", plain),
    ("corpus_skipped", "not UTF-8, skipped", whole),
    ("heldout_bytes", "held out", _bytes),
    ("heldout_packages", "held-out packages", plain),
    ("vocab_size", "vocabulary", whole),
)
_MACHINE: Known = (
    ("compute", "arithmetic", plain),
    ("kernels", "kernels", plain),
    ("torch", "PyTorch", plain),
    ("threads", "threads", plain),
    ("seed", "seed", plain),
    ("train_seconds", "training time", duration),
    ("peak_memory_gib", "memory at most", lambda value: f"{tidy(value)} GiB"),
    ("peak_flops", "peak", lambda value: si(value, "FLOP/s")),
    ("peak_source", "source of the peak", plain),
    ("training_flops_per_token", "work a token", lambda value: si(value, "FLOP")),
)
_ELSEWHERE = frozenset({
    "heldout_bpb_before", "heldout_bpb_after", "heldout_bpb_ema", "ngram_bpb", "xz_bpb",
    "final_loss", "final_mtp_loss", "final_max_violation", "tokens_per_s", "mfu", "steps",
    "tokens", "rollbacks", "skipped_steps", "resumed", "largest_spike", "flops_formula",
    "mtp_layers", "removed", "samples", "generated", "generated_seed",
    "generated_is_valid_python", "prompt",
})  # fmt: skip


def event_rows(run: Run) -> list[Row]:
    """Return what went wrong or was repeated."""
    metrics, rows = run.metrics, []
    rows.append(Row("rollbacks", _rollbacks(run)))
    count = skipped(run)
    rows.append(Row("skipped steps", whole(count) if count else "none"))
    spike = (run.summary or {}).get("largest_spike")
    if isinstance(spike, dict) and {"step", "nats"} <= spike.keys():
        text = f"{spike['nats']:.2f} nats above the running median, step {spike['step']:,}"
        rows.append(Row("largest loss spike", text))
    resumed = run.number("resumed")
    if resumed is not None:
        times = {0: "never", 1: "once"}.get(int(resumed), f"{resumed:.0f} times")
        rows.append(Row("resumed", times))
    if metrics.replaced:
        rows.append(Row("logged steps made again", whole(metrics.replaced)))
    return rows


def _rollbacks(run: Run) -> str:
    count = rollbacks(run)
    if not count:
        return "none"
    places = [
        f"on from step {back.step:,}"
        if back.left is None
        else f"{back.left:,} back to {back.step:,}"
        for back in run.metrics.rollbacks
    ]
    return str(count) + (f" ({'; '.join(places)})" if places else "")


def skip_rows(run: Run) -> list[Row]:
    """Return skipped steps and their reasons; neighbours with the same reason share a row."""
    spans: list[tuple[int, int, str]] = []
    for skip in run.metrics.skips:
        reason = skip.reason + (" (made again)" if skip.replaced else "")
        if spans and spans[-1][2] == reason and skip.step == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], skip.step, reason)
        else:
            spans.append((skip.step, skip.step, reason))
    rows = [
        Row(f"{first:,}" if first == last else f"{first:,} to {last:,}", reason)
        for first, last, reason in spans
    ]
    more = len(rows) - _REASONS
    return rows[:_REASONS] + ([Row("", f"and {more:,} more")] if more > 0 else [])


def corpus_rows(run: Run) -> list[Row]:
    """Return what is known about the text."""
    return list(_rows(run, _CORPUS))


def removed_rows(run: Run) -> list[tuple[str, str, str]]:
    """Return what was removed from the text: reason, documents, bytes."""
    removed = (run.summary or {}).get("removed")
    if not isinstance(removed, dict):
        return []
    return [
        (str(reason), _written(whole, entry.get("documents")), _written(size, entry.get("bytes")))
        for reason, entry in removed.items()
        if isinstance(entry, dict)
    ]


def machine_rows(run: Run) -> list[Row]:
    """Return what the run was made with and on."""
    return list(_rows(run, _MACHINE))


def other_rows(run: Run) -> list[Row]:
    """Return the rest of the summary, so that nothing it says is lost."""
    known = _ELSEWHERE | {name for name, _, _ in (*_CORPUS, *_MACHINE)}
    summary = run.summary or {}
    return [Row(name, plain(value)) for name, value in summary.items() if name not in known]


def _rows(run: Run, known: Known) -> Iterator[Row]:
    for name, label, write in known:
        value = (run.summary or {}).get(name)
        if value is not None and value != "":
            yield Row(label, _written(write, value))


def _written(write: Callable[[Any], str], value: Any) -> str:
    try:
        return write(value)
    except (TypeError, ValueError):
        return plain(value)


def samples(run: Run) -> list[Sample]:
    """Return what the model wrote, also of runs that wrote one function only."""
    summary = run.summary or {}
    listed = summary.get("samples")
    if isinstance(listed, list):
        return [
            Sample(*(str(entry.get(key) or "") for key in ("prompt", "text", "note")))
            for entry in listed
            if isinstance(entry, dict)
        ]
    if not isinstance(summary.get("generated"), str):
        return []
    seed, valid = summary.get("generated_seed"), summary.get("generated_is_valid_python")
    notes = [f"seed {seed}"] if seed is not None else []
    if valid is not None:
        notes.append("valid Python" if valid else "not valid Python")
    return [Sample(str(summary.get("prompt") or ""), summary["generated"], ", ".join(notes))]


def settings(run: Run) -> list[tuple[str, list[Row]]]:
    """Return the recipe by table. Keys outside any table come first, under an empty name."""
    recipe = run.recipe or {}
    loose = [Row(key, plain(value)) for key, value in recipe.items() if not isinstance(value, dict)]
    tables = [
        (name, [Row(key, plain(value)) for key, value in table.items()])
        for name, table in recipe.items()
        if isinstance(table, dict)
    ]
    return ([("", loose)] if loose else []) + [(name, rows) for name, rows in tables if rows]
