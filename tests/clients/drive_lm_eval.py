"""``lm_eval``: what it reads from the server is what ``LLM`` says here, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.results import ROOT
from tests.clients.session import Session
from ziphius.inference.params import SamplingParams

TASKS = ROOT / "tests" / "clients" / "tasks"
DATA = "choice.jsonl"
# The tokenizer in its own process, and requests one by one; the server's, and eight prompts each.
WAYS = (("huggingface", 1), ("remote", 8))


class Ask(NamedTuple):
    """A request of the harness, and what it made of the answer."""

    arguments: tuple[Any, ...]
    answer: Any


def drive(session: Session) -> None:
    """Run a task of choices and a task of writing in every way, and compare."""
    expected = Expected(session.checkpoint)
    _write_tasks(session.scratch, expected)
    for backend, batch in WAYS:
        out = session.scratch / f"{backend}-{batch}"
        done = session.run(_command(session, out, backend, batch), log=f"{out.name}.log",
                           HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="any",
                           HF_HOME=str(session.scratch / "cache"))  # fmt: skip
        way = f"{backend} tokenizer, batches of {batch}"
        if done.returncode:
            session.result.add(way, " / ".join(done.stderr.strip().splitlines()[-2:]))
            continue
        choices = list(_asked(out, "ziphius_choice"))
        texts = list(_asked(out, "ziphius_write"))
        session.result.add(f"{way}: log-likelihoods are LLM.score's", _scores(expected, choices))
        session.result.add(f"{way}: texts are LLM.generate's", _texts(expected, texts))


def _command(session: Session, out: Path, backend: str, batch: int) -> list[str]:
    arguments = {
        "model": session.case.model,
        "base_url": f"{session.case.url}/v1/completions",
        "tokenizer_backend": backend,
        "tokenized_requests": "True",
        "num_concurrent": "2",
        "max_length": "256",
    }
    if backend == "huggingface":
        arguments["tokenizer"] = str(tokenizer_folder(session.checkpoint))
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    return [
        session.tool("lm_eval"), "run", "--model", "local-completions", "--model_args", given,
        "--tasks", "ziphius_choice,ziphius_write", "--include_path", str(session.scratch),
        "--batch_size", str(batch), "--log_samples", "--output_path", str(out),
    ]  # fmt: skip


def _write_tasks(folder: Path, expected: Expected) -> None:
    """Write the tasks with one more choice a question: what the model itself would say.

    So that some continuations are greedy, whatever the model has learnt.
    """
    rows = [json.loads(line) for line in (TASKS / DATA).read_text("utf-8").splitlines()]
    for row in rows:
        if (likeliest := expected.likeliest(f"{row['question']}\nAnswer:")) is not None:
            row["choices"].append(likeliest)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / DATA).write_text(lines, "utf-8")
    for task in TASKS.glob("*.yaml"):
        text = task.read_text("utf-8").replace(DATA, str(folder / DATA))
        (folder / task.name).write_text(text, "utf-8")


def tokenizer_folder(checkpoint: Path) -> Path:
    """Return the folder that has a checkpoint's tokenizer and configuration."""
    from ziphius.checkpoint.folder import checkpoint_folder

    return checkpoint_folder(checkpoint)


def _asked(out: Path, task: str) -> Iterator[Ask]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    for line in file.read_text("utf-8").splitlines():
        sample = json.loads(line)
        for place, answers in enumerate(sample["resps"]):
            given = sample["arguments"][f"gen_args_{place}"]
            yield Ask(tuple(given[f"arg_{n}"] for n in range(len(given))), answers[0])


class Expected:
    """The checkpoint in this process."""

    def __init__(self, checkpoint: Path) -> None:
        from ziphius.inference.llm import LLM

        self._llm = LLM(checkpoint)

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether each token is the likeliest.

        The harness cuts both texts together and counts the context's tokens alone; blanks at the
        context's end belong to the continuation.
        """
        kept = context.rstrip()
        before = len(self._tokens(kept))
        ids = self._tokens(context + continuation)
        (output,) = self._llm.score([ids])
        assert output.prompt_logprobs is not None
        scored = output.prompt_logprobs[before:]
        total = 0
        for one in scored:  # in the harness's order: sums of floats depend on it
            assert one is not None
            total += one.logprob  # type: ignore[assignment]
        return total, all(one is not None and one.rank == 1 for one in scored)

    def likeliest(self, context: str) -> str | None:
        """Return the likeliest token's text, where it is cut to that token behind the context."""
        ids = self._tokens(context)
        (output,) = self._llm.generate([ids], SamplingParams(temperature=0, max_tokens=1))
        answer = output.outputs[0]
        whole = self._tokens(context + answer.text)
        blank = not answer.text.strip()
        return None if blank or whole != [*ids, *answer.token_ids] else answer.text

    def write(self, context: str, options: dict[str, Any]) -> str:
        """Return the greedy answer, up to a text that ends it."""
        params = SamplingParams(
            temperature=0, max_tokens=options["max_gen_toks"], stop=options["until"]
        )
        (output,) = self._llm.generate([self._tokens(context)], params)
        return output.outputs[0].text

    def _tokens(self, text: str) -> list[int]:
        assert self._llm.tokenizer is not None
        return list(self._llm.tokenizer.encode(text, add_special_tokens=False).ids)


def _scores(expected: Expected, asks: list[Ask]) -> str:
    """Say what differs. The harness writes floats as Python does: they come back the same."""
    if len(asks) < 30:
        return f"only {len(asks)} requests"
    greedy = 0
    for (context, continuation), (told, told_greedy) in asks:
        total, likeliest = expected.score(context, continuation)
        greedy += likeliest
        if float(told) != total or (str(told_greedy) == "True") != likeliest:
            return f"{continuation!r}: {told}, {told_greedy} instead of {total!r}, {likeliest}"
    return "" if 0 < greedy < len(asks) else f"{greedy} of {len(asks)} are greedy: nothing is shown"


def _texts(expected: Expected, asks: list[Ask]) -> str:
    if not asks:
        return "no requests"
    for (context, options), told in asks:
        if told != (text := expected.write(context, options)):
            return f"{context[:30]!r}: {told!r} instead of {text!r}"
    return ""
