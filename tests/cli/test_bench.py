"""``ziphius bench serve`` as a user meets it: what it shows, keeps and says no to."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.cli.launch import Command
from tests.serving.bench.mock import DONE, Asked, Mock, Reply, chunk, failure, good
from ziphius.cli.app import run

FAST = ("--concurrency", "1,2", "--requests", "4", "--distinct", "2", "--prompt-tokens", "5")


def bench(*arguments: str) -> int:
    """Run the command in this process; return its exit code."""
    before = sys.argv
    sys.argv = ["ziphius", "bench", "serve", *arguments]
    try:
        run()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the command line always leaves the process")


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of error."""
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


def test_a_good_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chart = tmp_path / "new" / "result.json", tmp_path / "picture.png"
    with Mock(lambda a: good(gap=0.002), key="secret") as mock:
        keep = ("--out", str(out), "--chart", str(chart), "--api-key", "secret")
        assert bench(mock.url, *FAST, *keep, "--slo-ttft", "10s", "--warm-up", "3") == 0
        assert len(mock.asked) == 3 + 4 + 4
    shown = capsys.readouterr()
    assert shown.err == ""
    for said in ("mock at http", "4/4", "1 at once", "between tokens", "p99"):
        assert said in shown.out
    assert "all 8 repeated answers are equal" in shown.out
    result = json.loads(out.read_text("utf-8"))
    assert [level["answered"] for level in result["levels"]] == [4, 4]
    assert all(lv["goodput"] == lv["requests_per_s"] > 0 for lv in result["levels"])
    assert result["server"]["model"] == "mock"
    assert result["texts"] == {
        "compared": 8, "differing": 0, "share": 0.0, "first_difference": None,
    }  # fmt: skip
    assert result["settings"]["slo_ttft"] == 10
    assert "--api-key KEY" in result["command"]
    assert "secret" not in out.read_text("utf-8") + shown.out
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_the_key_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPHIUS_API_KEY", "secret")
    with Mock(key="secret") as mock:
        assert bench(mock.url, "--concurrency", "1", "--requests", "1") == 0


def test_an_open_loop(capsys: pytest.CaptureFixture[str]) -> None:
    with Mock() as mock:
        assert bench(mock.url, "--rate", "50,100", "--requests", "5") == 0
    shown = capsys.readouterr().out
    assert "50/s" in shown
    assert "sent late by" in shown


def test_failures_are_told_by_kind_and_end_badly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [good(), Reply([chunk("a"), DONE]), failure(500, "boom [bold]")]
    with Mock(lambda a: replies[a.number % 3]) as mock:
        out = tmp_path / "result.json"
        arguments = ("--concurrency", "1", "--requests", "6", "--warm-up", "1")
        assert bench(mock.url, *arguments, "--out", str(out)) == 1
    shown = capsys.readouterr()
    assert "2 truncated: no finish_reason after 1 chunks" in shown.out
    assert "2 http 500: boom [bold]" in shown.out
    assert shown.err == "error: 4 of 6 requests failed (2 truncated, 2 http 500)\n"
    assert json.loads(out.read_text("utf-8"))["levels"][0]["failures"] == {
        "truncated": 2, "http 500": 2,
    }  # fmt: skip


def test_differing_answers_end_badly_unless_they_may(capsys: pytest.CaptureFixture[str]) -> None:
    with Mock(lambda a: good(["same", str(a.number)])) as mock:
        assert bench(mock.url, *FAST) == 1
        shown = capsys.readouterr()
        assert "6 of 8 repeated answers differ (75.0%)" in shown.out
        assert "from character 5: 'same" in shown.out
        assert shown.err == "error: 6 of 8 repeated answers differ\n"
        assert bench(mock.url, *FAST, "--temperature", "1") == 0
        assert "differ" not in capsys.readouterr().out


def test_refusals_are_no_failures_while_something_is_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Mock(lambda a: failure(429, "full") if a.number % 2 else good()) as mock:
        assert bench(mock.url, *FAST, "--warm-up", "1") == 0
        assert "2 refused, 2 without Retry-After" in capsys.readouterr().out
    with Mock(lambda a: failure(503, "full", Retry_After="1")) as mock:
        assert bench(mock.url, *FAST) == 1
        assert "all 8 requests were refused" in line(capsys)

    def busy(asked: Asked) -> Reply:
        return failure(503, "full", Retry_After="0.05") if asked.number % 2 else good()

    with Mock(busy) as mock:
        assert bench(mock.url, *FAST, "--retry", "--warm-up", "1") == 0
        assert "0 refused, 4 came again" in capsys.readouterr().out


def test_ctrl_c_keeps_the_levels_that_have_ended(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    with Mock(lambda a: good() if a.number < 5 else Reply([chunk("a")], end="hang")) as mock:
        command = Command(
            *("bench", "serve", mock.url, *FAST, "--warm-up", "1", "--out", str(out)),
            logs=tmp_path / "logs",
        )
        command.until(lambda: len(mock.asked) >= 7)
        command.signal(signal.SIGINT)
        assert command.line(130) == "stopped"
    result = json.loads(out.read_text("utf-8"))
    assert result["complete"] is False
    assert [level["concurrency"] for level in result["levels"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--concurrency", "1,x"), "--concurrency 1,x: give numbers above 0"),
        (("--concurrency", "0"), "give numbers above 0"),
        (("--rate", "nan"), "--rate nan: give numbers above 0"),
        (("--slo-ttft", "500"), "--slo-ttft 500: give a time with its unit, as 500ms or 1.5s"),
        (("--slo-itl", "0ms"), "give a time with its unit"),
        (("--body", "[1]"), "--body [1]: give a JSON object"),
        (("--body", "{"), "--body: is no JSON"),
        (("--endpoint", "chats"), "--endpoint chats: use chat or completions"),
        (("--prompts", "/none"), "--prompts /none: cannot be read"),
        (("--out", "/proc/x/result.json"), "cannot be written"),
        (("--chart", "/"), "--chart /: is a folder: name another file"),
    ],
)
def test_options_that_cannot_be_used(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Mock() as mock:
        assert bench(mock.url, *arguments) == 2
        assert mock.asked == []
    assert said in line(capsys)


def test_without_a_server_one_line_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with Mock() as mock:
        pass
    assert bench(mock.url) == 1
    assert f"{mock.url}: connection refused: start a server with 'ziphius serve" in line(capsys)
