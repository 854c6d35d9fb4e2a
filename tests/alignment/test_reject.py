"""Which of a teacher's answers become records, and what these tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ziphius.alignment.endpoint import Endpoint
from ziphius.alignment.questions import mixture_of
from ziphius.alignment.records import read_records
from ziphius.alignment.reject import reject, worth_keeping, write_records
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.tasks.problem import Problem
from ziphius.alignment.teachers import EndpointTeacher, FileTeacher, WorkedTeacher
from ziphius.config.distill import DistillConfig
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.evaluation.sandbox import confinement

TASKS = mixture_of("sums,gcd", "distill.tasks")


def responses(problem: Problem) -> list[Response]:
    """A right answer, a shorter right one, a wrong one, and right ones without end or form."""
    a = problem.answer
    return [
        Response(problem, f"<think>long and right</think>{a}", 9),
        Response(problem, f"<think>right</think>{a}", 5),
        Response(problem, "<think>wrong</think>minus one", 3),
        Response(problem, f"<think>right</think>{a}", 2, finished=False),
        Response(problem, f"right</think>{a}", 1),
    ]


class Taught:
    """A teacher who always says the same of a problem."""

    trouble = ""

    @property
    def about(self) -> dict[str, Any]:
        return {"checkpoint": "c", "sha256": "s"}

    def answer(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[list[Response]]:
        return [responses(problem) for problem in problems]


def problem() -> Problem:
    return TASKS.problem_at(0, "train", 0)


def test_the_shortest_right_answers_that_end_are_kept() -> None:
    for keep, expected in ((9, ["right", "long and right"]), (1, ["right"])):
        config = DistillConfig(tasks="sums,gcd", problems=1, keep=keep)
        found = reject(Taught(), TASKS, config, seed=0)
        reasons = [record["messages"][1]["reasoning_content"] for record in found.records]
        assert reasons == expected


def test_an_answer_at_once_is_learned_as_one_where_it_could_have_reasoned() -> None:
    class AtOnce(Taught):
        def answer(self, problems: Sequence[Problem], seeds: Sequence[int]):
            return [
                [
                    Response(p, f"<think></think>{p.answer}", 4),
                    Response(p, f"<think></think></think>{p.answer}", 3),
                ]
                for p in problems
            ]

    config = DistillConfig(tasks="sums,gcd", problems=1, keep=2)
    (record,) = reject(AtOnce(), TASKS, config, seed=0).records
    told = {"role": "assistant", "content": problem().answer, "reasoning_content": ""}
    assert record["messages"][1] == told


def test_one_text_is_kept_once() -> None:
    twice = [Response(problem(), problem().answer, n) for n in (3, 3)]
    assert len(worth_keeping(twice, 9)) == 1


def test_records_tell_where_they_come_from_and_can_be_learned(tmp_path: Path) -> None:
    config = DistillConfig(tasks="sums,gcd", problems=12, tries=5)
    found = reject(Taught(), TASKS, config, seed=3)
    write_records(found.records, tmp_path / "records.jsonl")
    records, _ = read_records([tmp_path / "records.jsonl"])
    assert len(records) == 12
    first = records[0]
    assert first.messages[1]["reasoning_content"] == "right"
    teacher = first.about["teacher"]
    assert (teacher["sha256"], teacher["tries"], teacher["right"]) == ("s", 5, 3)
    assert teacher["verdict"] == "right"
    assert isinstance(teacher["seed"], int)
    assert sum(count.problems for count in found.counts.values()) == 12
    for count in found.counts.values():
        assert count.tries == 5 * count.problems
        assert count.right == 3 * count.problems
        assert count.kept == count.problems
        assert count.rejected == pytest.approx(0.8)


def test_no_record_is_of_a_test_problem() -> None:
    config = DistillConfig(tasks="sums,gcd", problems=60)
    for record in reject(Taught(), TASKS, config, seed=1).records:
        held = Problem(record["task"], "", "", record["key"]).split
        assert held == "train"


def test_an_expert_learns_both_answers_of_a_problem() -> None:
    config = DistillConfig(tasks="sums,gcd", problems=1, samples="expert")
    plain, asked = (r["messages"] for r in reject(Taught(), TASKS, config, seed=0).records)
    assert [m["role"] for m in plain] == ["user", "assistant"]
    assert [m["role"] for m in asked] == ["system", "user", "assistant"]
    assert asked[0]["content"] == config.system
    assert plain[1] == {"role": "assistant", "content": problem().answer}
    assert asked[2]["reasoning_content"] == "right"


def test_a_problem_without_a_right_answer_is_given_up() -> None:
    class Wrong(Taught):
        def answer(self, problems: Sequence[Problem], seeds: Sequence[int]):
            return [[Response(problem, "no idea", 2)] for problem in problems]

    found = reject(Wrong(), TASKS, DistillConfig(tasks="sums,gcd", problems=5), seed=0)
    assert found.records == []
    assert sum(count.given_up for count in found.counts.values()) == 5


PROGRAM = "```python\ndef double(x):\n    return {}\n```"


def test_programs_are_run(tmp_path: Path) -> None:
    """A right program and a wrong one: by their tests, in a cage."""
    if not confinement().possible:
        pytest.skip(confinement().missing)
    file = tmp_path / "programs.jsonl"
    lines = [
        {"prompt": f"{n}: write double(x)", "tests": "assert double(3) == 6"} for n in range(20)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    tasks = mixture_of(f"file:{file}")

    class Writes(Taught):
        def answer(self, problems: Sequence[Problem], seeds: Sequence[int]):
            written = (PROGRAM.format("x * 2"), PROGRAM.format("x"))
            return [[Response(p, text, 9) for text in written] for p in problems]

    found = reject(Writes(), tasks, DistillConfig(tasks="x", problems=2, keep=9), seed=0)
    assert all("x * 2" in record["messages"][1]["content"] for record in found.records)
    (count,) = found.counts.values()
    assert (count.tries, count.right, count.kept) == (4, 2, 2)


# --- teachers -------------------------------------------------------------------------------------


def test_answers_of_a_file_are_found_by_their_question(tmp_path: Path) -> None:
    known = problem()
    line = {
        "messages": [
            {"role": "user", "content": known.question},
            {"role": "assistant", "content": known.answer, "reasoning_content": "so"},
        ]
    }
    (tmp_path / "known.jsonl").write_text(json.dumps(line), "utf-8")
    teacher = FileTeacher(tmp_path / "known.jsonl")
    other = TASKS.problem_at(0, "train", 1)
    (found,), none = teacher.answer([known, other], [0, 0])
    assert found.text == f"<think>so</think>{known.answer}"
    assert none == []
    assert len(teacher.about["sha256"]) == 64


def test_tasks_solve_their_own_problems() -> None:
    config = DistillConfig(tasks="sums,gcd", problems=20)
    found = reject(WorkedTeacher(), TASKS, config, seed=0)
    assert len(found.records) == 20
    for record in found.records:
        problem = Problem(record["task"], "", "", record["key"])
        assert TASKS.task_of(problem)
        said = record["messages"][1]
        assert said["reasoning_content"].endswith(said["content"])


class Server(BaseHTTPRequestHandler):
    """Answers every question by its seed; one seed in three fails."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "key": self.headers["Authorization"]})
        if body["seed"] % 3 == 1:
            self.send_error(500)
            return
        reply = {
            "choices": [
                {
                    "message": {"content": f"is {body['seed']}", "reasoning_content": "well"},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"completion_tokens": 4},
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.seen.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_so_often_and_failed_tries_are_left_out(url: str) -> None:
    config = DistillConfig(tries=3, temperature=0.8, max_tokens=50)
    endpoint = Endpoint(url, "m", key="secret", seconds=20)
    teacher = EndpointTeacher(endpoint, config)
    ((first, second),) = teacher.answer([problem()], [6])
    assert (first.text, second.text) == ("<think>well</think>is 6", "<think>well</think>is 8")
    assert first.tokens == 4
    assert teacher.failed == 1
    assert teacher.trouble.startswith("1 tries were not answered: ")
    assert {entry["key"] for entry in Server.seen} == {"Bearer secret"}
    assert {entry["temperature"] for entry in Server.seen} == {0.8}
    assert "secret" not in repr(endpoint)
    assert "secret" not in str(teacher.about)


def test_a_server_that_never_answers_is_an_error(url: str) -> None:
    teacher = EndpointTeacher(Endpoint(url, "m", seconds=5), DistillConfig(tries=1))
    with pytest.raises(ZiphiusError, match="no answer"):
        teacher.answer([problem()], [1])


def test_a_mixture_that_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match=r"distill\.tasks"):
        mixture_of("", "distill.tasks")
    with pytest.raises(BadInput, match="name=weight"):
        mixture_of("sums=often", "distill.tasks")
