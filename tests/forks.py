"""Processes that start at once: forks of one that has imported everything and run nothing.

Python has one such server in a process, and it imports what it is told before its first fork: so
all tests take it from here, and it is told of all that any of them needs.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    *("pytest", "torch", "torch.distributed", "ziphius.training.run", "ziphius.report.page"),
    *("ziphius.inference.llm", "ziphius.evaluation.baselines", "ziphius.cli.app"),
    *("rich.progress", "rich.syntax", "rich.table", "rich.panel"),
    *("tests.training.test_kill", "tests.cli.test_signals", "tests.cli.test_faults"),
    "tests.parallel.pool",
]


def fork_server() -> ForkServerContext:
    """Return the context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
