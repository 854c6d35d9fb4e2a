"""Shards against safetensors' own reader, and every way in which files can be broken."""

import errno
import gc
import json
import os
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ziphius.checkpoint.files import check_manifest, replace_directory
from ziphius.checkpoint.shards import ShardReader, write_shards
from ziphius.config.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """What safetensors itself reads, file by file."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert found.keys().isdisjoint(tensors)
        found.update(tensors)
    return found


def sharded(folder: Path) -> Path:
    """Six tensors of 400 bytes in three shards."""
    tensors = {f"t{index}": torch.full((100,), float(index)) for index in range(6)}
    write_shards(folder, tensors.items(), max_shard_bytes=800)
    return folder


# Round trips


@pytest.mark.parametrize("limit", [2**30, 100])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, limit: int) -> None:
    tensors = example()
    write_shards(tmp_path, tensors.items(), max_shard_bytes=limit)
    theirs = load_all(tmp_path)
    assert theirs.keys() == tensors.keys()
    with ShardReader(tmp_path) as reader:
        assert reader.names() == frozenset(tensors)
        for name, tensor in tensors.items():
            assert same(reader.read(name), tensor)
            assert same(theirs[name], tensor)
            assert reader.shape(name) == tensor.shape
            assert reader.dtype(name) == tensor.dtype


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, example().items())
    assert os.listdir(tmp_path) == [SINGLE]
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with ShardReader(tmp_path) as reader:
        assert reader.files() == [SINGLE]


def test_several_shards_have_the_names_and_the_index_of_hugging_face(tmp_path: Path) -> None:
    sharded(tmp_path)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == [*names, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 400
    assert index["weight_map"] == {f"t{i}": names[i // 2] for i in range(6)}
    for i, name in enumerate(names):
        assert load_file(tmp_path / name).keys() == {f"t{2 * i}", f"t{2 * i + 1}"}
    with ShardReader(tmp_path) as reader:
        assert reader.files() == names


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    limit=st.integers(1, 400),
    kinds=st.lists(st.sampled_from(DTYPES), min_size=12, max_size=12),
)
def test_shards_keep_order_and_limit_for_all_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, kinds: list[torch.dtype]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i:02d}": torch.ones(size).to(kinds[i]) for i, size in enumerate(sizes)}
    write_shards(folder, tensors.items(), max_shard_bytes=limit)
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert [name for shard in shards for name in sorted(shard)] == list(tensors)
    assert all(same(shard[name], tensors[name]) for shard in shards for name in shard)
    weights = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    following = [shard[min(shard)].nbytes for shard in shards[1:]]
    for shard, weight in zip(shards, weights, strict=True):
        assert weight <= limit or tensors[min(shard)].nbytes > limit
    for weight, tensor in zip(weights, following, strict=False):
        assert weight + tensor > limit  # no shard ends before it is full
    assert (folder / INDEX).exists() == (len(shards) > 1)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, example().items(), max_shard_bytes=300)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3  # two shards and the index


def test_views_shared_memory_and_parameters_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.ones(3))
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "rows": base[1:3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": parameter,
        "tied": parameter.data,
    }
    write_shards(tmp_path, tensors.items())
    read = load_file(tmp_path / SINGLE)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read["transposed"].shape == (6, 4)


def test_memory_holds_one_shard_and_the_next_tensor(tmp_path: Path) -> None:
    """Ten tensors of 4 kB, two a shard: when one is asked for, at most two others are alive."""
    shape = (1013,)
    alive: list[int] = []

    def make(index: int) -> Callable[[], torch.Tensor]:
        def tensor() -> torch.Tensor:
            everything = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            alive.append(sum(x.shape == shape for x in everything))
            partial = list(tmp_path.glob("*.partial"))
            assert len(partial) == max(0, (index - 1) // 2)  # the full ones are written already
            return torch.full(shape, float(index))

        return tensor

    sources = ((f"t{index}", make(index)) for index in range(10))
    write_shards(tmp_path, sources, max_shard_bytes=2 * 4 * shape[0])
    assert len(alive) == 10
    assert max(alive) <= 2
    assert [load_all(tmp_path)[f"t{index}"][0].item() for index in range(10)] == list(range(10))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "big": torch.ones(100), "c": torch.ones(2), "d": torch.ones(2)}
    write_shards(tmp_path, tensors.items(), max_shard_bytes=16)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [set(load_file(file)) for file in files] == [{"a"}, {"big"}, {"c", "d"}]


def test_mistakes_of_the_caller_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors are called a"):
        write_shards(tmp_path / ".", [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(ValueError, match="no tensors"):
        write_shards(tmp_path, [])
    sharded(tmp_path)
    with pytest.raises(ValueError, match="already holds weights"):
        sharded(tmp_path)


def test_other_users_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        sharded(tmp_path)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


# Reading


def open_shards(folder: Path) -> list[str]:
    """The shards that this process has open or mapped."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [path for path in opened + mapped if path.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_opened_on_first_use_and_closed_at_the_end(tmp_path: Path) -> None:
    with ShardReader(sharded(tmp_path)) as reader:
        assert reader.shape("t5") == (100,)
        assert open_shards(tmp_path) == []
        tensor = reader.read("t5")
        assert open_shards(tmp_path) == [str(tmp_path / "model-00003-of-00003.safetensors")]
    assert open_shards(tmp_path) == []
    assert tensor[0] == 5  # stays valid


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    with ShardReader(sharded(tmp_path)) as reader:
        reader.read("t1").zero_()
        assert reader.read("t1")[0] == 1
        tensor = reader.read("t1")
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(b"")
        assert tensor.sum() == 100
        with pytest.raises(BadInput, match=r"model-00001-of-00003\.safetensors: t0 cannot be read"):
            reader.read("t0")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with ShardReader(sharded(tmp_path)) as reader:
        for ask in (reader.read, reader.shape, reader.dtype):
            with pytest.raises(BadInput, match=f"{tmp_path}: the checkpoint has no tensor lm_head"):
                ask("lm_head")


def test_a_folder_replaced_while_it_is_read_is_not_mixed(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    for value in (1.0, 2.0):
        if target.exists():
            reader = ShardReader(target)
            assert reader.read("a")[0] == 1
        with replace_directory(target) as folder:
            (folder / "config.json").write_text("{}")
            tensors = {"a": torch.full((10,), value), "b": torch.full((10,), value)}
            write_shards(folder, tensors.items(), max_shard_bytes=40)
    with reader, pytest.raises(BadInput, match="was replaced while it was read"):
        reader.read("b")
    with ShardReader(target) as reader:
        assert reader.read("b")[0] == 2


# Broken files


def broken(data: bytes) -> dict[str, bytes]:
    """A shard cut or changed at every kind of place."""
    length = struct.unpack("<Q", data[:8])[0]
    return {
        "empty": b"",
        "in the header's length": data[:5],
        "after the header's length": data[:8],
        "in the header": data[: 8 + length // 2],
        "after the header": data[: 8 + length],
        "in the data": data[: 8 + length + 10],
        "one byte short": data[:-1],
        "one byte long": data + b"x",
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "header is no JSON": data[:8] + b"x" * length + data[8 + length :],
        "overlapping": data.replace(b"[0,", b"[4,"),
        "other shape": data.replace(b'"shape":[100]', b'"shape":[101]'),
        "unknown dtype": data.replace(b'"F32"', b'"F99"'),
        "other header length": struct.pack("<Q", length + 8) + data[8:],
    }


KINDS = list(broken(bytes(8)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [False, True])
def test_a_broken_file_is_found_on_opening_and_named(tmp_path: Path, kind: str, many: bool) -> None:
    write_shards(
        tmp_path,
        [(f"t{index}", torch.ones(100)) for index in range(4)],
        max_shard_bytes=800 if many else 2**30,
    )
    path = tmp_path / ("model-00002-of-00002.safetensors" if many else SINGLE)
    data = path.read_bytes()
    path.write_bytes(broken(data)[kind])
    assert path.read_bytes() != data
    with pytest.raises(BadInput) as caught:
        ShardReader(tmp_path)
    assert str(caught.value).startswith(f"{path}: cannot be read")
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_shard_is_found_by_the_manifest(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    with replace_directory(target) as folder:
        (folder / "config.json").write_text("{}")
        sharded(folder)
    check_manifest(target)
    path = target / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with ShardReader(target) as reader:  # safetensors cannot know
        with pytest.raises(BadInput, match=path.name):
            check_manifest(target, only=reader.files())
        check_manifest(target, only=set(reader.files()) - {path.name})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model-00003-of-00003\.safetensors: is missing"):
        ShardReader(tmp_path)


def test_a_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["t5"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"model-00001-of-00003\.safetensors: has no tensor t5"):
        ShardReader(tmp_path)


def test_a_plain_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"t0": torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(BadInput, match="delete the one that is out of date"):
        ShardReader(tmp_path)


def test_an_index_of_the_plain_file_is_fine(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    with ShardReader(tmp_path) as reader:
        assert reader.read("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / SINGLE)
    (folder / INDEX).write_text(text)
    with pytest.raises(BadInput, match=r"index\.json: is no index"):
        ShardReader(folder)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    program = f"cos\nmkdir\n(S'{trap}'\ntR."  # to unpickle this is to call os.mkdir(trap)
    (tmp_path / "pytorch_model.bin").write_text(program)
    with pytest.raises(BadInput, match=r"pytorch_model\.bin.*convert"):
        ShardReader(tmp_path)
    assert not trap.exists()


def test_no_weights_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no model\.safetensors and no"):
        ShardReader(tmp_path)
    with pytest.raises(BadInput, match="No such file"):
        ShardReader(tmp_path / "none")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / SINGLE).write_text(text)
    with pytest.raises(BadInput, match="git lfs pull"):
        ShardReader(tmp_path)


def test_a_dtype_without_a_torch_type_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(BadInput, match=r"model\.safetensors: a is stored as F4: supported are"):
        ShardReader(tmp_path)


# A full disk


@pytest.fixture
def file_limit() -> Iterator[None]:
    """The kernel refuses files of more than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_limit")
def test_a_write_that_the_kernel_stops_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large") as caught:
        write_shards(tmp_path, [("a", torch.ones(2**16))])
    assert caught.value.errno == errno.EFBIG


@pytest.mark.usefixtures("file_limit")
def test_a_stopped_save_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def save() -> None:
        with replace_directory(tmp_path / "ckpt") as folder:
            write_shards(folder, [("a", torch.ones(100)), ("b", torch.ones(2**16))])

    with pytest.raises(
        BadInput,
        match=r"ckpt: not saved, .*: File too large for a shard of 262,544 bytes",
    ):
        save()
    assert os.listdir(tmp_path) == []
