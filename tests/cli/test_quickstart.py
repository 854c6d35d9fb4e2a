"""``ziphius quickstart`` as a user meets it: every stage, every figure, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ziphius
from tests.cli.launch import flags
from tests.cli.verbs import letters, metrics, refusal, settings, ziphius_exits
from tests.training.support import overrides, write_text
from ziphius.cli.miniature import Miniature, seconds_of
from ziphius.config.recipe import dump_recipe, load_recipe
from ziphius.data.tokenizer import train_tokenizer
from ziphius.training.loop import never_stopping


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text of its own, so that figures do not depend on the interpreter."""
    return write_text(tmp_path_factory.mktemp("words") / "text")


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the machine in every run: it takes longer than the run."""
    monkeypatch.setattr("ziphius.training.run.peak_flops", lambda device, dtype: 1e9)


def test_rows_without_room_for_needles_do_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages after the extension need none, and its report is written."""
    tokenizer = train_tokenizer(iter(["Remember Belon K D W R.\n" * 9]), 300)
    short: Any = SimpleNamespace(
        stage=SimpleNamespace(tokenizer=tokenizer), summary={"yarn_original_context": 16}
    )
    said, written = list[str](), list[Path]()
    monkeypatch.setattr("ziphius.report.page.write_report", written.append)
    display: Any = SimpleNamespace(say=said.append)
    work = Miniature(tmp_path, [], {}, 2, display, never_stopping)
    folder = work.folder("extend")
    folder.mkdir()
    recipe = load_recipe(
        "tiny", ["extend.lengths=[32]", "extend.batch_sizes=[1]", "extend.steps=[1]"]
    )
    (folder / "recipe.toml").write_text(dump_recipe(recipe), "utf-8")
    assert work._needles(short) == {}
    assert said == ["rows are too short for needles: none are asked"]
    assert written == [folder]


def test_quickstart_ends_with_every_figure_it_promises(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quickstart"
    arguments = [
        "quickstart",
        "--until",
        "pretrain",
        "--out",
        str(out),
        "--steps",
        "2",
        *settings(text),
    ]
    assert ziphius_exits(*arguments) == 0
    shown = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    for key in ("heldout_bpb_before", "heldout_bpb_after", "ngram_bpb", "xz_bpb"):
        assert summary[key] > 0
        assert f"{summary[key]:.3f}" in shown
    assert letters(summary["generated"]) in letters(shown)
    assert f"{summary['tokens_per_s']:,.0f} tokens/s" in shown
    assert shown.rstrip().endswith(f"ziphius serve {out}"), shown
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert f"report: {out / 'report.html'}\n" in shown
    assert (out / "report.html").is_file()

    (out / "note.txt").write_text("mine", "utf-8")
    assert ziphius_exits(*arguments) == 0
    assert (out.with_name("quickstart.previous") / "note.txt").read_text("utf-8") == "mine"
    assert not (out / "note.txt").exists()

    shutil.rmtree(out.with_name("quickstart.previous"))
    (out.with_name("quickstart.previous")).mkdir()
    (out.with_name("quickstart.previous") / "letter.txt").write_text("mine", "utf-8")
    assert "is no run and in the way" in refusal(capsys, *arguments)
    assert (out.with_name("quickstart.previous") / "letter.txt").is_file()


def test_quickstart_goes_through_every_stage(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quickstart"
    more = (
        "extend.lengths=[64, 160]",
        *("grpo.tasks=reversal,gcd", "grpo.questions=2", "grpo.group=2", "grpo.max_tokens=8"),
        *("distill.tasks=reversal,gcd", "distill.problems=4", "distill.max_tokens=8"),
    )
    arguments = ["quickstart", "--out", str(out), "--steps", "2", *settings(text, *more)]
    assert ziphius_exits(*arguments) == 0, capsys.readouterr().err
    stages = json.loads((out / "summary.json").read_text("utf-8"))["stages"]
    assert list(stages) == ["pretrain", "extend", "sft", "grpo", "distill"]
    assert stages["extend"]["steps"] == 2, "one of each phase"
    assert stages["extend"]["tokens"] == 2 * 64 + 160, "rows of both"
    assert (out / "needle.json").is_file()
    for name in ("sft", "grpo", "distill"):
        assert stages[name]["accuracy"].keys() == {"reversal", "gcd"}
        assert stages[name]["length"] > 0
        assert (out / name / "report.html").is_file()
    assert "right answers to test problems" in capsys.readouterr().out
    assert stages["extend"]["needles"].keys() == {"before", "after", "without YaRN"}
    assert "Stage by stage" in (out / "report.html").read_text("utf-8")
    # Second and third questions are learned too.
    for name in ("sft", "distill"):
        recipe = load_recipe(str(out / name / "recipe.toml"))
        learned = (recipe.sft if name == "sft" else recipe.distill).source.split(",")
        (talks,) = (Path(file) for file in learned if file.endswith("-dialogues.jsonl"))
        records = list(map(json.loads, talks.read_text("utf-8").splitlines()))
        assert {len(record["messages"]) for record in records} == {4, 6}
    # What is opened is the final model.
    weights = "model.safetensors"
    assert (out / "checkpoint" / weights).read_bytes() == (
        out / "distill" / "checkpoint" / weights
    ).read_bytes()
    assert ziphius.load(out).config.rope_scaling is not None


def test_quickstart_reads_text_of_its_own(
    tmp_path: Path,
    kernel_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where none is named: the library, and what teaches to look back, until the last phase."""
    monkeypatch.setattr("ziphius.cli.mixture._CHARACTERS", 100_000)
    out = tmp_path / "quickstart"
    more = (
        *("extend.lengths=[512, 640]", "extend.batch_sizes=[1, 1]", "model.vocab_size=1000"),
        *("tokenizer.vocab_size=1000", f"run.cache={kernel_folder}", "run.kernels=torch"),
    )
    given = [value for value in overrides(tmp_path, *more) if not value.startswith("data.source")]
    arguments = ["quickstart", "--until", "extend", "--out", str(out), "--steps", "2"]
    assert ziphius_exits(*arguments, *flags(given)) == 0, capsys.readouterr().err
    names = ["plain", "tasks", "copies", "dense", "spread"]
    for folder, others in ((out, names), (out / "extend", [*names[2:], "long"])):
        read = load_recipe(str(folder / "recipe.toml")).data.sources
        found = {Path(source.path).name.split("-")[0] for source in read}
        assert found == {"stdlib", *others}
    assert len(metrics(out)) == 2
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["heldout_packages"]
    assert summary["ngram_bpb"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--until", "rlhf"], "pretrain, extend, sft, grpo, distill"),
        (["--set", "distill.tasks=weekdays,sumz"], "sums"),
        (["--set", "grpo.group=1"], "grpo.group"),
    ],
)
def test_what_later_stages_cannot_do_is_said_before_anything_is_trained(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quickstart"
    assert words in refusal(capsys, "quickstart", "--out", str(out), *arguments)
    assert not out.exists()


def test_stages_share_the_minutes() -> None:
    shares = seconds_of(("pretrain", "extend", "sft"), 3)
    assert sum(shares.values()) == pytest.approx(180)
    assert seconds_of(("pretrain",), 2) == {"pretrain": 120}


def test_quickstart_times_steps_to_fit_the_minutes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    more = settings(text, "pretrain.steps=null", "pretrain.tokens=10000000")
    assert (
        ziphius_exits(
            "quickstart", "--until", "pretrain", "--out", str(out), "--minutes", "0.01", *more
        )
        == 0
    )
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert 1 <= summary["steps"] < 10_000
    assert len(metrics(out)) == summary["steps"]
    written = ziphius.load_recipe(str(out / "recipe.toml"))
    assert written.pretrain.total_tokens == summary["tokens"] == metrics(out)[-1]["tokens"]


@pytest.mark.parametrize("arguments", [["--minutes", "nan"], ["--minutes", "inf"]])
def test_quickstart_wants_a_number_of_minutes(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "minutes" in refusal(capsys, "quickstart", "--out", str(tmp_path / "q"), *arguments)


def test_a_cache_that_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file", "utf-8")
    more = ("--set", f"run.cache={tmp_path / 'cache'}")
    out = tmp_path / "quickstart"
    assert "run.cache" in refusal(capsys, "quickstart", "--out", str(out), *more)
    assert not out.exists()
