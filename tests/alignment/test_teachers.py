"""A checkpoint as a teacher: what a record says is enough to have its answer again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ziphius.alignment.questions import mixture_of
from ziphius.alignment.reject import reject
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.teachers import CheckpointTeacher
from ziphius.config.distill import DistillConfig
from ziphius.config.run import RunConfig

TASKS = mixture_of("sums,gcd", "distill.tasks")
CONFIG = DistillConfig(tasks="sums,gcd", problems=3, tries=3, max_tokens=6, keep=3)
PROBLEMS = [TASKS.problem_at(0, "train", number) for number in range(3)]


def teacher(start: Path) -> CheckpointTeacher:
    return CheckpointTeacher(start, CONFIG, RunConfig(kernels="torch"))


def texts(answers: list[list[Response]]) -> list[list[str]]:
    return [[response.text for response in tries] for tries in answers]


def test_it_answers_every_problem_so_often_and_by_its_seed_alone(start: Path) -> None:
    found = texts(teacher(start).answer(PROBLEMS, [7, 8, 9]))
    assert [len(tries) for tries in found] == [3, 3, 3]
    assert len({text for tries in found for text in tries}) > 5, "sampled, not repeated"
    again = texts(teacher(start).answer(PROBLEMS[::-1], [9, 8, 7]))
    assert again[::-1] == found, "nor by what else is asked"
    assert texts(teacher(start).answer(PROBLEMS, [1, 2, 3])) != found


def test_its_sha256_is_of_its_files(start: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted((start / "checkpoint").iterdir()):
        if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name}\0{own}\0".encode())
    assert teacher(start).about == {"checkpoint": str(start), "sha256": digest.hexdigest()}


def words(text: str) -> str:
    return text.replace("<think>", "").replace("</think>", "").strip()


class Liked(CheckpointTeacher):
    """The same teacher, all of whose answers are right and well formed."""

    def answer(self, problems, seeds):  # type: ignore[no-untyped-def]
        said = super().answer(problems, seeds)
        return [
            [
                Response(r.problem, f"<think>.{words(r.text)}</think>{r.problem.answer}", 1)
                for r in tries
            ]
            for tries in said
        ]


def test_a_record_has_what_makes_its_answer_again(start: Path) -> None:
    liked = Liked(start, CONFIG, RunConfig(kernels="torch"))
    records = reject(liked, TASKS, CONFIG, seed=5).records
    assert len(records) >= 3
    by_key = {
        TASKS.problem_at(5, "train", n).key: TASKS.problem_at(5, "train", n) for n in range(3)
    }
    for record in records:
        told = record["teacher"]
        assert told["sha256"] == liked.about["sha256"]
        assert (told["tries"], told["verdict"]) == (3, "right")
        (again,) = texts(teacher(start).answer([by_key[record["key"]]], [told["seed"]]))
        reasoning = record["messages"][-1]["reasoning_content"]
        assert reasoning in {f".{words(text)}" for text in again}
