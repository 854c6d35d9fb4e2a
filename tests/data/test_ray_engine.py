"""Ray Data gives the bytes that this process gives. Starting Ray takes some seconds, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.preparing import contents, make_mixture, recipe, run
from tests.data.texts import write
from ziphius.config.errors import BadInput
from ziphius.data import ray_engine
from ziphius.data.examine import Examined
from ziphius.data.prepare import prepare
from ziphius.data.ray_engine import RayEngine
from ziphius.data.readers import Piece, Raw

pytest.importorskip("ray", reason="needs ray: pip install 'ziphius[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with RayEngine(workers=1) as started:
        yield started


def test_ray_writes_the_same_bytes(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "ENCODE_BYTES", 3000)
    sources = make_mixture(tmp_path)
    run(recipe(sources), tmp_path / "here")
    prepare(recipe(sources), tmp_path / "there", engine)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_an_error_on_a_worker_is_one_line_here(
    engine: RayEngine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"a.txt": "fine\n", "b.jsonl": '{"text": "fine"}\n{'})
    with pytest.raises(BadInput) as error:
        prepare(recipe(f"data.source={tmp_path}"), tmp_path / "new" / "out", engine)
    assert str(error.value).startswith(f"{tmp_path / 'b.jsonl'}: line 2: is not valid JSON")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "new").iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "value",
    [
        Piece(1, "jsonl", "/a/\udcff", "☃", "text", 9, True),
        Raw(0, "a#1", True, 3, "half \ud800 é", False),
        Examined(2, "a", False, 3, "", 5, "t☃", b"\0\xff", b""),
    ],
)
def test_rows_bring_everything_back(value: Piece | Raw | Examined) -> None:
    row = ray_engine._to_row(value)
    assert all(isinstance(item, int | bytes) for item in row.values())
    assert ray_engine._from_row(type(value), row) == value


def test_without_ray_its_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BadInput, match=r'pip install "ziphius\[ray\]"'):
        RayEngine()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: object) -> None:
        raise ConnectionError(f"Could not reach {options['address']}\nand more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    message = "no cluster to use at nowhere:1: Could not reach nowhere:1: start it"
    with pytest.raises(BadInput, match=message), RayEngine(1, "nowhere:1"):
        pass
