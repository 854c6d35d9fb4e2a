"""The command line as a user meets it: what it leaves behind, and how it says no."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ziphius
from tests.cli.launch import Command
from tests.cli.verbs import metrics, refusal, settings, ziphius_exits
from tests.training.support import FIRST_STATE, Silent, overrides, write_text
from ziphius.cli.app import run
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text of its own, so that figures do not depend on the interpreter."""
    return write_text(tmp_path_factory.mktemp("words") / "text")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `ziphius pretrain` left."""
    out = tmp_path_factory.mktemp("runs") / "small"
    arguments = ["pretrain", "tiny", "--out", str(out), "--steps", "3"]
    assert ziphius_exits(*arguments, *settings(text)) == 0
    return out


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the machine in every run: it takes longer than the run."""
    monkeypatch.setattr("ziphius.training.run.peak_flops", lambda device, dtype: 1e9)


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint without the manifest: a stranger's, free to be damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoint", folder)
    (folder / "manifest.json").unlink()
    return folder


def test_a_pretraining_run_leaves_what_others_will_open(trained: Path) -> None:
    records = metrics(trained)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["tokens"] for record in records] == [128, 256, 384]
    for record in records:
        expected = record["loss"] + 0.3 * record["mtp_loss"] + record["balance_loss"]
        assert record["total_loss"] == pytest.approx(expected, rel=1e-5)
        assert {"bpb", "lr", "tokens_per_s"} <= record.keys()
    summary = json.loads((trained / "summary.json").read_text("utf-8"))
    assert summary["steps"] == 3
    assert summary["corpus_bytes"] > 0
    assert len(summary["corpus_sha256"]) == 64
    recipe = ziphius.load_recipe(str(trained / "recipe.toml"))
    assert recipe.model.hidden_size == 32
    assert recipe.pretrain.steps == 3
    final, stage = trained / "checkpoint", trained / "stages" / "pretrain" / "step-3"
    assert not (final / "state").exists()
    state = {p.name for p in (stage / "state").iterdir()}
    assert state == {FIRST_STATE, "index.json", "state.json"}
    tokens_BT = torch.arange(3, 13)[None]
    assert torch.equal(ziphius.load(final)(tokens_BT), ziphius.load(stage)(tokens_BT))
    assert ziphius.load(trained)(tokens_BT).shape == (1, 10, 300)
    assert (trained / "report.html").is_file()


def test_the_same_recipe_gives_the_same_losses(text: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert ziphius_exits("pretrain", str(trained / "recipe.toml"), "--out", str(out)) == 0
    for ours, theirs in zip(metrics(out), metrics(trained), strict=True):
        assert ours["total_loss"] == theirs["total_loss"]


def test_generate_streams_prompts_and_repeats_by_seed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = ["--max-tokens", "8", "--temperature", "1.0", "--seed"]
    written = []
    for seed in ("1", "1", "2"):
        assert ziphius_exits("generate", str(trained), "def ", *sampled, seed) == 0
        written.append(capsys.readouterr().out)
    assert written[0].startswith("def ")
    assert written[0] == written[1] != written[2]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def \nclass \n", "utf-8")
    assert ziphius_exits("generate", str(trained), "--input-file", str(prompts)) == 0
    assert [part.split(" ")[0] for part in capsys.readouterr().out.split("\n---\n")] == [
        "def",
        "class",
    ]


def test_prompts_of_a_file_are_answered_as_they_are_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--max-tokens", "8", "--temperature", "1.0", "--seed", "3", "--top-k", "40"]
    alone = []
    for prompt in ("def ", "class ", "x"):
        assert ziphius_exits("generate", str(trained), prompt, *how) == 0
        alone.append(capsys.readouterr().out)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def \nclass \n\nx", "utf-8")
    for more in ([], ["--speculation", "on", "--draft-depth", "2"], ["--speculation", "off"]):
        assert (
            ziphius_exits("generate", str(trained), "--input-file", str(prompts), *how, *more) == 0
        )
        assert capsys.readouterr().out == "---\n".join(alone)


def test_generate_writes_what_a_grammar_allows(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    regex = ["--regex", "(yes|no)", "--n", "2", "--temperature", "1", "--min-p", "0"]
    assert ziphius_exits("generate", str(trained), "It is ", *regex) == 0
    answers = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    assert len(answers) == 2
    assert set(answers) <= {"It is yes", "It is no"}
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [[1, 2]]}', "utf-8")
    assert ziphius_exits("generate", str(trained), "", "--json-schema", str(schema)) == 0
    assert json.loads(capsys.readouterr().out) == [1, 2]


def test_generate_stops_before_a_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--max-tokens", "30", "--temperature", "1.0"]
    assert ziphius_exits("generate", str(trained), "def ", *how) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    one, other = whole[len("def ") + 9], whole[len("def ") + 12]
    stops = ["--stop", one, "--stop", other]
    assert ziphius_exits("generate", str(trained), "def ", *how, *stops) == 0
    written = whole.removeprefix("def ")
    end = min(written.index(one), written.index(other))
    assert capsys.readouterr().out == f"def {written[:end]}\n"


def test_generate_tells_its_speed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--max-tokens", "8", "--stats", "--kernels", "torch", "--cache-tokens", "128"]
    assert ziphius_exits("generate", str(trained), "def ", *how, "--speculation", "on") == 0
    told = capsys.readouterr().err
    assert "tokens/s" in told
    assert "found in the cache" in told
    assert "accepted at place 1" in told
    assert "latent=torch" in told
    assert ziphius_exits("generate", str(trained), "def ", *how, "--without-mtp") == 0
    assert "drafts: none" in capsys.readouterr().err


def test_inspect_prints_the_published_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert ziphius_exits("inspect", "671b") == 0
    shown = capsys.readouterr().out
    for figure in ("671,026,419,200", "684,489,845,504", "36,625,618,432", "70,272"):
        assert figure in shown


def test_convert_writes_bf16(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "bf16"
    assert ziphius_exits("convert", str(trained), str(target)) == 0
    assert ziphius.load(target).precision.storage == torch.bfloat16
    assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("pretrain.step=3", "did you mean 'steps'"),
        ("modle.hidden_size=3", "did you mean 'model'"),
        ("model.num_experts_per_tok=5", "topk_group"),
        ("model.qk_rope_head_dim=5", "odd"),
        ("model.scoring_func=softmax", "sigmoid"),
        ("precision.scales=fp8", "ue8m0"),
        ("precision.compute=int8", "bfloat16"),
        ("run.device=abacus", "abacus"),
        ("data.source=/no/such/folder", "/no/such/folder"),
        ("model.vocab_size=299", "tokenizer.vocab_size"),
        ("no-value", "table.key=value"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    setting: str, said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = settings(text, "model.topk_group=1", "model.n_group=2", setting)
    error = refusal(capsys, "pretrain", "tiny", "--out", str(out), *more)
    assert said in error
    assert not out.exists()


def test_a_run_is_never_written_over(
    trained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    error = refusal(capsys, "pretrain", "tiny", "--out", str(trained), *settings(text))
    assert "holds a run already" in error
    assert (trained / "metrics.jsonl").read_bytes() == before
    (tmp_path / "letter.txt").write_text("mine", "utf-8")
    for verb in (["pretrain", "tiny"], ["quickstart"]):
        error = refusal(capsys, *verb, "--out", str(tmp_path), "--steps", "2", *settings(text))
        assert "no run" in error
    assert (tmp_path / "letter.txt").read_text("utf-8") == "mine"


def test_a_broken_off_run_never_displaces_a_finished_one(
    text: Path, trained: Path, tmp_path: Path
) -> None:
    out, previous = tmp_path / "quickstart", tmp_path / "quickstart.previous"
    shutil.copytree(trained, previous)
    out.mkdir()
    (out / "recipe.toml").write_text("", "utf-8")  # killed right after it began
    assert (
        ziphius_exits(
            "quickstart", "--until", "pretrain", "--out", str(out), "--steps", "2", *settings(text)
        )
        == 0
    )
    assert (out / "checkpoint" / "config.json").is_file()
    for path in trained.rglob("*"):
        kept = previous / path.relative_to(trained)
        assert path.is_dir() or kept.read_bytes() == path.read_bytes()


def test_what_a_killed_writer_left_is_no_obstacle(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.toml.writing-1-00000000-00000000").write_text("", "utf-8")
    assert (
        ziphius_exits("pretrain", "tiny", "--out", str(out), "--steps", "2", *settings(text)) == 0
    )


def test_the_clock_ends_a_training_and_the_recipe_says_so(text: Path, tmp_path: Path) -> None:
    recipe = ziphius.load_recipe("tiny", overrides(text, "pretrain.steps=50"))
    folder = RunFolder(tmp_path / "run")
    trained = pretrain(recipe, folder, Silent(), seconds=1e-3)
    records = metrics(folder.path)
    assert trained.summary["steps"] == len(records) < 50
    written = ziphius.load_recipe(str(folder.path / "recipe.toml"))
    assert written.pretrain.total_tokens == records[-1]["tokens"]
    later = [record["lr"] for record in records[1:]]
    assert all(rate == recipe.pretrain.final_learning_rate for rate in later)


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("\udcff", [], "UTF-8"),
        ("x", ["--seed", str(10**20)], "seed"),
        ("x", ["--temperature", "nan"], "temperature"),
        ("x", ["--dtype", "int8"], "dtype"),
        ("x", ["--top-p", "2"], "top_p = 2.0: use a share"),
        ("x", ["--max-tokens", "0"], "max_tokens = 0"),
        ("x", ["--n", "0"], "n = 0"),
        ("x", ["--stop", ""], "stop = ''"),
        ("x", ["--regex", "("], "regex"),
        ("x", ["--regex", "a", "--json-schema", str(Path(__file__))], "give one grammar"),
        ("x", ["--json-schema", "/no/such/file"], "--json-schema /no/such/file: cannot be read"),
        ("x", ["--json-schema", str(Path(__file__))], "json_schema is no JSON"),
        ("x", ["--speculation", "maybe"], "use off, auto or on"),
        ("x", ["--speculation", "on", "--without-mtp"], "no MTP module"),
        ("x", ["--draft-depth", "0"], "draft depth = 0"),
        ("x", ["--kernels", "cuda"], "use auto, compiled, torch or triton"),
        ("x", ["--cache-tokens", "0"], "holds nothing"),
        ("x", ["--cache-tokens", "32", "--max-tokens", "60"], "give the cache more memory"),
        ("x", ["--input-file", "x"], "either a PROMPT or --input-file"),
        ("x" * 3000, [], "shorten the prompt"),
    ],
)
def test_bad_requests_are_refused(
    prompt: str, options: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "generate", str(trained), prompt, *options)


def test_paths_with_brackets_are_shown_as_they_are(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a[b]" / "[/c]"
    assert (
        ziphius_exits("pretrain", "tiny", "--out", str(out), "--steps", "2", *settings(text)) == 0
    )
    assert str(out) in capsys.readouterr().out


def test_an_unforeseen_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("ziphius.config.recipe.load_recipe", broken)
    assert ziphius_exits("inspect", "tiny") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "RuntimeError: two lines" in err
    monkeypatch.setattr(sys, "argv", ["ziphius", "--debug", "inspect", "tiny"])
    with pytest.raises(RuntimeError):
        run()


def test_another_architecture_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    assert "llama" in refusal(capsys, "generate", str(checkpoint), "x").lower()


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_tensors_are_named(
    change: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        name = "model.layers.0.self_attn.indexer.weight"
        tensors[name] = torch.zeros(2)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert name in refusal(capsys, "generate", str(checkpoint), "x")


def test_a_truncated_file_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in refusal(capsys, "generate", str(checkpoint), "x")


def test_a_tokenizer_of_another_model_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    data["model"]["vocab"]["zzzz"] = 300
    path.write_text(json.dumps(data), "utf-8")
    assert "vocab_size is 300" in refusal(capsys, "generate", str(checkpoint), "x")


def test_a_full_disk_loses_nothing(trained: Path, tmp_path: Path) -> None:
    """A real limit on file sizes: the write fails in the middle of a shard."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    def files(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    before = files(trained / "checkpoint")
    command = [sys.executable, "-m", "ziphius", "convert", str(trained), str(tmp_path / "bf16")]
    failed = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False
    )
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert "space" in failed.stderr or "too large" in failed.stderr, failed.stderr
    assert list(tmp_path.iterdir()) == []
    assert files(trained / "checkpoint") == before


def test_a_traceback_is_shown_on_request_only(tmp_path: Path) -> None:
    plain = Command("inspect", "no-such-preset", logs=tmp_path)
    assert "no-such-preset: neither a file nor a preset" in plain.line(2)
    debug = Command("--debug", "inspect", "no-such-preset", logs=tmp_path)
    assert debug.code() == 1
    assert "Traceback" in debug.error()
