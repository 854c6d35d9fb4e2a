"""Modules hold no state, and only the command line reads the environment (design seam 9)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ziphius

PACKAGE = Path(ziphius.__file__).parent
MUTATORS = {
    "append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault",
    "add", "discard", "sort", "reverse", "appendleft",
}  # fmt: skip


def state(root: Path) -> list[str]:
    """Say where a module keeps state: names that are rebound, mutated or read from outside.

    A module-level name is a constant (UPPER_CASE, private or not), a dunder, or a type. Nothing in
    the module changes it after its definition. The environment is read by the command line alone.
    """
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        tree = ast.parse(path.read_text("utf-8"), str(path))
        names = dict(_assigned(tree.body))
        found += [
            f"{place}:{line}: {name} is no constant"
            for name, line in names.items()
            if not _is_constant(name, tree)
        ]
        for node in ast.walk(tree):
            problem = _mutation(node, set(names))
            if problem is None and place.parts[0] != "cli":
                problem = _environment(node)
            if problem:
                found.append(f"{place}:{getattr(node, 'lineno', 0)}: {problem}")
    return found


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Yield the names that module-level statements bind, also inside ``if`` and ``try``."""
    for node in body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            for inner in ("body", "orelse", "finalbody"):
                yield from _assigned(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _assigned(handler.body)
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield name.id, node.lineno


def _is_constant(name: str, tree: ast.Module) -> bool:
    if name.isupper() or (name.startswith("__") and name.endswith("__")):
        return True
    # Types: ``Device = torch.device | str | None``, ``Kind = Literal[...]``, ``T = TypeVar("T")``.
    value = next(
        (
            n.value
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name
        ),
        None,
    )
    is_type = isinstance(value, ast.Subscript) or (
        isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    )
    is_variable = isinstance(value, ast.Call) and _called(value) in ("TypeVar", "ParamSpec")
    return name[0].isupper() and (is_type or is_variable)


def _mutation(node: ast.AST, names: set[str]) -> str | None:
    if isinstance(node, ast.Global):
        return f"global {', '.join(node.names)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in names and node.func.attr in MUTATORS:
            return f"{owner.id}.{node.func.attr}() changes a module's name"
    if isinstance(node, ast.Call) and _called(node) in ("cache", "lru_cache"):
        return "a cache keeps state in the module"
    if isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            if ast.unparse(decorator).rpartition(".")[2] in ("cache", "lru_cache"):
                return "a cache keeps state in the module"
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
        for target in targets:
            owner = getattr(target, "value", None)
            inside = isinstance(target, ast.Subscript | ast.Attribute)
            if inside and isinstance(owner, ast.Name) and owner.id in names:
                return f"{ast.unparse(target)} = ... changes a module's name"
    return None


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _environment(node: ast.AST) -> str | None:
    named = ("environ", "environb", "getenv", "getenvb", "putenv")
    if isinstance(node, ast.Attribute) and node.attr in named and ast.unparse(node.value) == "os":
        return f"reads the environment: os.{node.attr}"
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        taken = [alias.name for alias in node.names if alias.name in named]
        return f"reads the environment: {taken[0]}" if taken else None
    return None


def test_modules_hold_no_state_and_read_no_environment() -> None:
    assert state(PACKAGE) == []


STATE = {
    "a list that grows": "CACHE = []\ndef f():\n    CACHE.append(1)\n",
    "a dict that is filled": "TABLE = {}\ndef f():\n    TABLE['a'] = 1\n",
    "a dict that is emptied": "TABLE = {'a': 1}\ndef f():\n    del TABLE['a']\n",
    "an object that is changed": "BOX = object()\ndef f():\n    BOX.a = 1\n",
    "a name that is rebound": "COUNT = 0\ndef f():\n    global COUNT\n",
    "a counter": "COUNTS = {'a': 0}\ndef f():\n    COUNTS['a'] += 1\n",
    "a variable": "count = 0\n",
    "a variable under a condition": "if True:\n    model = None\n",
    "a variable in a pair": "FIRST, second = 1, 2\n",
    "an instance": "registry = dict()\n",
    "a cache": "import functools\n@functools.lru_cache(maxsize=None)\ndef f():\n    return 1\n",
    "the environment": "import os\ndef f():\n    return os.environ['HOME']\n",
    "the environment by a function": "import os\ndef f():\n    return os.getenv('HOME')\n",
    "the environment by name": "from os import environ\n",
}


@pytest.mark.parametrize("code", STATE.values(), ids=STATE)
def test_planted_state_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "planted.py").write_text(code)
    assert len(state(tmp_path)) == 1, state(tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "from typing import Literal, TypeVar\nKind = Literal['a']\nT = TypeVar('T')\n",
        "__all__ = ['a']\n_PRIVATE = {'a': 1}\nLIMIT: int = 3\n",
        "def f():\n    found = []\n    found.append(1)\n    return found\n",
        "import torch\nDevice = torch.device | str | None\n",
    ],
)
def test_constants_and_types_are_no_state(tmp_path: Path, code: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "planted.py").write_text(code)
    assert state(tmp_path) == []


def test_the_command_line_may_read_the_environment(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "planted.py").write_text("import os\nHOME = os.environ['HOME']\n")
    assert state(tmp_path) == []
