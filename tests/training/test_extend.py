"""A longer context, phase after phase: what it trains on, what it leaves, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ziphius
from tests.parallel.pool import Pool
from tests.training.support import Silent, breaking_off, contents, metrics, overrides
from tests.training.support import recipe as small_recipe
from ziphius.config.errors import BadInput
from ziphius.config.model import Yarn
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.corpus import read_corpus
from ziphius.data.engine import LocalEngine
from ziphius.data.heldout import heldout_rows
from ziphius.data.in_turn import InTurn
from ziphius.data.loader import Loader
from ziphius.data.prepare import prepare
from ziphius.data.tokenizer import read_tokenizer
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training.extend import extend, phase_folders
from ziphius.training.folder import RunFolder
from ziphius.training.run import pretrain
from ziphius.training.text import prepare_long_text
from ziphius.training.validate import validate

_SETTINGS = (
    *("pretrain.steps=2", "pretrain.ema_decay=0.0", "model.max_position_embeddings=32"),
    "precision.compute=float32",
    *("extend.lengths=[64, 128]", "extend.batch_sizes=[4, 2]", "extend.steps=[3, 2]"),
    *("extend.factor=8.0", "run.checkpoint_every=1", "data.token_split_rate=0.0"),
)
PHASES = ("phase-1", ".")


def recipe(words: Path, *more: str) -> Recipe:
    return small_recipe(words, *_SETTINGS, *more)


@pytest.fixture(scope="module")
def base(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is extended."""
    out = tmp_path_factory.mktemp("runs") / "base"
    pretrain(recipe(words), RunFolder(out), Silent())
    return out


@pytest.fixture(scope="module")
def whole(words: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "long"
    extend(recipe(words), base, out, Silent())
    return out


def summary(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "summary.json").read_text("utf-8"))
    return found


def test_every_phase_is_a_run(words: Path, base: Path, whole: Path) -> None:
    rate = recipe(words).pretrain.ending_rate
    for folder, steps, length, tokens in (("phase-1", 3, 64, 256), (".", 2, 128, 256)):
        lines = metrics(whole / folder)
        assert [line["tokens"] for line in lines] == [tokens * (k + 1) for k in range(steps)]
        assert {line["lr"] for line in lines} == {rate}
        assert {line["gamma"] for line in lines} == {0.0}
        told = summary(whole / folder)
        assert (told["sequence_length"], told["context"]) == (length, 256)
        assert (told["yarn_factor"], told["yarn_original_context"]) == (8.0, 32)
    assert summary(whole / "phase-1")["start"] == str(base / "checkpoint")
    assert summary(whole)["start"] == str(whole / "phase-1" / "checkpoint")


def test_the_checkpoint_says_what_it_has_become(whole: Path, base: Path) -> None:
    yarn = Yarn(factor=8.0, original_max_position_embeddings=32)
    for folder in PHASES:
        model = ziphius.load(whole / folder)
        assert model.config.rope_scaling == yarn
        assert model.config.max_position_embeddings == 256
    assert ziphius.load(base).config.rope_scaling is None
    with torch.no_grad():
        assert ziphius.load(whole)(torch.arange(200)[None] % 300).isfinite().all()


def test_a_phase_begins_with_the_weights_of_the_one_before(whole: Path, base: Path) -> None:
    """Training has changed them; where it could not, they are the same."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = [ziphius.load(at).state_dict() for at in (base, whole / "phase-1", whole)]
    key = next(key for key in biases[0] if key.endswith(name.removeprefix("model.")))
    assert torch.equal(biases[0][key], biases[2][key]), "routing biases have moved"
    assert not torch.equal(biases[0]["lm_head.weight"], biases[1]["lm_head.weight"])


def test_a_phase_is_measured_as_it_begins(words: Path, base: Path, whole: Path) -> None:
    """What its summary tells of the beginning is what the checkpoint before it is worth."""
    settled = recipe(words)
    for folder, length, begun in ((whole / "phase-1", 64, base), (whole, 128, whole / "phase-1")):
        model = ziphius.load(whole / "phase-1")  # its network: of YaRN
        model.load_state_dict(ziphius.load(begun).state_dict())
        tokenizer = read_tokenizer(whole / "checkpoint" / "tokenizer.json")
        documents = read_corpus(settled.data).heldout
        rows = heldout_rows(documents, tokenizer, length, settled.run.validate_bytes)
        told = summary(folder)["heldout_bpb_before"]
        assert told == pytest.approx(validate(model, rows).bits_per_byte, rel=1e-5)
        assert told != pytest.approx(summary(folder)["heldout_bpb_after"], rel=1e-4)


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_broken_off_in_any_phase_and_resumed(
    at: int, words: Path, base: Path, whole: Path, tmp_path: Path
) -> None:
    """The same bits as without: lines, weights, moments, recipe."""
    out = tmp_path / "run"
    with breaking_off(at) as watch:
        extend(recipe(words), base, out, watch)
    watch = Silent()
    extend(recipe(words), base, out, watch, resume=True)
    assert sum("going on after step" in line for line in watch.said) == (at not in (1, 4))
    for folder in PHASES:
        assert metrics(out / folder) == metrics(whole / folder)
        name = f"stages/extend/step-{metrics(whole / folder)[-1]['step']}"
        assert contents(out / folder / name) == contents(whole / folder / name)
        assert contents(out / folder / "checkpoint") == contents(whole / folder / "checkpoint")
    ours, theirs = (load_recipe(str(at / "recipe.toml")) for at in (out, whole))
    assert ours.model_copy(update={"tokenizer": theirs.tokenizer}) == theirs


def test_another_run_in_the_folder_is_left_alone(words: Path, base: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match="holds a run already: go on with it by --resume"):
        extend(recipe(words), base, whole, Silent())
    extend(recipe(words), base, whole, Silent(), resume=True)  # nothing is left to do
    assert (whole / "metrics.jsonl").read_bytes() == before
    with pytest.raises(BadInput, match=r"differs from the run's in extend\.steps"):
        extend(recipe(words, "extend.steps=9"), base, whole, Silent(), resume=True)


def test_files_in_the_way_are_refused_before_anything_is_trained(
    words: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep", "utf-8")
    with pytest.raises(BadInput, match="holds files that are no run"):
        extend(recipe(words), base, tmp_path, Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_extended_checkpoint_goes_on_with_its_yarn(
    words: Path, whole: Path, tmp_path: Path
) -> None:
    more = ("extend.lengths=[256]", "extend.batch_sizes=[1]", "extend.steps=[1]", "extend.factor=9")
    trained = extend(recipe(words, *more), whole, tmp_path / "further", Silent())
    assert trained.summary["context"] == 256
    assert not (tmp_path / "further" / "phase-1").exists()
    longer = ("extend.lengths=[512]", *more[1:])
    with pytest.raises(BadInput, match=r"512 tokens exceed the 256 positions.*factor 8"):
        extend(recipe(words, *longer), whole, tmp_path / "too-long", Silent())


def test_text_that_is_too_short_names_the_setting(words: Path, base: Path, tmp_path: Path) -> None:
    more = ("extend.batch_sizes=[1000, 2]",)
    with pytest.raises(
        BadInput, match=r"extend\.lengths: 64, a batch of extend\.batch_sizes: 1000"
    ):
        extend(recipe(words, *more), base, tmp_path / "out", Silent())


def test_prepared_text_gives_the_same_run(
    words: Path, base: Path, whole: Path, tmp_path: Path
) -> None:
    tokenizer = f"tokenizer.path={base / 'checkpoint' / 'tokenizer.json'}"
    prepare(recipe(words, tokenizer), tmp_path / "text", LocalEngine())
    settled = load_recipe("tiny", overrides(tmp_path / "text", *_SETTINGS))
    extend(settled, base, tmp_path / "run", Silent())
    for folder in PHASES:
        assert metrics(tmp_path / "run" / folder) == metrics(whole / folder)
    prepare(
        recipe(words, "model.vocab_size=310", "tokenizer.vocab_size=310"),
        tmp_path / "other",
        LocalEngine(),
    )
    other = load_recipe("tiny", overrides(tmp_path / "other", *_SETTINGS))
    with pytest.raises(BadInput, match="was prepared with another tokenizer"):
        extend(other, base, tmp_path / "no", Silent())


def test_time_bounds_a_phase_and_the_recipe_says_what_became_of_it(
    words: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    extend(recipe(words, "extend.steps=1000"), base, out, Silent(), seconds=(1e-9, 1e-9))
    for folder, steps in (("phase-1", (1, 1000)), (".", (1000, 1))):
        made = load_recipe(str(out / folder / "recipe.toml")).extend
        assert made is not None
        assert made.steps == steps
    with pytest.raises(BadInput, match="1 bounds of time for 2 phases"):
        extend(recipe(words), base, tmp_path / "no", Silent(), seconds=(1.0,))


def test_where_phases_lie(tmp_path: Path) -> None:
    folders = phase_folders(tmp_path / "out", 3)
    names = ["out/phase-1", "out/phase-2", "out"]
    assert [folder.path for folder in folders] == [tmp_path / name for name in names]
    assert [folder.path for folder in phase_folders(tmp_path, 1)] == [tmp_path]


# --- several processes ----------------------------------------------------------------------------


def on_ranks(text: Path, base: Path, out: Path, *more: str) -> dict[str, object]:
    chosen = recipe(text, *more)
    world = torch.distributed.get_world_size()
    mesh = make_mesh(Layout.of(chosen.parallel, world))
    return extend(chosen, base, out, Silent(), mesh=mesh).summary


def test_rows_divided_among_processes(pool: Pool, words: Path, base: Path, tmp_path: Path) -> None:
    """Context parallelism, with YaRN and documents that don't see one another."""
    more = ("precision.compute=float32", "run.kernels=torch", "data.document_mask=true")
    alone = extend(recipe(words, *more), base, tmp_path / "one", Silent()).summary
    found = pool.run(2, on_ranks, words, base, tmp_path / "two", *more, "parallel.cp=2")
    for rank in found:
        assert rank["heldout_bpb_after"] == pytest.approx(alone["heldout_bpb_after"], rel=1e-4)
    for folder in PHASES:
        ours, theirs = (metrics(tmp_path / out / folder) for out in ("two", "one"))
        for key in ("loss", "mtp_loss", "grad_norm"):
            expected = [line[key] for line in theirs]
            assert [line[key] for line in ours] == pytest.approx(expected, rel=1e-4)


def test_long_rows_are_of_the_sources_that_are_read_to_the_end(words: Path, base: Path) -> None:
    tokenizer = read_tokenizer(base / "checkpoint" / "tokenizer.json")

    def batches(*sources: str) -> Loader | InTurn:
        chosen = recipe(words, "data.source=stdlib", f"data.sources=[{', '.join(sources)}]")
        assert chosen.extend is not None
        phase = chosen.extend.phase(0, 1e-3)
        return prepare_long_text(chosen, phase, tokenizer, Silent()).loader

    alpha, beta = (f'path="{words / name}"' for name in ("alpha", "beta"))
    both = batches(f"{{{alpha}}}", f"{{{beta}}}").tokens_per_epoch
    late = batches(f'{{{alpha}, end="50%"}}', f'{{{beta}, begin="50%"}}')
    assert late.tokens_per_epoch == batches(f"{{{beta}}}").tokens_per_epoch < both
