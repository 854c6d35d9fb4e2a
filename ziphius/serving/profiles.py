"""Named profiles: the advice that models were published with, and defaults of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ziphius.checkpoint.folder import read_json_object
from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.data.tokenizer import ASSISTANT, THINK
from ziphius.inference.chat import ChatTemplate, Message, check_messages
from ziphius.inference.params import SamplingParams
from ziphius.inference.tools import check_tools, with_tools

GENERATION_FILE = "generation_config.json"
SERVER_DEFAULTS: Mapping[str, Any] = MappingProxyType({"temperature": 1.0, "top_p": 1.0})

# Names in generation_config.json, and ours.
_GENERATION = MappingProxyType(
    {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How a model wants to be asked. ``defaults`` are sampling options of requests that say nothing
    of them.
    """

    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # What stands in system messages goes to the head of the first user's turn.
    system_in_user_turn: bool = False
    # A prompt that is open for the assistant ends with the tag that opens its reasoning.
    force_thinking: bool = False
    # The request's temperature is that of DeepSeek's API, which V3-0324's model takes lower.
    api_temperature: bool = False

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Return ``template.render(...)`` as this profile has it; the errors are those."""
        if self.system_in_user_turn:
            checked = check_messages(messages)
            if tools and not template.knows_tools:
                checked, tools = with_tools(checked, check_tools(tools), template.calls), None
            messages = system_in_user_turn(checked)
        text = template.render(messages, tools=tools, **options)
        if self.force_thinking and text.endswith(ASSISTANT):
            text += f"{THINK}\n"
        return text

    def sampling(
        self, request: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a request's options with what it leaves out.

        ``generation`` are the checkpoint's defaults. The order is request, profile, checkpoint,
        server. An option that is None was left out. Raises BadInput for a temperature that is none.
        """
        given = {name: value for name, value in request.items() if value is not None}
        chosen = {**SERVER_DEFAULTS, **(generation or {}), **self.defaults, **given}
        if self.api_temperature:
            chosen["temperature"] = model_temperature(chosen["temperature"])
        return chosen


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "none": Profile(),
        # The model card of R1 (facts 8.9).
        "r1": Profile(
            defaults=MappingProxyType({"temperature": 0.6, "top_p": 0.95}),
            system_in_user_turn=True,
            force_thinking=True,
        ),
        # The model card of V3-0324 (facts 8.10).
        "v3-0324": Profile(
            defaults=MappingProxyType({"temperature": 1.0}),
            api_temperature=True,
        ),
    }
)


def profile(name: str) -> Profile:
    """Return a profile by its name. Raises BadInput for one that is not known."""
    if name not in PROFILES:
        raise BadInput(f"profile '{name}'{nearest(name, PROFILES)}")
    return PROFILES[name]


def model_temperature(temperature: Any) -> float:
    """Return the model's temperature for one of DeepSeek's API: 0.3 T up to 1, T - 0.7 above.

    Raises BadInput for what is no temperature.
    """
    asked = SamplingParams(temperature=temperature).temperature
    return 0.3 * asked if asked <= 1 else asked - 0.7


def system_in_user_turn(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages without a system's: its texts begin the first user's turn, made if need be.

    ``messages`` have their text as one string each.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
    turns = [dict(message) for message in messages if message["role"] != "system"]
    if not system:
        return turns or [{"role": "user", "content": ""}]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{system}\n\n{turn['content']}"
            return turns
    return [{"role": "user", "content": system}, *turns]


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the sampling options that a checkpoint's ``generation_config.json`` sets, if any.

    ``do_sample`` false is temperature 0; what has nothing to do with sampling is left out. Raises
    BadInput for a file that can't be read, and for values that are no such options.
    """
    file = folder / GENERATION_FILE
    config = read_json_object(file)
    found = {
        ours: config[theirs]
        for theirs, ours in _GENERATION.items()
        if config.get(theirs) is not None
    }
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    return found
