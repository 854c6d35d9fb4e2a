"""``--plan`` and ``--lazy-experts``: what is said before loading, and answers in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ziphius
from tests.checkpoint.limited import large_checkpoint, run_limited
from tests.cli.verbs import letters, refusal, ziphius_exits
from tests.support import random_model, tiny_config
from ziphius.cli.sizes import read_size
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.inference.llm import LLM
from ziphius.kernels.select import answering_kernels
from ziphius.model.precision import Precision

VOCABULARY = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    config = tiny_config(vocab_size=VOCABULARY)
    ziphius.save(random_model(config, precision=Precision.for_inference(torch.bfloat16)), folder)
    save_tokenizer(train_tokenizer(["whales dive"], VOCABULARY), folder)
    return folder


def test_a_plan_loads_and_answers_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("ziphius.inference.llm.load_in_place", refuse)
    assert ziphius_exits("generate", str(small), "--plan", "--cache-tokens", "64") == 0
    shown = capsys.readouterr().out
    for text in ("routed experts", "latent cache", "together", "fits", "load time", "64 tokens"):
        assert letters(text) in letters(shown)
    # A prompt may stay where it is in the command that is planned.
    assert ziphius_exits("generate", str(small), "whales", "--plan", "--memory", "100kB") == 0
    shown = capsys.readouterr().out
    assert letters("does not fit") in letters(shown)
    assert letters("as given") in letters(shown)


def test_lazy_experts_write_the_same(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["generate", str(small), "whales", "--max-tokens", "8", "--temperature", "1"]
    written = []
    for more in ([], ["--lazy-experts", "2 kB"], ["--lazy-experts", "auto"]):
        assert ziphius_exits(*how, "--stats", *more) == 0
        found = capsys.readouterr()
        written.append(found.out)
        assert ("experts: read" in found.err) == bool(more)
    assert written[0] == written[1] == written[2]
    assert ziphius_exits(*how, "--exact") == 0
    assert capsys.readouterr().out == written[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lazy-experts", "many"], "--lazy-experts many: no size: write bytes"),
        (["--plan", "--memory", "64 bits"], "--memory 64 bits: no size"),
        (["--memory", "1GiB"], "--memory is for --plan"),
        (["--plan", "--memory", "1kB", "--lazy-experts", "auto"], "without routed experts"),
        (["--plan", "--dtype", "int8"], "dtype"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], said: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "generate", str(small), "x", *options)


def test_sizes_are_read_as_they_are_written() -> None:
    sizes = {"12": 12, "1.5kB": 1500, "2 KiB": 2048, "3m": 3 * 2**20, "4GiB": 2**32, "1tb": 10**12}
    for text, size in sizes.items():
        assert read_size("--memory", text) == size
    assert read_size("--memory", "9" * 400 + "B") == int("9" * 400)
    for text in ("", "GiB", "-1", "1e3", "4 GiBs", "0x10"):
        with pytest.raises(BadInput, match="--memory"):
            read_size("--memory", text)


ANSWER = """
from ziphius.cli.app import run
from ziphius.inference.llm import LLM, choose_kernels
import rich.console, rich.progress
choose_kernels("auto")
limit(int(room))
sys.argv = ["ziphius", "generate", folder, "whales", "--cache-tokens", "64", "--max-tokens", "8"]
sys.argv += ["--lazy-experts", "auto", "--stats"] * (how == "lazy")
run()
"""


def test_a_command_answers_in_half_the_memory(tmp_path: Path, kernel_folder: Path) -> None:
    folder = tmp_path / "model"
    size = large_checkpoint(folder, VOCABULARY)
    save_tokenizer(train_tokenizer(["whales dive"], VOCABULARY), folder)
    # Beside experts the plan leaves room for a step of the most tokens.
    working = LLM.plan(folder, expert_bytes=0).working
    answering_kernels(kernel_folder)
    given = (folder, kernel_folder, size // 2 + working)
    lazy = run_limited(ANSWER, *given, "lazy")
    assert lazy.returncode == 0, lazy.stderr[-2000:]
    assert lazy.stdout.startswith("whales")
    assert "experts: read" in lazy.stderr
    whole = run_limited(ANSWER, *given, "whole")
    assert whole.returncode == 1
    assert whole.stderr.startswith("error: ")
