"""Checkpoints of runs over many ranks: any layout reads what any other wrote, bit for bit."""

from __future__ import annotations

import io
import json
import pickle
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import ziphius
from tests.parallel.pool import Pool
from tests.support import open_in_transformers, random_tokens, tiny_config
from tests.training.spread import NUMBERS, Spread, spread, value
from ziphius.checkpoint.files import check_manifest, replace_directory
from ziphius.checkpoint.huggingface import write_model
from ziphius.checkpoint.keys import shared_copies
from ziphius.checkpoint.shards import INDEX_FILE, ShardReader
from ziphius.checkpoint.state import write_state
from ziphius.parallel import export, storage
from ziphius.parallel.mesh import SAVING

STATE = ("first.", "second.", "average.")
# World and layout.
WRITERS: dict[str, tuple[int, dict[str, int]]] = {
    "dp2 x ep2": (4, {"ep": 2}),
    "pp2 x ep2": (4, {"pp": 2, "ep": 2}),
    "dp2 x tp2": (4, {"tp": 2}),
    "dualpipe": (2, {"pp": 2, "dualpipe": 1}),
    "dp3": (3, {}),
    "hsdp2 x 2": (4, {"dp_replicate": 2, "fsdp": 1}),
}
READERS: dict[str, tuple[int, dict[str, int]]] = {
    **WRITERS,
    "ep4": (4, {"ep": 4}),
    "tp3": (3, {"tp": 3}),
    "pp2": (2, {"pp": 2}),
    "fsdp3": (3, {"fsdp": 1}),
    "fsdp2 x ep2": (4, {"ep": 2, "fsdp": 1}),
    "1": (1, {}),
}
SIZES = {"max_shard_bytes": 20_000, "file_bytes": 30_000}


@dataclass
class Written:
    """A checkpoint and what its writers tell."""

    folder: Path
    reports: list[dict[str, Any]]


def write(layout: dict[str, int], target: Path) -> dict[str, Any]:
    run = spread(layout, sizes=SIZES)
    run.fill()
    before = dict(run.mesh.traffic.sent)
    run.save(target)
    run.saver.wait()
    assert dict(run.mesh.traffic.sent) == before, "nothing goes through the groups of training"
    assert run.wrong() == []
    return {
        "sent": dict(run.saver.axis.traffic.sent),
        "cut": [e for e in run.saver.owners.entries.values() if len(e.pieces) > 1],
        "files": run.saver.export.placed,
    }


def read(layout: dict[str, int] | None, folder: Path) -> list[str]:
    run = spread(layout)
    assert run.wrong()
    run.saver.load(folder, run.optimizer, run.average, NUMBERS)
    assert (run.optimizer.steps, run.average.updates) == (7, 5)
    return run.wrong()


@pytest.fixture(scope="module", params=WRITERS)
def written(
    request: pytest.FixtureRequest, pool: Pool, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    """A checkpoint of many ranks."""
    world, layout = WRITERS[request.param]
    target = tmp_path_factory.mktemp("written") / "step-7"
    return Written(target, pool.run(world, write, layout, target))


@pytest.mark.parametrize("reader", READERS)
def test_any_layout_reads_what_any_other_wrote(written: Written, reader: str, pool: Pool) -> None:
    world, layout = READERS[reader]
    assert pool.run(world, read, layout, written.folder) == [[]] * world


def test_one_process_reads_what_many_wrote(written: Written) -> None:
    assert read(None, written.folder) == []


def test_it_is_a_hugging_face_directory_of_whole_tensors(written: Written) -> None:
    folder = written.folder
    check_manifest(folder)
    index = json.loads((folder / INDEX_FILE).read_text("utf-8"))
    with ShardReader(folder) as reader:
        assert len(reader.files()) > 4, "every rank has written some"
        assert {p.name for p in folder.glob("*.safetensors")} == set(reader.files())
        for name in reader.names() - shared_copies(tiny_config(num_hidden_layers=4)).keys():
            tensor = reader.read(name)
            assert torch.equal(tensor, value(name, tuple(tensor.shape), tensor.dtype)), name
        sizes = (reader.read(name).nbytes for name in reader.names())
        assert index["metadata"]["total_size"] == sum(sizes)
    model = ziphius.load(folder)
    other = open_in_transformers(folder, torch.float64)
    tokens_BT = random_tokens(model.config, 2, 9)
    # Parts of the other are always in FP32; these weights are large.
    torch.testing.assert_close(model(tokens_BT), other(tokens_BT).logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_the_state_holds_no_pickle(written: Written) -> None:
    files = [path for path in written.folder.rglob("*") if path.is_file()]
    assert len([path for path in files if path.parent.name == "state"]) > 4
    for path in files:
        assert path.suffix in (".json", ".safetensors"), path
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
            continue
        # The whole file is a header of JSON and the numbers that it lists: room for nothing else.
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        notes = header.pop("__metadata__")
        assert all(isinstance(text, str) for text in notes.values())
        spans = sorted(tensor["data_offsets"] for tensor in header.values())
        assert [0, *(end for _, end in spans)] == [
            *(start for start, _ in spans),
            len(data) - 8 - length,
        ]
        assert not is_pickled(data[8 : 8 + length]), path


def is_pickled(data: bytes) -> bool:
    """Say whether something that a pickle begins with stands anywhere in the data."""
    protocols = (bytes([0x80, n]) for n in range(2, 6))
    return any(mark in data for mark in protocols) or b"PK\x03\x04" in data


def test_a_pickle_would_be_seen() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    assert is_pickled(pickle.dumps([1]))
    assert is_pickled(buffer.getvalue())


def test_only_pieces_of_cut_weights_travel_and_each_once(written: Written) -> None:
    sent = sum(report["sent"].get((SAVING, "send"), 0) for report in written.reports)
    cut = written.reports[0]["cut"]
    expected = sum(
        piece.size * prod(entry.whole) // entry.whole[entry.dim] * 8
        for entry in cut
        for piece in entry.pieces
        if piece.owner != entry.writer
    )
    assert sent == expected
    assert {operation for report in written.reports for _, operation in report["sent"]} <= {
        *("send", "all_gather", "broadcast")
    }


def test_equal_states_have_equal_bytes(pool: Pool, tmp_path: Path) -> None:
    world, layout = WRITERS["dp2 x tp2"]
    found = []
    for name in ("a", "b"):
        pool.run(world, write, layout, tmp_path / name)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({path.relative_to(tmp_path / name): path.read_bytes() for path in paths})
    assert found[0] == found[1]


def test_files_of_the_state_are_as_small_as_asked(written: Written) -> None:
    files = list((written.folder / "state").glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= SIZES["file_bytes"]
        assert all(sizes)


def numbers_read(layout: dict[str, int], folder: Path) -> tuple[int, int]:
    """Return how many numbers a rank reads of the state, and how many it holds of it."""
    run = spread(layout)
    count, plain = 0, storage.HuggingFaceStorageReader._process_read_request

    def counted(self: Any, file: Any, request: Any, planner: Any) -> None:
        nonlocal count
        count += prod(request.lengths) * request.storage_index.fqn.startswith(STATE)
        plain(self, file, request, planner)

    storage.HuggingFaceStorageReader._process_read_request = counted  # type: ignore[method-assign]
    try:
        run.saver.load(folder, run.optimizer, run.average, NUMBERS)
    finally:
        storage.HuggingFaceStorageReader._process_read_request = plain  # type: ignore[method-assign]
    held = run.saver.held_state(run.optimizer, run.average)
    return count, sum(piece.data.numel() for piece in held)


def test_a_rank_reads_what_it_holds_and_no_more(written: Written, pool: Pool) -> None:
    counts = pool.run(3, numbers_read, {}, written.folder)
    assert all(count == held for count, held in counts)
    one = spread()
    pieces = one.saver.held_state(one.optimizer, one.average)
    assert sum(count for count, _ in counts) == sum(piece.data.numel() for piece in pieces)


# One process and many


def as_before(run: Spread, folder: Path) -> None:
    """Write a checkpoint as one process wrote it in format 1."""
    moments = dict(run.optimizer.named_moments(run.saver.weights()))
    averages = {f"average.{name}": tensor for name, tensor in run.average.average.items()}
    with replace_directory(folder) as new:
        write_model(run.parts[0], new, torch.float64)
        write_state(new, moments | averages, NUMBERS)


@pytest.mark.parametrize("form", ["1", "2"])
@pytest.mark.parametrize("reader", ["pp2 x ep2", "dp2 x tp2", "dp3"])
def test_many_read_what_one_process_wrote(
    form: str, reader: str, pool: Pool, tmp_path: Path
) -> None:
    run = spread()
    run.fill()
    if form == "1":
        as_before(run, tmp_path / "step-7")
    else:
        run.save(tmp_path / "step-7")
        run.saver.wait()
    world, layout = READERS[reader]
    assert pool.run(world, read, layout, tmp_path / "step-7") == [[]] * world
    assert read(None, tmp_path / "step-7") == []


# Averages


def average_in_place(layout: dict[str, int]) -> tuple[list[str], bool, int]:
    run = spread(layout)
    run.fill()
    with run.average.in_place_of(run.parts, run.saver.owners, run.mesh["world"]):
        found = [
            name
            for name, weight in run.saver.weights()
            if not torch.equal(weight, run.own("average.", name, weight))
        ]
    return found, not run.wrong(), sum(t.numel() for t in run.average.average.values())


@pytest.mark.parametrize("layout", WRITERS)
def test_every_rank_averages_its_share_and_all_get_all_of_it(pool: Pool, layout: str) -> None:
    world, places = WRITERS[layout]
    results = pool.run(world, average_in_place, places)
    assert all(not wrong and back for wrong, back, _ in results)
    whole = sum(tensor.numel() for tensor in spread().average.average.values())
    shares = [numbers for *_, numbers in results]
    assert sum(shares) == whole
    assert max(shares) < 1.5 * whole / world or "pp" in layout


# Memory


def gathered(layout: dict[str, int], target: Path) -> tuple[int, int]:
    """Save, and return the bytes that arrived and were held at a time, and the largest weight's."""
    run = spread(layout, sizes=SIZES)
    run.fill()
    held, most = 0, 0
    plain = torch.empty

    def forget(nbytes: int) -> None:
        nonlocal held
        held -= nbytes

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal held, most
        made = plain(*args, **kwargs)
        held += made.nbytes
        most = max(most, held)
        weakref.finalize(made, forget, made.nbytes)
        return made

    export.torch = SimpleNamespace(**vars(torch) | {"empty": empty})  # type: ignore[attr-defined]
    try:
        run.save(target)
        run.saver.wait()
    finally:
        export.torch = torch  # type: ignore[attr-defined]
    assert held == 0
    cut = [entry for entry in run.saver.owners.entries.values() if len(entry.pieces) > 1]
    return most, max(prod(entry.whole) for entry in cut) * 8


def test_what_arrives_is_held_one_weight_at_a_time(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(4, gathered, {"tp": 4, "dp_shard": 1}, tmp_path / "step-7")
    for most, largest in results:
        assert most <= largest
    assert any(most for most, _ in results)
