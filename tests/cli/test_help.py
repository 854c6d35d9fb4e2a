"""What --help shows is what was written: nothing of it is taken for markup."""

from __future__ import annotations

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ziphius.cli.app import make_app

VERBS = {c.name or c.callback.__name__: c.callback for c in make_app().registered_commands}  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", VERBS)
def test_every_word_of_a_verbs_help_is_shown(verb: str) -> None:
    written = VERBS[verb].__doc__
    assert written
    shown = CliRunner().invoke(make_app(), [verb, "--help"]).output
    assert "".join(written.split()) in "".join(shown.split())


def test_every_verb_is_listed() -> None:
    shown = CliRunner().invoke(make_app(), ["--help"]).output
    commands = get_command(make_app()).commands  # type: ignore[attr-defined]
    assert {"sft", "grpo", "extend"} <= commands.keys() >= VERBS.keys()
    assert all(f" {verb} " in shown for verb in VERBS)
