"""``schemathesis``: thousands of requests made up from ``/openapi.json``, right and wrong ones."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from tests.clients.session import Session

EXAMPLES = 25
# Rules that no schema can say decide whether a request has an answer: a template's about roles,
# the context's length, one field needing another. That is told by 400.
NOT_ASKED = "positive_data_acceptance"
SLOWEST = "120"  # seconds: answers may fill the whole context, beside others


def drive(session: Session) -> None:
    """Try every route: with any key, with the key that is wanted, and as the operator."""
    case = session.case
    _run(session, "any key", case.url, "--exclude-path-regex", "^/admin/", examples=EXAMPLES)
    # Fewer: one answer is computed at a time there.
    _run(
        session, "a key", case.strict_url, "--header", f"Authorization: Bearer {case.keys[0]}",
        "--exclude-path-regex", "^/(admin/|v1/(chat|completions|responses|messages))", examples=10,
    )  # fmt: skip
    _run(
        session, "the admin key", case.strict_url,
        "--header", f"Authorization: Bearer {case.admin_key}",
        "--include-path", "/admin/cache/clear", examples=10,
    )  # fmt: skip


def _run(session: Session, name: str, url: str, *flags: str, examples: int) -> None:
    # One seed a day: what is found can be found again, and another day finds other things.
    seed = str(date.today().toordinal())
    out = session.scratch / f"{name.replace(' ', '-')}.json"
    command = [
        session.tool("schemathesis"), "run", f"{url}/openapi.json", "--checks", "all",
        "--exclude-checks", NOT_ASKED, "--max-response-time", SLOWEST, "--request-timeout", "180",
        "--max-examples", str(examples), "--seed", seed, "--report", "json",
        "--report-json-path", str(out), *flags,
    ]  # fmt: skip
    done = session.run(command, log=f"{out.stem}.log", folder=session.scratch)
    if not out.is_file():
        last = (done.stdout + done.stderr).strip().splitlines()[-2:]
        session.result.add(f"{name}: it runs", " / ".join(last))
        return
    _report(session, name, json.loads(out.read_text("utf-8")))


def _report(session: Session, name: str, report: Any) -> None:
    """Add a check for each operation, with what failed there; and one for the whole run."""
    wrong: dict[str, list[str]] = {}
    for failure in report["failures"]:
        for operation in failure["operations"]:
            wrong.setdefault(operation, []).append(f"{failure['title']} ({failure['count']})")
    for operation in sorted({*report["valid_rates"], *wrong}):
        session.result.add(f"{name}: {operation}", "; ".join(wrong.get(operation, [])))
    errors = [str(error)[:200] for error in report["errors"]]
    generated, tested = report["test_cases"]["generated"], report["operations"]["tested"]
    if not report["complete"] or tested < report["operations"]["selected"] or not generated:
        errors.append(f"{tested} operations of {report['operations']['selected']} were tested")
    session.result.add(f"{name}: all {generated} requests", "; ".join(errors))
