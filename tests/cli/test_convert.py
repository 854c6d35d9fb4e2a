"""``ziphius convert`` to quantised forms: what it says, and which options it refuses."""

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import refusal, ziphius_exits
from tests.support import random_model
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
