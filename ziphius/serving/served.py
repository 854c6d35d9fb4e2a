"""The model as the routes see it: its name, its tokens as text, its conversations as prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    checkpoint_folder,
    read_json_object,
)
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import BOS_ID, FIM_BEGIN, FIM_END, FIM_HOLE, read_tokenizer
from ziphius.inference.chat import ChatTemplate, Message, read_chat_template
from ziphius.inference.formats import opens_reasoning
from ziphius.inference.params import SamplingParams
from ziphius.inference.vocabulary import Vocabulary
from ziphius.serving.options import ServeOptions
from ziphius.serving.parse import Markers, Parser
from ziphius.serving.profiles import SERVER_DEFAULTS, Profile, profile, read_generation_config


@dataclass(frozen=True)
class Prompt:
    """A conversation, ready for the engine. ``in_reasoning``: its last token opened the thought."""

    text: str
    token_ids: list[int]
    in_reasoning: bool


class Served:
    """A checkpoint's tokenizer, chat template and defaults; the weights are the engine's."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        bos: int,
        profile: Profile,
        generation: Mapping[str, Any] | None = None,
        format_told: bool = False,
    ) -> None:
        """``generation`` are the sampling options that the checkpoint sets. ``format_told``: the
        operator says by which format it converses.
        """
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self.created = int(time.time())
        self.bos, self._profile, self._generation = bos, profile, dict(generation or {})
        self._format_told = format_told
        self.vocabulary = Vocabulary(tokenizer)
        self.markers = Markers.of(tokenizer)

    @classmethod
    def read(cls, options: ServeOptions) -> Served:
        """Read what is beside a checkpoint's weights. Raises BadInput where it can't be served."""
        folder = checkpoint_folder(Path(options.engine.checkpoint))
        if not (folder / TOKENIZER_FILE).is_file():
            raise BadInput(f"{folder}: no {TOKENIZER_FILE} beside the weights: add the model's own")
        if options.chat_format is not None:
            template = ChatTemplate(format=options.chat_format)
        else:
            template = read_chat_template(folder)
        return cls(
            options.model_name,
            read_tokenizer(folder / TOKENIZER_FILE),
            template,
            bos=_first_token(folder / CONFIG_FILE),
            profile=profile(options.profile),
            generation=read_generation_config(folder),
            format_told=options.chat_format is not None,
        )

    # --- what it is -------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether it was made for conversations: it has a template, or the operator says a format.

        Others are rendered in V3's format all the same, which they may never have seen.
        """
        return self.template.source is not None or self._format_told

    @property
    def thinking(self) -> str:
        """Whether it thinks before it answers: never, optional or always."""
        return "always" if self._profile.force_thinking else self.template.thinking

    @property
    def has_tools(self) -> bool:
        """Whether calls of tools can be told from text."""
        return self.markers.call_begin is not None

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling options of a request that says nothing."""
        return {**SERVER_DEFAULTS, **self._generation, **self._profile.defaults}

    def params(self, given: Mapping[str, Any], **more: Any) -> SamplingParams:
        """Return a request's parameters: ``more``, what it gives, else what the model wants.

        Raises BadInput for values that are none.
        """
        return SamplingParams(**{**self._profile.sampling(given, self._generation), **more})

    # --- prompts ----------------------------------------------------------------------------------

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's token ids; with ``special``, the first token before them.

        Raises BadInput for text that is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the text holds a lone surrogate: it is no Unicode") from None
        ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return [self.bos, *ids] if special and ids[:1] != [self.bos] else ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included. Raises BadInput for no token."""
        for token in token_ids:
            if self.tokenizer.id_to_token(token) is None if 0 <= token < 2**32 else True:
                raise BadInput(f"token id {token} is not in the vocabulary")
        spelled = b"".join(self.vocabulary.spell(token) for token in token_ids)
        return spelled.decode(errors="replace")

    def around(self, before: str, after: str) -> list[int]:
        """Return the prompt for what stands between two texts (report section 2.2.1: FIM).

        Raises BadInput for a tokenizer without the tokens of that task.
        """
        begin, hole, end = (self.tokenizer.token_to_id(t) for t in (FIM_BEGIN, FIM_HOLE, FIM_END))
        if begin is None or hole is None or end is None:
            raise BadInput("suffix: this model's tokenizer has no fill-in-the-middle tokens")
        first, last = (self.tokens(text, special=False) for text in (before, after))
        return [self.bos, begin, *first, hole, *last, end]

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        go_on: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Return the prompt of a conversation. With ``go_on`` its last message is not ended.

        Raises BadInput for messages that the template refuses.
        """
        text = self._profile.render(
            self.template,
            messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt and not go_on,
            **_template_options(options or {}),
        )
        if go_on:
            text = _open_again(text, messages[-1])
        return Prompt(text, self.tokens(text), opens_reasoning(text))

    # --- answers ----------------------------------------------------------------------------------

    def parser(self, in_reasoning: bool, *, tools: bool) -> Parser:
        """Return what splits one answer into thoughts, text and calls."""
        return Parser(self.markers, in_reasoning=in_reasoning, tools=tools)

    def tokenizer_info(self, ends: Sequence[int] = ()) -> dict[str, Any]:
        """Return what clients that cut text into tokens themselves want to know.

        ``ends`` are the ids that end an answer: they say what a tokenizer's files leave out.
        """
        tokens = self.template.tokens
        end = self.tokenizer.id_to_token(ends[0]) if ends else None
        return {
            "bos_token": tokens.get("bos_token") or self.tokenizer.id_to_token(self.bos),
            "eos_token": tokens.get("eos_token") or end,
            "pad_token": tokens.get("pad_token"),
            "chat_template": self.template.source,
            "vocab_size": self.tokenizer.get_vocab_size(),
        }

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self.spell(token)[0] for token in token_ids]

    def spell(self, token: int) -> tuple[str, list[int]]:
        """Return a token's text and its bytes."""
        spelled = self.vocabulary.spell(token)
        return spelled.decode(errors="replace"), list(spelled)


def _first_token(config: Path) -> int:
    """Return the id that a config says every sequence begins with; V3's where it says none."""
    first = read_json_object(config).get("bos_token_id")
    return first if isinstance(first, int) else BOS_ID


def _template_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client may tell a template. Raises BadInput for what is not its to tell."""
    ours = {"messages", "tools", "add_generation_prompt"} & set(options)
    if ours:
        raise BadInput(f"chat_template_kwargs: {sorted(ours)[0]} has a field of its own")
    for name in ("thinking", "enable_thinking"):
        if not isinstance(options.get(name), bool | None):
            raise BadInput(f"chat_template_kwargs: {name} = {options[name]!r}: use true or false")
    return {name: value for name, value in options.items() if name.isidentifier()}


def _open_again(text: str, last: Message) -> str:
    """Take away what a template writes behind the last message."""
    content = last.get("content")
    if last.get("role") != "assistant" or not isinstance(content, str) or not content:
        raise BadInput("continue_final_message: the last message must be the assistant's, of text")
    at = text.rfind(content)
    if at < 0:
        raise BadInput("continue_final_message: the template changes the last message's text")
    return text[: at + len(content)]
