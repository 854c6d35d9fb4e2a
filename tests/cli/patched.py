"""``python -m tests.cli.patched MODULE:FUNCTION ARGUMENTS``: the command, changed before."""

from __future__ import annotations

import importlib
import sys

from ziphius.cli.app import run


def main() -> None:
    """Call the function, then the command with what else there is."""
    module, _, name = sys.argv.pop(1).partition(":")
    getattr(importlib.import_module(module), name)()
    run()


if __name__ == "__main__":
    main()
