"""``ziphius convert`` to quantised forms: what it says, and which options it refuses."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.published import change, read_all
from tests.checkpoint.test_interoperability import CONFIG as WHOLE
from tests.cli.launch import Command, advised
from tests.cli.verbs import refusal, ziphius_exits
from tests.support import random_model
from ziphius.checkpoint import convert as module
from ziphius.checkpoint.huggingface import load, save
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer

TEXT = "".join(f"def name_{n % 7}(x):\n    return x + {n % 5}\n\n" for n in range(60))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    save(random_model(vocab_size=300), folder / "source")
    save_tokenizer(train_tokenizer([TEXT], 300), folder / "source")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder / "source"


@pytest.mark.parametrize("to", ["fp8", "int8", "int4"])
def test_every_form_is_written_and_opens(
    source: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ziphius_exits("convert", str(source), str(tmp_path / to), "--to", to) == 0
    shown = capsys.readouterr().out
    assert "tensors used, 0 ignored" in shown
    assert ("only this package reads them" in shown) == (to != "fp8")
    load(tmp_path / to)


def test_gptq_with_every_option(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(source.parent / "text.txt")
    arguments = ["--to", "int4", "--method", "gptq", "--calibration", text, "--group-size", "1"]
    more = ["--act-order", "--damping", "0.05", "--calibration-tokens", "200", "--without-mtp"]
    target = tmp_path / "gptq"
    assert ziphius_exits("convert", str(source), str(target), *arguments, *more) == 0
    shown = capsys.readouterr().out
    record = json.loads((target / "config.json").read_text())["ziphius_quantization"]
    assert record["method"] == "gptq"
    assert (record["act_order"], record["damping"], record["tokens"]) == (True, 0.05, 200)
    assert f"{record['experts_rounded']} of 16 experts were rounded" in shown
    assert "other engines" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "int4", "--method", "gtpq"], "did you mean 'gptq'"),
        (["--to", "int4", "--method", "gptq"], "needs --calibration FILE"),
        (["--to", "int4", "--damping", "0.1"], "--damping is for --method gptq"),
        (["--to", "int4", "--act-order"], "--act-order is for --method gptq"),
        (["--to", "fp8", "--group-size", "64"], "--group-size is for --to int8 and --to int4"),
        (["--to", "bf16", "--method", "gptq"], "--method is for"),
        (["--to", "int4", "--group-size", "0"], "group size 0"),
        (["--to", "int3"], "did you mean"),
        (["--to", "int8", "--check"], "--check is for --to bf16 and --to fp32 and --to fp8"),
        (["--to", "bf16", "--scales", "ue8m0"], "--scales is for --to fp8, not for --to bf16"),
        (["--to", "fp8", "--scales", "ue8m"], "did you mean 'ue8m0'"),
        (["--to", "fp8", "--memory", "much"], "--memory much: no size"),
        (["--to", "fp8", "--memory", "100MB"], "MiB are too little: the program itself holds"),
        (
            ["--to", "int8", "--method", "gptq", "--calibration", "x", "--memory", "9G"],
            "--memory does not bound --method gptq",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(
    source: Path, tmp_path: Path, arguments: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = tmp_path / "target"
    assert said in refusal(capsys, "convert", str(source), str(target), *arguments)
    assert not target.exists()


def test_bad_gptq_input_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(source), str(tmp_path / "x"), "--to", "int8", "--method", "gptq"]
    said = refusal(capsys, *arguments, "--calibration", str(tmp_path / "absent"))
    assert "cannot be read" in said
    text = str(source.parent / "text.txt")
    said = refusal(capsys, *arguments, "--calibration", text, "--damping", "-1")
    assert "damping = -1.0" in said


# The proof


def test_a_conversion_is_proved_and_a_finished_one_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "fp8"
    arguments = ["convert", str(source), str(target), "--to", "fp8", "--check", "--memory", "9GB"]
    assert ziphius_exits(*arguments, "--scales", "ue8m0") == 0
    shown = capsys.readouterr().out
    assert "tensors used, 0 ignored" in shown
    assert "converting ..." in shown
    assert "FP8 blocks │     104" in shown
    assert "5.882%" in shown
    assert "worst, FP8 blocks: model.layers." in shown
    assert "proved: all 135 tensors" in shown
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert ziphius_exits(*arguments) == 0
    shown = capsys.readouterr().out
    assert "converting" not in shown
    assert "proved: all 135 tensors" in shown
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    said = refusal(capsys, "convert", str(source), str(target), "--check")
    assert "is stored as fp8, not as bf16: give --to fp8" in said


def test_a_conversion_that_is_wrong_fails_with_its_worst_tensor(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "fp8"
    arguments = ["convert", str(source), str(target), "--to", "fp8"]
    assert ziphius_exits(*arguments) == 0
    name = "model.layers.1.self_attn.o_proj.weight"
    scale = read_all(target)[f"{name}_scale_inv"]
    change(target, {f"{name}_scale_inv": scale * 2})
    capsys.readouterr()
    assert ziphius_exits(*arguments, "--check") == 1
    shown = capsys.readouterr()
    assert f"1 of 135 tensors are not what {source} converts to: {name}: " in shown.err
    assert "convert again" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert f"worst, FP8 blocks: {name}" in shown.out
    assert "proved" not in shown.out


# What is said about matrices that others do not read


def test_ragged_blocks_are_said_and_whole_ones_are_not(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ziphius_exits("convert", str(source), str(tmp_path / "fp8"), "--to", "fp8") == 0
    shown = capsys.readouterr().out
    assert "104 matrices (model.layers.0.self_attn.q_a_proj.weight [14, 24] and so on)" in shown
    assert "no multiple of 128" in shown
    assert "transformers refuses" in shown
    save(random_model(WHOLE), tmp_path / "whole")
    assert (
        ziphius_exits("convert", str(tmp_path / "whole"), str(tmp_path / "b"), "--to", "fp8") == 0
    )
    assert "multiple of 128" not in capsys.readouterr().out


# Ctrl-C


def small_shards() -> None:
    """Write files of 50 kB, and wait in the sixth."""
    plain_convert, plain_put = module.convert, module.PieceWriter.put

    def convert(*args: Any, **named: Any) -> Any:
        return plain_convert(*args, **named, max_shard_bytes=50_000)

    def put(self: module.PieceWriter, *args: Any) -> None:
        if "model-00006-" in str(self._file.name):
            print("waiting", flush=True)
            time.sleep(0.2)
        plain_put(self, *args)

    module.convert, module.PieceWriter.put = convert, put  # type: ignore[assignment,method-assign]


def test_ctrl_c_says_what_is_kept_and_the_command_it_names_goes_on(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "a folder"
    command = Command(
        *("convert", str(source), str(target), "--to", "fp32"),
        logs=tmp_path / "logs",
        patch=small_shards,
    )
    command.until(lambda: "waiting" in command.shown())
    command.signal(signal.SIGINT)
    line = command.line(130)
    kept = tmp_path / ".a folder.converting"
    assert line.startswith(f"stopped; 5 finished file(s) are kept in {kept}; go on with: ")
    inodes = {path.stat().st_ino for path in kept.glob("*.safetensors")}
    assert len(inodes) == 5
    again = Command(*advised(line), logs=tmp_path / "logs", patch=small_shards)
    assert again.code() == 0, again.error()
    assert inodes < {path.stat().st_ino for path in target.glob("*.safetensors")}
    assert not kept.exists()
    load(target)


def test_ctrl_c_before_the_first_file_leaves_nothing(source: Path, tmp_path: Path) -> None:
    command = Command(
        *("convert", str(source), str(tmp_path / "new" / "target"), "--to", "fp8"),
        logs=tmp_path / "logs",
        patch=waiting_at_once,
    )
    command.until(lambda: "waiting" in command.shown())
    command.signal(signal.SIGINT)
    assert command.line(130) == "stopped"
    assert list((tmp_path / "new").iterdir()) == []


def waiting_at_once() -> None:
    """Wait before the first number is written."""

    def put(*_: Any) -> None:
        print("waiting", flush=True)
        time.sleep(600)

    module.PieceWriter.put = put  # type: ignore[method-assign]
