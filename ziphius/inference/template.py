"""The built-in chat formats as Jinja, for checkpoints that others open too."""

from __future__ import annotations

from ziphius.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, USER
from ziphius.inference.formats import FORMATS, Format
from ziphius.inference.tools import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEPARATOR,
)

_THINKS = {
    "never": "false",
    "optional": "(thinking | default(enable_thinking | default(false)))",
    "always": "true",
}
_SYSTEM = (
    "{%- for m in messages if m['role'] == 'system' -%}"
    "{{- ('\\n\\n' if ns.system else '') + m['content'] -}}{%- set ns.system = true -%}"
    "{%- endfor -%}"
)


def chat_template_of(format: str) -> str:
    """Return the Jinja source that renders conversations as the built-in format of a name does.

    Tools that a model may call are for the caller to describe, in a system message.
    """
    chosen = FORMATS[format]
    begin, end = (_text(mark if chosen.outputs_marked else "") for mark in _OUTPUTS)
    return (
        f"{{%- set thinks = {_THINKS[chosen.thinking]} -%}}"
        "{%- set ns = namespace(before='', system=false) -%}"
        f"{{{{- {_text(BOS)} -}}}}{_SYSTEM}"
        "{%- for m in messages if m['role'] != 'system' -%}"
        f"{{%- if ns.before == 'tool' and m['role'] != 'tool' -%}}{{{{- {end} -}}}}{{%- endif -%}}"
        f"{{%- if m['role'] == 'user' -%}}{{{{- {_text(USER)} + m['content'] -}}}}"
        "{%- elif m['role'] == 'tool' -%}"
        f"{{{{- ('' if ns.before == 'tool' else {begin}) + {_text(OUTPUT_BEGIN)} + m['content'] + "
        f"{_text(OUTPUT_END)} -}}}}"
        f"{{%- else -%}}{_assistant(chosen)}{{%- endif -%}}"
        "{%- set ns.before = m['role'] -%}{%- endfor -%}"
        f"{{%- if ns.before == 'tool' -%}}{{{{- {end} -}}}}"
        "{%- elif add_generation_prompt -%}"
        f"{{{{- {_text(ASSISTANT)} + ({_text(chosen.opened)} if thinks else "
        f"{_text(chosen.unopened)}) -}}}}{{%- endif -%}}"
    )


_OUTPUTS = (OUTPUTS_BEGIN, OUTPUTS_END)


def _assistant(format: Format) -> str:
    splits = ", 1" if format.earlier else ""
    return (
        f"{{%- if ns.before != 'tool' -%}}{{{{- {_text(ASSISTANT + format.earlier)} -}}}}"
        "{%- endif -%}"
        f"{{{{- (m.get('content') or '').split({_text(END_THINK)}{splits})[-1] -}}}}"
        f"{{%- if m.get('tool_calls') -%}}{{{{- {_text(CALLS_BEGIN)} -}}}}"
        f"{_calls(format)}{{{{- {_text(CALLS_END)} -}}}}{{%- endif -%}}{{{{- {_text(EOS)} -}}}}"
    )


def _calls(format: Format) -> str:
    plain = format.calls == "plain"
    head = _text(CALL_BEGIN)
    if not plain:
        head += f" + (c.get('type') or 'function') + {_text(SEPARATOR)}"
    middle = _text(SEPARATOR) if plain else _text("\n```json\n")
    end, between = _text(CALL_END if plain else f"\n```{CALL_END}"), _text("" if plain else "\n")
    return (
        "{%- for c in m['tool_calls'] -%}"
        "{%- set given = c['function']['arguments'] -%}"
        "{%- set given = given if given is string else given | tojson -%}"
        f"{{{{- ('' if loop.first else {between}) + {head} + c['function']['name'] + {middle} + "
        f"given + {end} -}}}}"
        "{%- endfor -%}"
    )


def _text(text: str) -> str:
    """Write a text as Jinja does."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
