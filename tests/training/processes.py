"""Processes that start at once: forks of one that has imported everything and run nothing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

# One process serves all tests of a session, so it is told about all of them.
_PRELOADED = (
    *("pytest", "torch", "ziphius.training.run", "ziphius.report.page"),
    *("ziphius.inference.llm", "ziphius.evaluation.baselines", "ziphius.cli.app"),
    *("rich.progress", "rich.syntax", "rich.table", "rich.panel"),
    *("tests.training.test_kill", "tests.cli.test_signals", "tests.cli.test_faults"),
)


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start ``target``, a function of a module, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    """Wait for a process; return its exit code, or minus the signal that killed it."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode
