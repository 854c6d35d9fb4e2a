"""``ziphius chat``"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import options
from ziphius.cli.plan import expert_bytes
from ziphius.cli.signals import asked_by_ctrl_c

if TYPE_CHECKING:
    from ziphius.cli.conversation import Conversation, Written
    from ziphius.inference.llm import LLM
    from ziphius.inference.outputs import Delta

NO_TEMPLATE = (
    "this checkpoint has no chat template: DeepSeek-V3's format is used; "
    "`ziphius generate` continues text"
)
COMMANDS = {
    "/help": "list these",
    "/clear": "begin a new conversation; the system prompt stays",
    "/regenerate": "write the last answer again",
    "/system TEXT": "set the system prompt; without TEXT show it; 'off' removes it",
    "/stats": "tell how fast the last answer came, and why",
    "/exit": "leave, as Ctrl-D does",
}
# For talking, where nobody says otherwise.
CALM = {"temperature": 0.6, "top_p": 0.95}
LEAVE = "/exit or Ctrl-D leaves"


def chat(
    checkpoint: options.Checkpoint,
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    max_tokens: Annotated[
        int, typer.Option(min=0, help="The most tokens of an answer; 0: the context's end.")
    ] = 2048,
    profile: options.Profile = "none",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the likeliest token; by default what the profile says, else the "
            "checkpoint, else 0.6 and the likeliest up to 0.95."
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest, up to this sum.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among so many likeliest; 0: all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample among those this share as likely as the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a conversation.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking", help="Where the model's template leaves that open."
        ),
    ] = None,
    speculation: options.Speculation = "auto",
    draft_depth: options.DraftDepth = 1,
    fast_math: options.FastMath = False,
    kernels: options.KernelChoice = "auto",
    device: options.Device = "cpu",
    cache_tokens: options.CacheTokens = 16_384,
    dtype: options.DType = None,
    without_mtp: options.WithoutMTP = False,
    lazy_experts: options.LazyExperts = None,
) -> None:
    """Talk with a CHECKPOINT on this machine.

    Ctrl-C stops an answer and keeps what is written; /help lists what else can be typed.

    From a file, a message a line: ziphius chat runs/quickstart < messages.txt
    """
    from ziphius.checkpoint.folder import checkpoint_folder
    from ziphius.cli.conversation import Conversation
    from ziphius.config.errors import BadInput
    from ziphius.inference.llm import LLM
    from ziphius.inference.params import SamplingParams
    from ziphius.serving.profiles import profile as find_profile
    from ziphius.serving.profiles import read_generation_config

    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    named = find_profile(profile)
    params = SamplingParams(
        **{
            **named.sampling(
                asked, {**CALM, **read_generation_config(checkpoint_folder(checkpoint))}
            ),
            "max_tokens": max_tokens or None,
            "seed": seed,
        }
    )
    with _loading(str(checkpoint)):
        llm = LLM(
            checkpoint, dtype=dtype, mtp=not without_mtp, fast_math=fast_math, kernels=kernels,
            device=device,
            speculation=speculation, draft_depth=draft_depth, cache_tokens=cache_tokens,
            expert_bytes=expert_bytes(lazy_experts),
        )  # fmt: skip
    if llm.tokenizer is None:
        raise BadInput(f"{checkpoint}: no tokenizer.json beside the weights: add the model's own")
    chosen = {} if thinking is None else {"thinking": thinking}
    _Chat(Conversation(llm, params, system, named, **chosen)).run()


def split_thinking(llm: LLM, prompt: str) -> Callable[[Delta | None], list[tuple[bool, str]]]:
    """Return a function that cuts an answer, step by step, into (is thinking, text); None ends it.

    A blank line is put between thinking and what follows.
    """
    from ziphius.inference.formats import opens_reasoning
    from ziphius.serving.parse import Markers, Parser

    assert llm.tokenizer is not None, "checked before the first prompt"
    parser = Parser(Markers.of(llm.tokenizer), in_reasoning=opens_reasoning(prompt), tools=False)
    was_thinking = False

    def cut(delta: Delta | None) -> list[tuple[bool, str]]:
        nonlocal was_thinking
        if delta is None:
            pieces = parser.finish()
        else:
            pieces = parser.push(delta.text, delta.token_ids, delta.offsets)
        parts = []
        for piece in pieces:
            thinking = piece.kind == "reasoning"
            if was_thinking and not thinking:
                parts.append((True, "\n\n"))
            was_thinking = thinking
            parts.append((thinking, piece.text))
        return parts

    return cut


def _loading(name: str) -> Any:
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"loading {escape(name)}")


class _Chat:
    """Reads lines, prints answers. Answers go to standard output, all else to standard error."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.interactive = sys.stdin.isatty()
        self._dim = sys.stdout.isatty()
        self._thinking = False

    def run(self) -> None:
        """Talk until the lines end, or ``/exit``."""
        if not self.conversation.has_template:
            _tell(NO_TEMPLATE)
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives ``input`` arrow keys and a history
            _tell(f"/help lists commands, Ctrl-C stops an answer, {LEAVE}")
        for line in self._lines():
            text = line.strip()
            if text.startswith("/") and not text.startswith("//"):
                if self._command(text):
                    return
            elif text:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input(_prompt(self._dim) if self.interactive else "")
            except EOFError:
                if self.interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print()
                _tell(LEAVE)
            except UnicodeDecodeError:
                _tell("that line is not valid UTF-8: it was not read")

    # --- answers ----------------------------------------------------------------------------------

    def _answer(self, text: str | None) -> None:
        """Print the answer to a message, or with None the last answer anew."""
        from ziphius.config.errors import BadInput

        conversation = self.conversation
        try:
            with asked_by_ctrl_c() as stopped:
                if text is None:
                    written = conversation.say_again(stopped, self._begin)
                else:
                    written = conversation.say(text, stopped, self._begin)
        except BadInput as error:
            _tell(str(error))
            return
        finally:
            self._show([(False, "")])
        print()
        if note := _end_note(written, conversation.room):
            _tell(note)

    def _begin(self, prompt: str) -> Callable[[Delta | None], None]:
        parts = split_thinking(self.conversation.llm, prompt)
        return lambda delta: self._show(parts(delta))

    def _show(self, parts: list[tuple[bool, str]]) -> None:
        """Print pieces of an answer, thinking dim."""
        for thinking, text in parts:
            if self._dim:
                # A model may write anything; a terminal must not obey it.
                text = "".join(c for c in text if c.isprintable() or c in "\n\t")
                if thinking != self._thinking:
                    text = ("\x1b[2m" if thinking else "\x1b[22m") + text
                    self._thinking = thinking
            print(text, end="", flush=True)

    # --- commands ---------------------------------------------------------------------------------

    def _command(self, text: str) -> bool:
        """Obey a command; say whether it is the end."""
        from ziphius.config.table import nearest

        name, _, rest = text.partition(" ")
        if name in ("/exit", "/quit"):
            return True
        if name == "/help":
            _tell("\n".join(f"{command:14}{what}" for command, what in COMMANDS.items()))
        elif name == "/clear":
            self.conversation.clear()
            _tell("a new conversation")
        elif name == "/regenerate":
            self._answer(None)
        elif name == "/system":
            self._system(rest.strip())
        elif name == "/stats":
            _tell(_stats(self.conversation))
        else:
            known = [command.split()[0] for command in COMMANDS]
            _tell(f"there is no command {name}{nearest(name, known)}; // sends a text with a slash")
        return False

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "off" else text
        _tell(f"system prompt: {self.conversation.system or 'none'}")


def _prompt(coloured: bool) -> str:
    # What readline must not count as a column is between \1 and \2.
    return "\1\x1b[1m\2> \1\x1b[0m\2" if coloured else "> "


def _tell(text: str) -> None:
    typer.echo(typer.style(text, dim=True), err=True)


def _end_note(written: Written, room: int) -> str:
    """Say why an answer ended, where it did not end by itself."""
    notes = {
        "stop": "",
        "length": f"cut at {written.tokens} tokens: --max-tokens allows more",
        "context": f"cut: the context's {room} tokens are full; /clear begins a new conversation",
        "stopped": "stopped; what is written stays",
        "error": f"broke off: {written.error}",
    }
    note = notes[written.end]
    return note if written.text else f"{note or 'an empty answer'} (your message is taken back)"


def _stats(conversation: Conversation) -> str:
    if not conversation.written:
        return "no answer yet"
    last, total = conversation.written[-1], sum(w.tokens for w in conversation.written)
    lines = [
        f"last answer: {last.tokens} tokens in {last.seconds:.2f} s, the first after "
        f"{last.first:.2f} s, then {last.speed:.1f} tokens/s",
        f"its prompt: {last.prompt_tokens} tokens, {last.cached_tokens} found in the cache",
    ]
    if last.drafted:
        lines.append(f"MTP: {last.accepted / last.drafted:.0%} of {last.drafted} drafts accepted")
    else:
        lines.append("MTP: no drafts")
    lines.append(
        f"conversation: {conversation.used} of {conversation.room} tokens; "
        f"{total} written in {len(conversation.written)} answers"
    )
    return "\n".join(lines)
