"""The chat formats that need no template: V3's, R1's and V3.1's (facts 8.10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from ziphius.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from ziphius.inference.tools import (
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    CallStyle,
    calls_text,
)

# Whether a prompt opens the model's reasoning: not at all, where it is asked for, or every time.
Thinking = Literal["never", "optional", "always"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """System texts first, then turns without anything between them.

    An assistant's turn ends with the end of sentence. Of an earlier one the reasoning is left out.
    A checkpoint's own template has the wording of tools that the model was trained on; here it is
    ours (``tools.tools_text``).
    """

    thinking: Thinking
    # Behind the assistant's mark, when the next turn begins: with thinking, and without.
    opened: str
    unopened: str
    # Behind the assistant's mark of an earlier turn.
    earlier: str = ""
    calls: CallStyle = "fenced"
    # Whether marks stand around all outputs of tools, beside those around each.
    outputs_marked: bool = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None = None,
    ) -> str:
        """Return the conversation's text, open for the assistant's next turn if asked for.

        ``messages`` have their text as one string each. Behind outputs of tools the assistant goes
        on at once, without a mark.
        """
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        parts, before = [BOS, system], ""
        for message in messages:
            if message["role"] == "system":
                continue
            if before == "tool" and message["role"] != "tool":
                parts.append(self._outputs(OUTPUTS_END))
            parts += self._turn(message, before)
            before = message["role"]
        if before == "tool":
            parts.append(self._outputs(OUTPUTS_END))
        elif add_generation_prompt:
            thinks = self.thinking == "always" or (self.thinking == "optional" and thinking)
            parts += [ASSISTANT, self.opened if thinks else self.unopened]
        return "".join(parts)

    def _turn(self, message: Mapping[str, Any], before: str) -> list[str]:
        content = message["content"]
        if message["role"] == "user":
            return [USER, content]
        if message["role"] == "tool":
            first = "" if before == "tool" else self._outputs(OUTPUTS_BEGIN)
            return [first, OUTPUT_BEGIN, content, OUTPUT_END]
        calls = message.get("tool_calls") or ()
        mark = [] if before == "tool" else [ASSISTANT, self.earlier]
        called = calls_text(calls, self.calls) if calls else ""
        return [*mark, self._without_reasoning(content or ""), called, EOS]

    def _outputs(self, mark: str) -> str:
        return mark if self.outputs_marked else ""

    def _without_reasoning(self, content: str) -> str:
        """Return what follows the end of reasoning: of the last in V3 and R1, the first in V3.1."""
        return content.split(END_THINK, 1 if self.earlier else -1)[-1]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "v3": Format(thinking="never", opened="", unopened=""),
        "r1": Format(thinking="always", opened=f"{THINK}\n", unopened=f"{THINK}\n"),
        "v3.1": Format(
            thinking="optional",
            opened=THINK,
            unopened=END_THINK,
            earlier=END_THINK,
            calls="plain",
            outputs_marked=False,
        ),
    }
)


def opens_reasoning(prompt: str) -> bool:
    """Say whether a prompt ends inside the model's reasoning, so that its answer begins there."""
    return prompt.rstrip().endswith(THINK)
