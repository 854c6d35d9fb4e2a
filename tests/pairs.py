"""Every two features of the engine at once: what holds alone holds together.

    python -m tests.pairs            run all pairs and print the table
    python -m tests.pairs --write    and write it into docs/inference.md

Exit code 1 when a pair fails. A pair fails, too, when a feature that is on does not take place.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ziphius
from tests.support import F32, random_model, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.in_place import load_in_place
from ziphius.data.tokenizer import train_tokenizer
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.llm import choose_kernels
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.vocabulary import Vocabulary
from ziphius.kernels.select import has_compiler, torch_products
from ziphius.kernels.stored import Codes
from ziphius.model.transformer import Transformer

DOCS = Path(__file__).parents[1] / "docs" / "inference.md"
START, END = "<!-- python -m tests.pairs --write -->\n", "<!-- end -->\n"

# Widths that every form of weights takes as codes.
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32,
    "num_hidden_layers": 2, "vocab_size": 290,
}  # fmt: skip
# Three prompts that begin with the same page and end just before one is full.
PROMPTS = [[*(3 + (7 * p * p) % 283 for p in range(40)), *(50 * n + p for p in range(20))]
           for n in range(3)]  # fmt: skip
PLAIN: Mapping[str, Any] = {"speculation": "off", "prefix_cache": False, "cache_tokens": 2048}
# Of few tokens many drafts are right.
GREEDY: Mapping[str, Any] = {
    "temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0,
    "allowed_token_ids": [40, 80, 90],
}  # fmt: skip
REGEX = r'\{"name": "[a-z]{3,9}", "depth": [1-9][0-9]{1,6}\}'
CLOSE = 1e-3  # of log-probabilities in FP32 whose sums have other orders


@dataclass
class Run:
    """Three requests that an engine has answered, the second and third while the first went on."""

    world: World
    weights: str
    engine: Engine
    requests: list[Request] = field(default_factory=list)
    cut: bool = False  # whether a step ended inside a prompt

    def step(self) -> None:
        """Compute a step and look at what it left."""
        self.engine.step()
        self.engine.scheduler.check()
        for request in self.requests:
            self.cut |= any(0 < s.computed < s.prompt_length for s in request.sequences)

    @property
    def outputs(self) -> list[Any]:
        """All answers of all requests."""
        return [output for request in self.requests for output in request.result().outputs]


@dataclass(frozen=True)
class Feature:
    """What turns a feature on, and how to see that it took place.

    ``params`` define the answer, ``first`` are for the first request alone. ``kind``: of one kind
    only one feature can be on.
    """

    name: str
    happened: Callable[[Run], bool]
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    first: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    kind: str = ""


def _drafted(run: Run) -> bool:
    drafted = sum(request.drafted for request in run.requests)
    return 0 < sum(request.accepted for request in run.requests) < drafted


def _constrained(run: Run) -> bool:
    """Whether every answer is of the grammar, and none would be without it."""
    for number, request in enumerate(run.requests):
        free = SamplingParams(**{**vars(request.params), "regex": None})
        unbound = run.world.alone(run.weights, number, free).result().outputs
        if any(re.fullmatch(REGEX, output.text) for output in unbound):
            return False
    texts = [output.text for output in run.outputs]
    return all(re.fullmatch(REGEX, text) and len(json.loads(text)) == 2 for text in texts)


def _coded(form: str) -> Callable[[Run], bool]:
    def coded(run: Run) -> bool:
        weight: object = run.engine.model.layers[0].self_attn.o_proj.weight
        return isinstance(weight, Codes) and weight.form == form

    return coded


def _several(run: Run) -> bool:
    several = [{answer.token_ids for answer in r.result().outputs} for r in run.requests]
    return run.engine.stats().forks > 0 and all(len(answers) > 1 for answers in several)


def _reported(run: Run) -> bool:
    known = run.requests[0].result().prompt_logprobs
    prompt = known is not None and [s and len(s.top) for s in known] == [None, *[2] * 59]
    return prompt and all(len(s.top) == 3 for output in run.outputs for s in output.logprobs)


def _sampled(run: Run) -> bool:
    return any(s.rank > 1 for output in run.outputs for s in output.logprobs)


def _fast(run: Run) -> bool:
    return run.engine.model.kernels != run.world.model(run.weights).kernels


DRAFTS = {"speculation": "on", "draft_depth": 2}
FEATURES = (
    Feature(
        "prefix cache",
        lambda run: run.engine.stats().prefix_hits > 0,
        options={"prefix_cache": True},
    ),
    Feature("chunked prefill", lambda run: run.cut, options={"prefill_chunk": 16}),
    Feature("drafts, coupled", _drafted, options=DRAFTS, kind="drafts"),
    Feature(
        "drafts, rejection",
        _drafted,
        options={**DRAFTS, "verification": "rejection"},
        kind="drafts",
    ),
    Feature(
        "grammar",
        _constrained,
        params={"regex": REGEX, "allowed_token_ids": None, "ignore_eos": False, "max_tokens": 50},
    ),
    *(
        Feature(form.upper(), _coded(form), weights=form, kind="weights")
        for form in ("int8", "int4", "fp8")
    ),
    Feature(
        "preemption",
        lambda run: run.engine.stats().preemptions > 0,
        options={"cache_tokens": 192},
    ),
    Feature("n > 1", _several, params={"n": 3, "temperature": 0.8}),
    # Who asks for its prompt's needs every position's logits: it finds no prefix, others do.
    Feature("logprobs", _reported, params={"logprobs": 3}, first={"prompt_logprobs": 2}),
    Feature("sampling", _sampled, params={"temperature": 1.2, "top_p": 0.95}),
    Feature("fast math", _fast, options={"exact": False}),
)
Pair = tuple[Feature, Feature]
PAIRS: Sequence[Pair] = [
    (a, b)
    for a, b in combinations_with_replacement(FEATURES, 2)
    if a is b or not a.kind or a.kind != b.kind
]


class World:
    """Models, and what each answers to each request alone: made when first asked for."""

    def __init__(self, folder: Path, kernel_folder: Path | None) -> None:
        """Keep checkpoints in ``folder``. Without ``kernel_folder`` torch's kernels answer."""
        self.folder, self.kernel_folder = folder, kernel_folder
        self.vocabulary = Vocabulary(train_tokenizer(["whale"], WIDTHS["vocab_size"]))
        self._models: dict[tuple[str, bool], Transformer] = {}
        self._alone: dict[str, Request] = {}

    def model(self, weights: str, *, exact: bool = True) -> Transformer:
        """Return the model with its weights stored as fp32, int8, int4 or fp8."""
        if (weights, exact) not in self._models:
            if not (self.folder / weights).exists():
                self._store(weights)
            name = "torch" if self.kernel_folder is None else "compiled"
            kernels = choose_kernels(name, self.kernel_folder, exact=exact)
            if not exact and self.kernel_folder is not None:
                kernels = torch_products(self.kernel_folder)
            loaded = load_in_place(self.folder / weights, kernels, torch.float32)
            self._models[weights, exact] = loaded.model
        return self._models[weights, exact]

    def _store(self, weights: str) -> None:
        if weights == "fp32":
            model = random_model(tiny_config(**WIDTHS), precision=F32, seed=3)
            ziphius.save(model, self.folder / weights)
        else:
            self.model("fp32")
            convert(self.folder / "fp32", self.folder / weights, weights, group_size=32)

    def alone(self, weights: str, number: int, params: SamplingParams) -> Request:
        """Answer a request by itself, one answer after the other, everything else off."""
        key = f"{weights} {number} {params}"
        if key not in self._alone:
            engine = self.engine(weights, {"max_running": 1})
            self._alone[key] = engine.add(PROMPTS[number], params)
            _finish(engine)
        return self._alone[key]

    def scored(self, weights: str, request: Request) -> list[float]:
        """Return the log-probability of every token of all answers, read as prompts."""
        engine, prompt = self.engine(weights), list(request.prompt_ids)
        params = SamplingParams(prompt_logprobs=0)
        readings = [
            engine.add([*prompt, *answer.output], params, score_only=True)
            for answer in request.answers
        ]
        _finish(engine)
        return [s.logprob for r in readings for s in r.prompt_logprobs[len(prompt) :] if s]

    def engine(self, weights: str, options: Mapping[str, Any] | None = None) -> Engine:
        """Make an engine with everything off but ``options``."""
        chosen = EngineOptions(**{**PLAIN, **(options or {})})
        return Engine(self.model(weights, exact=chosen.exact), self.vocabulary, chosen)

    def run(self, *features: Feature) -> Run:
        """Answer the three requests with features on. Raises AssertionError for a lost page."""
        weights = next((f.weights for f in features if f.weights != "fp32"), "fp32")
        options = {k: v for f in features for k, v in f.options.items()}
        engine = self.engine(weights, options)
        free = engine.pool.free
        run = Run(self, weights, engine)
        for number, prompt in enumerate(PROMPTS):
            run.requests.append(engine.add(prompt, _params(number, features)))
            # The others come when the first has its prompt computed.
            while number == 0 and not (run.requests[0].answers[0].output or engine.idle):
                run.step()
        while not engine.idle:
            run.step()
        assert engine.pool.free == free, "pages are lost"
        engine.pool.check([])
        return run


def _params(number: int, features: Sequence[Feature]) -> SamplingParams:
    chosen = {**GREEDY, "seed": number}
    for feature in features:
        chosen |= feature.params
        if number == 0:
            chosen |= feature.first
    return SamplingParams(**chosen)


def _finish(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


# --- what must hold -------------------------------------------------------------------------------


def same(run: Run) -> None:
    """Tokens and everything that is told of them are those of the requests alone, bit for bit."""
    for number, request in enumerate(run.requests):
        own = run.world.alone(run.weights, number, request.params).result()
        found = request.result()
        assert found.outputs == own.outputs, f"request {number} has other answers than alone"
        assert found.prompt_logprobs == own.prompt_logprobs, f"request {number}: its prompt's"


def drawn(run: Run) -> None:
    """Tokens may differ from those alone; their log-probabilities are the model's, bit for bit."""
    _compare(run, 0.0)


def close(run: Run) -> None:
    """As ``drawn``, up to the order of sums."""
    _compare(run, CLOSE)


def _compare(run: Run, tolerance: float) -> None:
    for number, request in enumerate(run.requests):
        own = run.world.alone(run.weights, number, request.params).result()
        found = [s.logprob for s in request.result().prompt_logprobs or () if s]
        expected = [s.logprob for s in own.prompt_logprobs or () if s]
        for answer in request.answers:
            found += [s.logprob for s in answer.logprobs]
        expected += run.world.scored(run.weights, request)
        message = f"request {number}: the model has other log-probabilities for these tokens"
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=message)


MARKS = {same: "=", drawn: "p", close: "≈"}
FAILED = "fails"


def law(*features: Feature) -> Callable[[Run], None]:
    """Return what must hold where these features are on."""
    names = {feature.name for feature in features}
    if "fast math" in names:
        return close
    sampled = any(feature.params.get("temperature", 0) for feature in features)
    return drawn if sampled and "drafts, rejection" in names else same


def check(world: World, *features: Feature) -> str:
    """Run features together; return the mark of what held. Raises AssertionError if it did not."""
    run = world.run(*features)
    for request in run.requests:
        errors = [answer.error for answer in request.answers if answer.error]
        assert not errors, errors[0]
    for feature in features:
        assert feature.happened(run), f"{feature.name} did not take place"
    must = law(*features)
    must(run)
    return MARKS[must]


# --- the table ------------------------------------------------------------------------------------


def table(marks: Mapping[tuple[str, str], str]) -> str:
    """Return the matrix in Markdown. ``marks`` are by the names of features, in their order."""
    names = [feature.name for feature in FEATURES]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names)]
    for row, name in enumerate(names):
        cells = [marks.get((names[min(row, c)], names[max(row, c)]), "") for c in range(len(names))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def documented() -> str:
    """Return the table in the documentation."""
    return DOCS.read_text("utf-8").split(START)[1].split(END)[0]


def read(text: str) -> dict[tuple[str, str], str]:
    """Return the marks of a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    names = rows[0][1:]
    return {
        (names[min(r, c)], names[max(r, c)]): cell
        for r, row in enumerate(rows[2:])
        for c, cell in enumerate(row[1:])
        if cell
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all pairs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into the docs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    marks = {}
    kernels = Path("~/.cache/ziphius").expanduser() if has_compiler() else None
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), kernels)
        for a, b in PAIRS:
            try:
                marks[a.name, b.name] = check(world, a, b)
            except AssertionError as error:
                marks[a.name, b.name] = FAILED
                print(f"{a.name} with {b.name}: {error}", file=sys.stderr)
    print(table(marks))
    if options.write:
        before, behind = DOCS.read_text("utf-8").split(START + documented() + END)
        DOCS.write_text(before + START + table(marks) + END + behind, "utf-8")
    return int(FAILED in marks.values())


if __name__ == "__main__":
    sys.exit(main())
