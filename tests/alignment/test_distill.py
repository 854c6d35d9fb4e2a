"""Learning a teacher's thoughts: the divergence beside torch's, and a student that gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.alignment.support import make_start, run_later, write_chats
from tests.training.support import assert_same_run, breaking_off, metrics
from ziphius.alignment.distill import DivergenceOfRows
from ziphius.config.errors import BadInput
from ziphius.kernels.loss import linear_cross_entropy

DISTILLED = (
    *("distill.sequence_length=48", "distill.batch_size=4", "distill.micro_batch_size=2"),
    *("distill.learning_rate=1e-2", "distill.final_learning_rate=1e-3", "distill.steps=24"),
    *("distill.holdout_every=6", "run.kernels=torch"),
)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradients_are_torchs(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, theirs_ND = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    weight_VD, head_VD = torch.randn(2, 11, 5, generator=generator, dtype=torch.float64)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    judge = DivergenceOfRows(head_VD, temperature)
    found = linear_cross_entropy(hidden_ND, weight_VD, theirs_ND, 3, rows_loss=judge)
    expected = temperature**2 * F.kl_div(
        (hidden_ND @ weight_VD.T / temperature).log_softmax(-1),
        (theirs_ND @ head_VD.T / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, (hidden_ND, weight_VD))
    for mine, other in zip(
        ours, torch.autograd.grad(expected, (hidden_ND, weight_VD)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_a_teacher_diverges_from_itself_by_nothing() -> None:
    hidden_ND, head_VD = torch.randn(4, 3).double(), torch.randn(6, 3).double()
    judge = DivergenceOfRows(head_VD)
    assert linear_cross_entropy(hidden_ND, head_VD, hidden_ND, rows_loss=judge).abs() < 1e-12


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    return write_chats(file, [{"content": f"return {n % 3}"} for n in range(40)])


def distilled(
    words: Path, start: Path, records: Path, out: Path, *more: str, **how: Any
) -> list[dict[str, Any]]:
    settings = (*DISTILLED, f"distill.source={records}", *more)
    run_later("distill", words, start, out, *settings, **how)
    return metrics(out)


def test_a_student_comes_near_to_its_teacher(
    words: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    """The teacher has learned the records; the student only learns the teacher's thoughts."""
    distilled(words, start, records, tmp_path / "teacher")
    settings = ("distill.kl_weight=1.0", "precision.compute=float32")
    lines = distilled(
        words, start, records, tmp_path / "student", *settings, teacher=tmp_path / "teacher"
    )
    assert lines[-1]["divergence"] < lines[0]["divergence"] / 4
    assert lines[-1]["loss"] < lines[0]["loss"] / 2  # the answers come with the thoughts


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    words: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    settings = ("distill.kl_weight=0.5", "precision.compute=float32", "distill.steps=1")
    lines = distilled(words, start, records, tmp_path / "same", *settings, teacher=start)
    assert lines[0]["divergence"] == pytest.approx(0, abs=1e-5)


def test_thoughts_need_a_teacher_of_the_same_words(
    words: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="--teacher"):
        distilled(words, start, records, tmp_path / "a", "distill.kl_weight=0.5")
    other = make_start(
        words, tmp_path / "other", "model.vocab_size=320", "tokenizer.vocab_size=320"
    )
    with pytest.raises(BadInput, match="vocabulary of 320"):
        distilled(words, start, records, tmp_path / "b", "distill.kl_weight=0.5", teacher=other)
    text = tmp_path / "text"
    text.mkdir()
    for number, file in enumerate(sorted(words.rglob("*.py"))):
        told = file.read_text("utf-8").replace("return x", "yield quartz")
        (text / f"{number}.py").write_text(told, "utf-8")
    other = make_start(text, tmp_path / "words")
    with pytest.raises(BadInput, match="tokens are not the student's"):
        distilled(words, start, records, tmp_path / "c", "distill.kl_weight=0.5", teacher=other)


def test_no_records_are_refused(words: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ziphius reject"):
        distilled(words, start, Path(), tmp_path / "run", "distill.source=")


def test_broken_off_and_resumed_it_ends_as_if_nothing_had_happened(
    words: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    settings = ("distill.kl_weight=0.5", "distill.steps=6", "run.checkpoint_every=2")
    distilled(words, start, records, tmp_path / "whole", *settings, teacher=start)
    how: dict[str, Any] = {"teacher": start}
    with breaking_off(3) as watch:
        distilled(words, start, records, tmp_path / "broken", *settings, **how, watch=watch)
    distilled(words, start, records, tmp_path / "broken", *settings, **how, resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
