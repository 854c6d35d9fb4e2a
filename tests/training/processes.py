"""Processes that are begun, waited for, and killed."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess

from tests.forks import fork_server


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start ``target``, a function of a module, in a process of its own."""
    process = fork_server().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    """Wait for a process; return its exit code, or minus the signal that killed it."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode
