"""Let clients that are not ours judge the server.

    python -m tests.clients                      all of them, on a small checkpoint made for it
    python -m tests.clients --only lm_eval       one
    python -m tests.clients --checkpoint FOLDER  another checkpoint

Each client has a virtual environment below .cache/clients, made when it is first needed. The
results go to benchmarks/results/DATE-clients.json. Exit code 0: every check passed; 1: some did
not; 2: no server, or no such client.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

from tests.clients import drive_guidellm, drive_lm_eval, drive_schemathesis
from tests.clients.checks.case import Case
from tests.clients.environments import CannotMake, Environment
from tests.clients.results import ROOT, Result, record, table
from tests.clients.serve import NoServer, serving, small_checkpoint
from tests.clients.session import Session

CACHE = ROOT / ".cache" / "clients"
ENVIRONMENTS = (
    Environment("openai", "openai", ("openai>=3.50,<4",), 60),
    Environment("anthropic", "anthropic", ("anthropic>=2.10,<3",), 60),
    Environment(
        "langchain",
        "langchain-openai",
        ("langchain-openai>=1.7,<2", "litellm>=1.109,<2"),
        400,
        beside=("litellm",),
    ),
    Environment("lm_eval", "lm-eval", ("lm-eval[api]>=0.4.13,<0.5", "transformers>=5.19,<6"), 930),
    Environment("guidellm", "guidellm", ("guidellm>=0.8.1,<0.9",), 1500, torch=True),
    Environment("schemathesis", "schemathesis", ("schemathesis>=4.32,<5",), 100),
)
DRIVERS = {
    "lm_eval": drive_lm_eval.drive,
    "guidellm": drive_guidellm.drive,
    "schemathesis": drive_schemathesis.drive,
}


def main() -> int:
    """Run the clients; return the exit code."""
    arguments = _arguments()
    CACHE.mkdir(parents=True, exist_ok=True)
    chosen = [e for e in ENVIRONMENTS if arguments.only in (None, e.name)]
    try:
        checkpoint = (arguments.checkpoint or small_checkpoint(CACHE)).resolve()
        case = Case("", checkpoint.name, "")
        strict = [*case.strict_flags, "--admin-key", case.admin_key]
        strict += [part for key in case.keys for part in ("--api-key", key)]
        with (
            serving(checkpoint, CACHE / "server.log") as url,
            serving(checkpoint, CACHE / "strict.log", strict) as strict_url,
        ):
            case = dataclasses.replace(case, url=url, strict_url=strict_url)
            results = [_judge(one, case, checkpoint) for one in chosen]
    except NoServer as error:
        print(f"error: {error}")
        return 2
    print(table(results))
    kept = "a small one, trained for two steps" if arguments.checkpoint is None else checkpoint.name
    path = record(results, kept, only=arguments.only)
    print(f"written to {path.relative_to(ROOT)}")
    return int(any(result.failed for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.clients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [e.name for e in ENVIRONMENTS]
    parser.add_argument("--only", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--checkpoint", type=Path, help="a run folder or a checkpoint")
    return parser.parse_args()


def _judge(environment: Environment, case: Case, checkpoint: Path) -> Result:
    """Run one client; what breaks it is a failed check."""
    result = Result(environment.name)
    try:
        python = environment.python(CACHE)
        result.version = environment.version(python)
        scratch = CACHE / environment.name / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        session = Session(case, checkpoint, python, scratch, result)
        print(f"{environment.name} {result.version}", flush=True)
        began = time.monotonic()
        if environment.name in DRIVERS:
            DRIVERS[environment.name](session)
        else:
            session.run_checks(f"tests.clients.checks.with_{environment.name}")
        result.seconds = time.monotonic() - began
    except CannotMake as error:
        result.add("its environment", str(error))
    except Exception as error:
        result.add("it runs", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return result


if __name__ == "__main__":
    raise SystemExit(main())
