"""The documentation says what is: its commands run, and its index points at what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a documented command may be, and the module that it is.
MODULES = {"ziphius": "ziphius", "torchrun": "torch.distributed.run"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.timeout(900)  # about a hundred commands, one after the other
def test_every_documented_command_runs_in_its_order(tmp_path: Path) -> None:
    """One folder for all pages; a Python block runs after the commands of its page.

    A server, with ``&`` behind it, runs to the end of its page.
    """
    for page in PAGES:
        with ExitStack() as servers:
            for block in blocks(page, "console"):
                for line in block.splitlines():
                    if not line.startswith("$ "):
                        continue
                    program, *arguments = shlex.split(line[2:])
                    module = MODULES.get(program)
                    assert module, f"{page.name}: {line}: only {', '.join(MODULES)} are run here"
                    command = [sys.executable, "-m", module, *arguments]
                    if arguments[-1] == "&":
                        servers.enter_context(serving(tmp_path, command[:-1], line))
                    else:
                        run_in(tmp_path, command, line)
            for block in blocks(page, "python"):
                run_in(tmp_path, [sys.executable, "-c", block], f"{page.name}: python block")


@contextmanager
def serving(folder: Path, command: list[str], shown: str) -> Iterator[None]:
    """Run a server from the moment that it is ready; it must end well when it is told to."""
    log = folder / "server.log"
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, stderr=out) as server:
        try:
            ends = time.monotonic() + 240
            while "chat page" not in log.read_text():
                assert server.poll() is None, f"{shown}\n{log.read_text()}"
                assert time.monotonic() < ends, f"{shown}: not ready\n{log.read_text()}"
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
        assert server.wait(60) == 0, f"{shown}\n{log.read_text()}"


def run_in(folder: Path, command: list[str], shown: str) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in contents, page.name


def index_rows() -> list[list[str]]:
    rows = []
    for line in (ROOT / "docs" / "report-index.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and "`" in cells[2]:
            rows.append(cells)
    return rows


def test_the_index_has_rows() -> None:
    assert len(index_rows()) > 25


@pytest.mark.parametrize("row", index_rows(), ids=lambda row: row[0][:40])
def test_the_index_points_at_code_and_tests_that_exist(row: list[str]) -> None:
    code, tests = re.findall(r"`([^`]+)`", row[2]), re.findall(r"`([^`]+)`", row[3])
    assert code
    assert tests
    for reference in code:
        require(reference, ROOT / "ziphius", r"(?:def|class) {name}\b|\b{name}\b\s*[:=]")
    for reference in tests:
        require(reference, ROOT / "tests", r"def {name}\b")


def require(reference: str, folder: Path, pattern: str) -> None:
    """Check ``path`` or ``path:name`` below a folder."""
    path, _, name = reference.partition(":")
    assert (folder / path).is_file(), reference
    if name:
        text = (folder / path).read_text("utf-8")
        assert re.search(pattern.format(name=re.escape(name)), text), reference


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
