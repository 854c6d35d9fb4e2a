"""The combinations of a run that are proved against one process, as one table.

``tests/parallel/test_combos.py`` trains every row on the preset ``tiny``, as ``ziphius pretrain``
does, and ``docs/combinations.md`` is written from it (``python -m tests.combos``). A row is the
keys of [parallel], and which of a few problems it is given: those of one precision and one problem
share the run of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "combinations.md"
STEPS = 2


@dataclass(frozen=True)
class Problem:
    """What is trained, whoever does it: of ``rows`` rows, an uneven number for most layouts.

    In every layer expert 5 has 60 % of the tokens or more, and expert 2 none. With ``silent`` the
    last half of the experts has none: a rank of two in ``ep`` gets no tokens.
    """

    mtp: int = 1
    mask: bool = False
    silent: bool = False
    settings: tuple[str, ...] = ()
    rows: int = 9

    def overrides(self) -> list[str]:
        return [
            f"model.num_nextn_predict_layers={self.mtp}",
            f"data.document_mask={str(self.mask).lower()}",
            f"pretrain.batch_size={self.rows}",
            *self.settings,
        ]


ODD = tuple(f"{table}.vocab_size=509" for table in ("model", "tokenizer"))
PROBLEMS = {
    "odd": Problem(settings=ODD),
    "two": Problem(mtp=2, mask=True, silent=True, settings=ODD),
    "none": Problem(mtp=0, silent=True, settings=("pretrain.balance_loss_choices=real",)),
    "eight": Problem(settings=(*ODD, "model.n_group=8", "model.topk_group=4")),
}


@dataclass(frozen=True)
class Tolerance:
    """What a precision promises.

    ``error`` bounds how far every tensor may be from that of one process in the same precision, in
    units of its size, and the relative error of losses and of the gradients' norm; loads and
    biases are equal. Without it: see ``NARROW``.
    """

    said: str
    error: float | None = None


# Of precisions in which rounding decides what experts are chosen. How many times as far from one
# process in float64 as one process in the same precision is (weights and first moments, of all
# layers and experts together; second moments are squares, and so is their bound); and the relative
# error of losses and of the gradients' norm against that process.
BEYOND, LOSS, NORM = 1.5, 5e-3, 3e-2
NARROW = Tolerance(f"{BEYOND}x, losses {LOSS:g}")
TOLERANCES = {
    "float64": Tolerance("1e-9", 1e-9),
    "float32": Tolerance("5e-4", 5e-4),
    "bfloat16": NARROW,
    "fp8": NARROW,
}


@dataclass(frozen=True)
class Combo:
    """A row of the table."""

    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    problem: str = "odd"
    precision: str = "float64"

    @property
    def name(self) -> str:
        """Name the row as ``pytest -k`` takes it."""
        return "-".join([str(self.world), *_words(self.parallel), self.problem, self.precision])

    def overrides(self) -> list[str]:
        keys = [f"parallel.{key}={_toml(value)}" for key, value in self.parallel.items()]
        return [*keys, *problem_overrides(self.problem, self.precision)]


def problem_overrides(problem: str, precision: str) -> list[str]:
    """Return the settings of a run of one process."""
    return [
        *("run.threads=1", "run.kernels=torch", "run.products=native"),
        *("pretrain.sequence_length=16", "pretrain.micro_batch_size=3"),
        *("pretrain.balance_loss_weight=0.01", "pretrain.clip_norm=0.5"),
        "pretrain.moments=float32",
        f"precision.compute={precision}",
        *PROBLEMS[problem].overrides(),
    ]


def _words(parallel: dict[str, Any]) -> list[str]:
    plain = ("schedule", "sharding", "recompute")
    words = [str(v) if k in plain else f"{k}{v}" for k, v in parallel.items()]
    return [word.replace("|", "") for word in words]


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _two() -> Iterator[Combo]:
    yield Combo(2, {})
    yield Combo(2, {"ep": 2, "chunks": 2}, "two")
    yield Combo(2, {"ep": 2, "ranks_per_node": 1, "chunks": 3})
    yield Combo(2, {"sharding": "fsdp"}, "none")
    yield Combo(2, {"sharding": "fsdp", "ep": 2, "recompute": "selective"}, "two")
    yield Combo(2, {"cp": 2, "recompute": "full"})
    yield Combo(2, {"tp": 2}, "two")
    yield Combo(2, {"pp": 2, "schedule": "1f1b", "layout": "3|1"})
    yield Combo(2, {"pp": 2, "schedule": "interleaved"}, "two")
    yield Combo(2, {"pp": 2, "schedule": "zb1p", "recompute": "selective"}, "none")
    yield Combo(2, {"pp": 2, "schedule": "zbv", "layout": "0|2|2|0"})
    yield Combo(2, {"pp": 2, "schedule": "dualpipe", "recompute": "full"}, "two")
    yield Combo(2, {"pp": 2, "schedule": "dualpipev"})


def _four() -> Iterator[Combo]:
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "dualpipe", "chunks": 2})
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "zb1p", "ranks_per_node": 1}, "two")
    yield Combo(4, {"pp": 2, "tp": 2, "schedule": "1f1b"}, "two")
    yield Combo(4, {"pp": 2, "cp": 2, "schedule": "interleaved", "recompute": "selective"}, "two")
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "dualpipev", "recompute": "full"}, "none")
    yield Combo(4, {"pp": 2, "tp": 2, "schedule": "zbv"})
    yield Combo(4, {"pp": 4, "schedule": "1f1b"})
    yield Combo(4, {"pp": 4, "schedule": "zb1p", "recompute": "selective"}, "two")
    yield Combo(4, {"pp": 4, "schedule": "dualpipe", "layout": "0|2|2|0"})
    yield Combo(4, {"ep": 4, "ranks_per_node": 2, "chunks": 2})
    yield Combo(4, {"ep": 2, "dp_replicate": 2}, "two")
    yield Combo(4, {"sharding": "hsdp", "dp_replicate": 2, "ep": 2})
    yield Combo(4, {"sharding": "fsdp", "cp": 2, "ep": 4, "ranks_per_node": 2}, "two")
    yield Combo(4, {"cp": 2, "tp": 2, "ep": 2}, "two")
    yield Combo(4, {"tp": 2, "ep": 2, "recompute": "full"})
    yield Combo(4, {"cp": 2, "ep": 4, "ranks_per_node": 1, "chunks": 2}, "none")


def _eight() -> Iterator[Combo]:
    yield Combo(8, {"ep": 8, "ranks_per_node": 1}, "eight")
    yield Combo(8, {"pp": 2, "ep": 2, "tp": 2, "schedule": "dualpipe"}, "two")
    yield Combo(8, {"pp": 4, "ep": 2, "schedule": "dualpipe", "recompute": "selective"})
    yield Combo(8, {"pp": 2, "cp": 2, "tp": 2, "ep": 2, "schedule": "zbv"})
    yield Combo(8, {"sharding": "hsdp", "dp_replicate": 2, "cp": 2, "ep": 4, "ranks_per_node": 2})


def _narrow() -> Iterator[Combo]:
    selective = {"recompute": "selective"}
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "dualpipe"}, "two", "float32")
    yield Combo(2, {"sharding": "fsdp", "ep": 2}, "odd", "float32")
    yield Combo(4, {"cp": 2, "tp": 2, "ep": 2}, "odd", "float32")
    yield Combo(2, {"ep": 2, "chunks": 2}, "odd", "bfloat16")
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "dualpipe", **selective}, "two", "bfloat16")
    yield Combo(4, {"sharding": "hsdp", "dp_replicate": 2}, "odd", "bfloat16")
    yield Combo(2, {"ep": 2, "ranks_per_node": 1}, "odd", "fp8")
    yield Combo(4, {"pp": 2, "ep": 2, "schedule": "dualpipe", **selective}, "two", "fp8")
    yield Combo(2, {"tp": 2}, "odd", "fp8")
    yield Combo(2, {"cp": 2, "recompute": "full"}, "two", "fp8")
    yield Combo(2, {"sharding": "fsdp", "ep": 2}, "odd", "fp8")


COMBOS = [*_two(), *_four(), *_eight(), *_narrow()]


@dataclass(frozen=True)
class Refusal:
    """What cannot work, and the end of the line that says what can."""

    world: int
    parallel: dict[str, Any]
    nearest: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([str(self.world), *_words(self.parallel), *self.settings])

    @property
    def keys(self) -> str:
        """What is asked for, as ``--set`` takes it without its table."""
        return " ".join(
            [*(f"{key}={value}" for key, value in self.parallel.items()), *self.settings]
        )

    def overrides(self) -> list[str]:
        return [*Combo(self.world, self.parallel).overrides(), *self.settings]


REFUSALS = [
    Refusal(2, {"pp": 2, "sharding": "fsdp"}, "use 'zero1', or pp = 1"),
    Refusal(2, {"tp": 2, "sharding": "fsdp"}, "use 'zero1', or tp = 1"),
    Refusal(4, {"dp_replicate": 2, "sharding": "fsdp"}, "use 'hsdp', or dp_replicate = 1"),
    Refusal(2, {"sharding": "hsdp"}, "use 'fsdp', or dp_replicate = 2 or more"),
    Refusal(2, {"dp_replicate": 2, "sharding": "hsdp"}, "use 'zero1', or a smaller dp_replicate"),
    Refusal(3, {"pp": 3, "schedule": "dualpipe"}, "use 2 or 4 ranks, or 'dualpipev'"),
    Refusal(4, {"pp": 3}, "start 3 of them"),
    Refusal(
        4,
        {"pp": 4, "schedule": "zbv"},
        "use a smaller parallel.pp, or a schedule of fewer stages a rank",
    ),
    Refusal(3, {"pp": 3, "schedule": "interleaved"}, "as in '0|1|1|1|1|0'"),
    Refusal(2, {"pp": 2, "layout": "3|2"}, "as in '2|2'"),
    Refusal(2, {"pp": 2, "schedule": "interleaved", "layout": "2|1|1"}, "use 4"),
    Refusal(4, {"ep": 3}, "use 2"),
    Refusal(3, {"ep": 3}, "does not divide 32 slots of experts: use 1"),
    Refusal(4, {"ep": 4, "ranks_per_node": 3}, "let ranks_per_node be a multiple of ep"),
    Refusal(8, {"ep": 8, "ranks_per_node": 1}, "use 4 nodes"),
    Refusal(3, {"tp": 3}, "use 2"),
    Refusal(4, {"cp": 2, "tp": 2}, "8 or more", ("pretrain.sequence_length=6",)),
    Refusal(4, {}, "at most 3 ranks share a batch", ("pretrain.batch_size=3",)),
]


# --- the page -------------------------------------------------------------------------------------

_HEAD = """\
# Combinations

What may be combined, written from `tests/combos.py` by `python -m tests.combos`; a test holds this
page to the table. Each of the {number} rows is the preset `tiny`, with rows of 16 tokens, trained
for {steps} steps as `ziphius pretrain` does, by processes over gloo on a processor. In every layer
one expert has 60 % of the tokens or more and one has none; the nine rows of a batch are an uneven
number for most layouts. Compared with one process: losses, loads, the gradients' norm, every number
of the weights and of both moments, each at every rank that holds it, and the routing biases, which
are the same on all ranks. No row of this table has run on GPUs.

Problems: `odd` has a vocabulary of 509; `two` this and two MTP modules, documents that do not see
each other, and half of the experts without a token, so that ranks get none; `none` has no MTP
module, tiny's own vocabulary of 4,096, and ranks without tokens; `eight` is `odd` with eight
routing groups, of which a token may use four.

| processes | axes | schedule | sharding | problem | MTP | precision | recompute | tolerance |
|---|---|---|---|---|---|---|---|---|
"""
_TOLERANCES = """
**Tolerances.** In float64 nothing differs but the order of sums: every tensor is within 1e-9 of its
size, losses and norms within 1e-9, loads and biases are equal. float32 differs in the same way, and
AdamW divides by the size of a gradient; loads and biases are equal still. In bfloat16 and FP8 a
product of another number of rows rounds otherwise, and from the second step on other experts are
chosen for some tokens. So there every kind of tensor may be {beyond} times as far from float64 as
one process in the same precision is (second moments, which are squares, {square:g} times), losses
are within {loss:g} of that process and the gradients' norm within {norm:g}; and what travels in FP8
is held to the bit elsewhere (`tests/parallel/test_experts.py`).

## What is refused

In one line, on every rank, before the first step is made. The line ends with what can be instead:

| processes | keys | the line says |
|---|---|---|
"""


def page() -> str:
    """Write the page."""
    numbers = {"number": len(COMBOS), "steps": STEPS, "beyond": BEYOND, "square": BEYOND**2}
    rows = "".join(_row(combo) for combo in COMBOS)
    refused = "".join(f"| {r.world} | {_code(r.keys)} | {_cell(r.nearest)} |\n" for r in REFUSALS)
    text = _HEAD + "{rows}" + _TOLERANCES + "{refused}"
    return text.format(rows=rows, refused=refused, loss=LOSS, norm=NORM, **numbers)


def _row(combo: Combo) -> str:
    axes = ("pp", "dp_replicate", "cp", "tp", "ep", "ranks_per_node", "chunks")
    keys = combo.parallel
    schedule = " ".join(str(keys[key]) for key in ("schedule", "layout") if key in keys)
    cells = (
        str(combo.world),
        _code(" ".join(f"{key}={keys[key]}" for key in axes if key in keys)),
        _cell(schedule),
        keys.get("sharding", "zero1"),
        combo.problem,
        str(PROBLEMS[combo.problem].mtp),
        combo.precision,
        keys.get("recompute", "none"),
        TOLERANCES[combo.precision].said,
    )
    return f"| {' | '.join(cells)} |\n"


def _code(keys: str) -> str:
    return f"`{_cell(keys)}`" if keys else "data parallel"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
