"""Which folder may import which, and what importing costs."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ziphius

PACKAGE = Path(ziphius.__file__).parent
# Design, "The house": a folder imports only folders listed above it, and itself.
ORDER = (
    "config", "kernels", "model", "checkpoint", "data", "parallel", "planning", "training",
    "inference", "evaluation", "alignment", "serving", "report", "cli",
)  # fmt: skip
NO_PROCESS_GROUPS = ("kernels", "model", "checkpoint", "data")
# These two may name anything, lazily: inside functions or under TYPE_CHECKING.
DOORS = ("__init__.py", "__main__.py")


# The check


def violations(root: Path) -> list[str]:
    """Say which imports below ``root``, the package's folder, go the wrong way.

    Every import counts: at the top, inside a function, under TYPE_CHECKING, relative, by
    ``importlib.import_module`` with a literal name.
    """
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        for line, module in imports(path, root):
            problem = _problem(place, module)
            if problem:
                found.append(f"{place}:{line}: {problem}")
    found += [f"{f.name}: a folder that the order does not know" for f in _unknown_folders(root)]
    return found


def _unknown_folders(root: Path) -> list[Path]:
    return [
        f for f in sorted(root.iterdir()) if f.is_dir() and list(f.glob("*.py"))
        if f.name not in ORDER
    ]  # fmt: skip


def _problem(place: Path, module: str) -> str | None:
    folder = place.parts[0]
    if module == "torch.distributed" or module.startswith("torch.distributed."):
        sees = folder in NO_PROCESS_GROUPS
        return f"{folder} sees a process group: {module}" if sees else None
    parts = module.split(".")
    if parts[0] != "ziphius" or str(place) in DOORS:
        return None
    if len(parts) == 1 or parts[1] in ("__init__", "__version__"):
        return None
    target = parts[1]
    if target == folder:
        return None
    if target not in ORDER:
        # ``from ziphius import x``: a name of the package itself, which loads it from anywhere.
        return None if target.startswith("__") else f"imports {module} through the package"
    if folder == "report" and target != "config":
        return f"report imports only config, not {module}"
    if folder not in ORDER or ORDER.index(target) >= ORDER.index(folder):
        return f"{folder} imports {module}, which is not above it"
    return None


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module or module.name) of every import in a file."""
    package = ["ziphius", *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


# The package passes


def test_folders_import_only_folders_above_them() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 40
    assert violations(PACKAGE) == []


def test_nobody_but_the_entry_point_imports_the_command_line() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for _, module in imports(path, PACKAGE)
        if module.startswith("ziphius.cli") and path.parent.name != "cli"
    }
    assert users <= {"__main__.py"}


@pytest.mark.parametrize("door", DOORS)
def test_the_entry_points_name_things_lazily(door: str) -> None:
    """At the top, outside TYPE_CHECKING, they bring nothing but the standard library."""
    tree = ast.parse((PACKAGE / door).read_text("utf-8"))
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in at_once
        for alias in node.names
    }
    assert names <= sys.stdlib_module_names


# The check finds what is planted

PLANTED = {
    "a plain import": ("kernels/loss.py", "import ziphius.model.mla\n"),
    "a plain import with a name": ("kernels/loss.py", "import ziphius.model.mla as mla\n"),
    "from a module": ("model/mla.py", "from ziphius.training.step import train_step\n"),
    "from the package": ("model/mla.py", "from ziphius import training\n"),
    "the package's own lazy name": ("model/mla.py", "from ziphius import load\n"),
    "in a function": ("config/run.py", "def f():\n    import ziphius.checkpoint.keys\n"),
    "in a method": ("data/loader.py", "class A:\n def f(self):\n  from ziphius.cli import app\n"),
    "under TYPE_CHECKING": (
        "checkpoint/keys.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from ziphius.data import corpus\n",
    ),
    "relative to the parent": ("kernels/loss.py", "from ..model import mla\n"),
    "relative to the package": ("kernels/loss.py", "from .. import model\n"),
    "by name": ("model/mla.py", "import importlib\nimportlib.import_module('ziphius.cli.app')\n"),
    "in a try": ("model/mla.py", "try:\n  import ziphius.serving\nexcept ImportError:\n  pass\n"),
    "in a subfolder": ("kernels/triton/mla.py", "from ziphius.model import mla\n"),
    "report and the model": ("report/loss.py", "from ziphius.model import mla\n"),
    "the command line": ("serving/__init__.py", "from ziphius.cli import app\n"),
    "a process group": ("model/mla.py", "import torch.distributed as dist\n"),
    "a process group's part": ("data/loader.py", "from torch.distributed import all_reduce\n"),
    "a process group by another way": ("kernels/loss.py", "from torch import distributed\n"),
    "a folder without a place": ("utilities/tools.py", "import json\n"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "code"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_found(tmp_path: Path, file: str, code: str) -> None:
    root = tmp_path / "ziphius"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n\n{code}")
    found = violations(root)
    assert len(found) == 1, found
    assert found[0].startswith(file.split("/")[0])


def test_imports_downwards_and_inside_a_folder_are_allowed(tmp_path: Path) -> None:
    root = tmp_path / "ziphius"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "kernels" / "new.py").write_text("from . import loss\nfrom ..config import model\n")
    (root / "training" / "new.py").write_text(
        "import torch.distributed\nimport ziphius.model.mla\n"
    )
    (root / "cli" / "new.py").write_text("from ziphius.serving import anything\n")
    (root / "__init__.py").write_text("def f():\n    from ziphius.cli import app\n")
    assert violations(root) == []


# What importing costs

HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "transformers",
    "tokenizers",
    "matplotlib",
    "safetensors",
    "aiohttp",
)


def modules_after(code: str) -> set[str]:
    """Run code in a new interpreter; return which modules it has loaded that a bare one has not."""
    wrapped = (
        "import sys, json\n"
        "before = set(sys.modules)\n"
        f"try:\n    exec({code!r})\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('\\nLOADED' + json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.rpartition("LOADED")[2]))


def heavy(modules: set[str]) -> set[str]:
    return {m.split(".")[0] for m in modules} & set(HEAVY)


def test_import_ziphius_loads_nothing_else() -> None:
    loaded = modules_after("import ziphius")
    assert heavy(loaded) == set()
    assert {m for m in loaded if m.startswith("ziphius")} == {"ziphius"}
    # Measured: 6, the package, importlib's and typing's own.
    assert len(loaded) < 20, sorted(loaded)


def test_looking_at_the_package_loads_nothing() -> None:
    code = "import ziphius\nassert 'load' in dir(ziphius)\nassert ziphius.__version__\n"
    assert heavy(modules_after(code)) == set()


def test_a_name_of_the_package_loads_what_it_needs() -> None:
    loaded = modules_after("import ziphius\nassert issubclass(ziphius.BadInput, Exception)")
    assert heavy(loaded) == set()
    loaded = modules_after("import ziphius\nziphius.load_recipe('tiny')")
    assert heavy(loaded) == {"pydantic"}


def test_every_promised_name_exists() -> None:
    for name in ziphius.__all__:
        assert getattr(ziphius, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ziphius.nonsense


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        # typer itself brings pydantic for the parameters of a verb.
        (["pretrain", "--help"], {"pydantic"}),
        (["generate", "--help"], {"pydantic"}),
        (["bench", "serve", "--help"], {"pydantic"}),
        (["chat", "--help"], {"pydantic"}),
    ],
)
def test_help_answers_without_heavy_libraries(arguments: list[str], allowed: set[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['ziphius', *{arguments!r}]\n"
        "runpy.run_module('ziphius', run_name='__main__', alter_sys=True)\n"
    )
    assert heavy(modules_after(code)) <= allowed


def test_help_of_the_module_ends_well() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ziphius", "--help"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for verb in (
        "quickstart",
        "prepare",
        "pretrain",
        "report",
        "generate",
        "chat",
        "convert",
        "inspect",
        "bench",
    ):
        assert verb in run.stdout
