"""Every known mistake would be noticed: the table of mutations is sound, and no mutant survives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import ROOT, Mutation, main, read_table

TABLE = read_table()
PARTS = 8  # each a test of its own, so that a slow machine's time is not up in the midst of them
NAMES = [f"{m.number}: {m.what}" for m in TABLE]
# Points of facts 13 that have code in the package; the others are listed in the table's head.
APPLICABLE = {*range(1, 19), 25, 26, 29}


@pytest.mark.parametrize("mutation", TABLE, ids=NAMES)
def test_the_text_to_change_is_there_exactly_once(mutation: Mutation) -> None:
    text = (ROOT / "ziphius" / mutation.file).read_text("utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")


@pytest.mark.parametrize("mutation", TABLE, ids=NAMES)
def test_the_tests_that_must_fail_exist(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), test


def test_every_applicable_erratum_has_a_mutation() -> None:
    assert all(bool(m.errata) != bool(m.bug) for m in TABLE)
    numbers = {int(n) for m in TABLE for n in m.errata.split(",") if n.strip()}
    assert numbers == APPLICABLE


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ziphius").mkdir()
    (tmp_path / "ziphius" / "a.py").write_text("one two two")
    wrong = Mutation(7, "nothing", "a.py", "three", "four", ("tests",))
    with pytest.raises(ValueError, match="mutation 7: 0 times"):
        wrong.apply(tmp_path)
    twice = Mutation(8, "too much", "a.py", "two", "four", ("tests",))
    with pytest.raises(ValueError, match="mutation 8: 2 times"):
        twice.apply(tmp_path)
    once = Mutation(9, "right", "a.py", "one", "four", ("tests",))
    once.apply(tmp_path)
    assert (tmp_path / "ziphius" / "a.py").read_text() == "four two two"


def test_the_table_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "2"]) == 0
    assert capsys.readouterr().out.startswith("  2 13.1: gates are recovered")
    assert main(["--only", "100000"]) == 1


def test_what_an_older_torch_has_not_is_left_out() -> None:
    old, new = (Mutation(1, "", "", "", "", (), since_torch=v) for v in ("2.11", "100.0"))
    assert old.runs
    assert not new.runs


def test_the_parts_are_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    for part in range(1, PARTS + 1):
        assert main(["--list", "--part", f"{part}/{PARTS}"]) == 0
    numbers = [int(line[:3]) for line in capsys.readouterr().out.splitlines()]
    assert sorted(numbers) == [m.number for m in TABLE]
    for wrong in ("8", "a/b", "0/8", "9/8"):
        with pytest.raises(SystemExit):
            main(["--part", wrong])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_no_mutant_survives(part: int) -> None:
    table = str(ROOT / "tests" / "mutations.py")
    done = subprocess.run(
        [sys.executable, table, "--part", f"{part}/{PARTS}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    mutations = sum(m.runs for m in TABLE[part - 1 :: PARTS])
    assert f"{mutations} mutations" in done.stdout
