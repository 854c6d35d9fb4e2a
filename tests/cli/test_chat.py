"""``ziphius chat``: a conversation, its commands, and the terminal around it."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ziphius
from tests.support import random_model
from ziphius.cli import chat as chat_module
from ziphius.cli.app import run
from ziphius.cli.chat import split_thinking
from ziphius.cli.conversation import ContextFull, Conversation, Written
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.inference.llm import LLM
from ziphius.inference.outputs import Delta
from ziphius.inference.params import SamplingParams
from ziphius.inference.stop import AnswerText
from ziphius.inference.vocabulary import Vocabulary

GREEDY = {"temperature": 0.0, "max_tokens": 12}
LONG = 400  # tokens that the model writes before it ends
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model's checkpoint; it writes ``LONG`` tokens at least to 'hello'."""
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = train_tokenizer(["a whale dives deep and sings. " * 9], 330)
    for seed in range(20):
        model = random_model(vocab_size=330, max_position_embeddings=4096, seed=seed)
        llm = LLM.of(model, tokenizer, kernels="torch")
        ids = llm.encode_chat([{"role": "user", "content": "hello"}])
        params = SamplingParams(temperature=0, max_tokens=LONG)
        if llm.generate(ids, params)[0].outputs[0].finish_reason == "length":
            ziphius.save(model, path)
            save_tokenizer(tokenizer, path)
            return path
    raise AssertionError("every model ends its answer")


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder, kernels="torch", cache_tokens=1024)


def never() -> bool:
    return False


class Shown:
    """Takes what an answer adds."""

    def __init__(self) -> None:
        self.text, self.prompts, self.ended = "", list[str](), 0

    def __call__(self, prompt: str) -> Callable[[Delta | None], None]:
        self.prompts.append(prompt)
        return self.take

    def take(self, delta: Delta | None) -> None:
        self.text += delta.text if delta is not None else ""
        self.ended += delta is None


def after(steps: int) -> Callable[[], bool]:
    """Say that it is time to stop after so many steps."""
    left = iter(range(steps))
    return lambda: next(left, None) is None


# --- the conversation -----------------------------------------------------------------------------


def test_every_turn_is_answered_as_the_whole_conversation_would_be(llm: LLM, folder: Path) -> None:
    conversation = Conversation(llm, SamplingParams(**GREEDY), "Be brief.")
    fresh = LLM(folder, kernels="torch", cache_tokens=1024, prefix_cache=False)
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("hello", "and deep?", "again"):
        shown = Shown()
        written = conversation.say(text, never, shown)
        messages.append({"role": "user", "content": text})
        expected = fresh.chat(messages, SamplingParams(**GREEDY))[0]
        assert written.text == shown.text == expected.outputs[0].text
        assert written.prompt_tokens == len(expected.prompt_token_ids)
        assert shown.prompts == [expected.prompt]
        assert shown.ended == 1
        messages.append({"role": "assistant", "content": written.text})
    assert conversation.turns == messages[1:]
    assert conversation.written[2].cached_tokens > 0, "later turns find the earlier ones"
    assert conversation.used == written.prompt_tokens + written.tokens


def test_stopping_keeps_what_is_written_and_the_engine_goes_on(llm: LLM) -> None:
    conversation = Conversation(llm, SamplingParams(temperature=0, max_tokens=LONG))
    written = conversation.say("hello", after(9), Shown())
    assert written.end == "stopped"
    assert 0 < written.tokens < LONG
    assert conversation.turns[-1] == {"role": "assistant", "content": written.text}
    assert llm.engine.idle
    whole = conversation.say_again(never, Shown())
    assert whole.end == "length"
    assert whole.text.startswith(written.text)
    assert len(conversation.turns) == 2


def test_a_message_without_any_answer_is_taken_back(llm: LLM) -> None:
    conversation = Conversation(llm, SamplingParams(**GREEDY))
    assert conversation.say("hello", after(0), Shown()).text == ""
    assert conversation.turns == []
    first = conversation.say("hello", never, Shown())
    assert conversation.say_again(after(0), Shown()).text == ""
    assert conversation.turns[-1]["content"] == first.text


def test_a_full_context_is_said_and_nothing_is_left_out(folder: Path) -> None:
    llm = LLM(folder, kernels="torch", cache_tokens=64)
    conversation = Conversation(llm, SamplingParams(temperature=0, max_tokens=None))
    assert conversation.room == 65, "the cache is smaller than the model's context"
    written = conversation.say("hello", never, Shown())
    assert written.end == "context"
    assert written.prompt_tokens + written.tokens == 65 == conversation.used
    turns = list(conversation.turns)
    with pytest.raises(ContextFull, match="this message was not added; /clear begins"):
        conversation.say("more", never, Shown())
    assert conversation.turns == turns
    conversation.clear()
    assert conversation.say("hello", never, Shown()).text == written.text


def test_a_limit_that_was_asked_for_is_no_full_context(llm: LLM) -> None:
    conversation = Conversation(llm, SamplingParams(**GREEDY))
    assert conversation.say("hello", never, Shown()).end == "length"


def test_answers_of_a_seed_repeat_and_differ_from_each_other(llm: LLM) -> None:
    def talk(seed: int) -> list[str]:
        conversation = Conversation(llm, SamplingParams(temperature=2.0, max_tokens=12, seed=seed))
        conversation.say("hello", never, Shown())
        conversation.say_again(never, Shown())
        return [written.text for written in conversation.written]

    assert talk(1) == talk(1) != talk(2)
    assert len(set(talk(1))) == 2


def test_there_must_be_an_answer_to_write_again(llm: LLM) -> None:
    with pytest.raises(BadInput, match="no answer yet"):
        Conversation(llm, SamplingParams()).say_again(never, Shown())


# --- lines that are no terminal's -----------------------------------------------------------------


def talk(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``ziphius chat`` in this process on lines of text; return its exit code."""
    given = ["--kernels", "torch", "--temperature", "0", "--max-tokens", "12", *arguments]
    monkeypatch.setattr(sys, "argv", ["ziphius", "chat", str(folder), *given])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as stopped:
        run()
    return int(stopped.value.code or 0)


def expected(folder: Path, *texts: str, system: str = "") -> list[str]:
    conversation = Conversation(LLM(folder, kernels="torch"), SamplingParams(**GREEDY), system)
    return [conversation.say(text, never, Shown()).text for text in texts]


def test_lines_are_answered_in_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(folder, "hello\n\n  and deep?\n", monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{text}\n" for text in expected(folder, "hello", "and deep?"))
    assert shown.err.count(chat_module.NO_TEMPLATE) == 1
    assert shown.err.count("cut at 12 tokens: --max-tokens allows more") == 2


def test_commands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "/regenerate", "/stats", "hello", "/regenerate", "/stats", "/system Sing.", "/clear",
        "hello", "/system off", "/clear", "//hello", "/halp", "/help", "/exit", "hello",
    ]  # fmt: skip
    assert talk(folder, "\n".join(lines), monkeypatch) == 0
    shown = capsys.readouterr()
    (plain,), (sung,) = expected(folder, "hello"), expected(folder, "hello", system="Sing.")
    (slash,) = expected(folder, "/hello")
    assert len({plain, sung, slash}) == 3
    assert shown.out == "".join(f"{text}\n" for text in (plain, plain, sung, slash))
    for said in (
        "there is no answer yet to write again", "no answer yet\n", "last answer: 12 tokens in",
        "24 written in 2 answers", "found in the cache", "MTP: ", "system prompt: Sing.",
        "system prompt: none", "a new conversation", "no command /halp; did you mean '/help'?",
        "/regenerate   write the last answer again",
    ):  # fmt: skip
        assert said in shown.err, said


def test_a_checkpoint_with_a_template_is_asked_in_its_words_and_says_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).symlink_to(file)
    (own / "chat_template.jinja").write_text(TEMPLATE + "{{ '#' if thinking }}", "utf-8")
    seen: list[str] = []

    def split(llm: LLM, prompt: str) -> Any:
        seen.append(prompt)
        return lambda delta: []

    monkeypatch.setattr(chat_module, "split_thinking", split)
    assert talk(own, "hello", monkeypatch, "--thinking", "--system", "Sing.") == 0
    assert seen == ["[system] Sing.\n[user] hello\n#"]
    shown = capsys.readouterr()
    assert shown.out == "\n"
    assert "no chat template" not in shown.err


def test_a_full_context_suggests_clear(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "hello\nmore\n/clear\nhello\n"
    options = ("--cache-tokens", "64", "--max-tokens", "0")
    assert talk(folder, lines, monkeypatch, *options) == 0
    shown = capsys.readouterr()
    assert shown.err.count("cut: the context's 65 tokens are full; /clear begins a new") == 2
    assert shown.err.count("this message was not added; /clear begins a new conversation") == 1
    first, second = shown.out[: len(shown.out) // 2], shown.out[len(shown.out) // 2 :]
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--speculation", "maybe"), "speculation = 'maybe'"),
        (("--kernels", "magic"), "kernels = 'magic'"),
    ],
)
def test_options_that_cannot_be_used(
    arguments: tuple[str, ...], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert talk(folder, "hello", monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def written(end: str, text: str = "text", error: str | None = None) -> Written:
    return Written(text, end, 7, 5, 0, 1.0, 0.1, 0, 0, error)


def test_how_an_answer_ended_is_told() -> None:
    note = chat_module._end_note
    assert note(written("stop"), 99) == ""
    assert note(written("error", error="a logit is nan"), 99) == "broke off: a logit is nan"
    assert note(written("stop", ""), 99) == "an empty answer (your message is taken back)"
    assert note(written("stopped", ""), 99).endswith("(your message is taken back)")


# --- a terminal -----------------------------------------------------------------------------------


class Terminal:
    """``ziphius chat`` on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ziphius", "chat", str(folder), "--kernels", "torch",
             "--temperature", "0", "--max-tokens", "0", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm"}, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)

    def until(self, pattern: bytes, seconds: float = 60) -> bytes:
        """Read until a pattern has come behind what was read before; return what came."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown, re.S)) is None:
            left = deadline - time.monotonic()
            assert left > 0, self.shown
            if select.select([self.ours], [], [], left)[0]:
                self.shown += os.read(self.ours, 2**16)
        came, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return came

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def interrupt(self) -> bytes:
        """Press Ctrl-C at a prompt; return what came up to the next prompt.

        Between a prompt's appearance and its listening Python hears a signal with the next key
        only: as a person would, press again.
        """
        for _ in range(5):
            self.type(b"\x03")
            with suppress(AssertionError):
                return self.until(PROMPT, 5)
        return self.until(PROMPT, 5)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        os.close(self.ours)


def _own_terminal() -> None:
    """Make standard input the terminal that sends its signals here.

    Who runs in front hears Ctrl-C, whatever the tests were started by: in the background of a
    script it is ignored, and programs inherit that.
    """
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


PROMPT = rb"> \x01?\x1b\[0m\x02?"


@pytest.fixture
def terminal(folder: Path) -> Any:
    terminal = Terminal(folder)
    yield terminal
    terminal.close()


def test_ctrl_c_and_ctrl_d_and_arrows(terminal: Terminal) -> None:
    hello = terminal.until(PROMPT)
    assert b"/help lists commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves" in hello
    assert b"/exit or Ctrl-D leaves" in terminal.interrupt()
    terminal.type(b"hello\r")
    terminal.until(rb"hello\r\n.{20}")  # it writes
    terminal.type(b"\x03")
    came = terminal.until(PROMPT)
    assert b"stopped; what is written stays" in came
    terminal.type(b"/stats\r")
    assert b"conversation: " in terminal.until(PROMPT)
    terminal.type(b"\x1b[A")  # the line before
    terminal.until(rb"/stats")
    terminal.type(b"\r")
    assert b"last answer: " in terminal.until(PROMPT)
    terminal.type(b"\x04")
    assert terminal.process.wait(20) == 0


def test_thinking_is_told_from_the_answer(llm: LLM) -> None:
    """However the answer is cut; a blank line stands between the two."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("a\nb</think>\n\nc", add_special_tokens=False).ids
    vocabulary = Vocabulary(llm.tokenizer)
    text = AnswerText(vocabulary, SamplingParams(max_tokens=None))
    cut = split_thinking(llm, "<｜Assistant｜><think>\n")
    parts = []
    for token in ids:
        shown = text.push(token)
        parts += cut(Delta(0, shown, [token], [text.offsets[-1]]))
    parts += cut(None)
    assert "".join(piece for thinking, piece in parts if thinking) == "a\nb\n\n"
    assert "".join(piece for thinking, piece in parts if not thinking) == "c"
