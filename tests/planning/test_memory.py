"""The plan of a checkpoint against the bytes of its files and of the loaded model."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.published import change, read_all
from tests.support import random_model, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.huggingface import load, save
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.model.weights import named_weights
from ziphius.planning.memory import ITEMS, MTP, item_of, plan

COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form."""
    folder = tmp_path_factory.mktemp("plan")
    save(random_model(), folder / "bf16", dtype="bfloat16")
    for to in ("fp8", "int8", "int4"):
        convert(folder / "bf16", folder / to, to=to, group_size=8)
    return folder


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
def test_stored_bytes_are_those_of_the_files(folders: Path, form: str) -> None:
    found = plan(folders / form)
    tensors = read_all(folders / form)
    everything = sum(tensor.nbytes for tensor in tensors.values())
    assert found.read_bytes == everything
    assert found.weight_bytes == everything - sum(tensors[name].nbytes for name in COPIES)
    assert tuple(found.items) == ITEMS


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_gives_the_bytes_of_the_loaded_model(folders: Path, form: str, dtype: str) -> None:
    model = load(folders / form, dtype=dtype)
    found = plan(folders / form, weights=dtype)
    expected = dict.fromkeys(ITEMS, 0)
    for name, weight in named_weights(model):
        expected[item_of(name, model.config)] += weight.nbytes
    assert found.items == expected
    assert found.weights == dtype


def test_items_by_hand(folders: Path) -> None:
    c = tiny_config()
    D, F, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    heads = c.num_attention_heads
    attention = (
        D * (14 + c.kv_lora_rank + c.qk_rope_head_dim)
        + 14 * heads * c.qk_head_dim
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * D
    )
    items = plan(folders / "bf16").items
    assert items["embedding"] == items["output head"] == 2 * c.vocab_size * D
    assert items["attention"] == 2 * 3 * attention
    assert items["dense feed-forward"] == 2 * 3 * D * c.intermediate_size
    assert items["routed experts"] == 2 * 2 * E * 3 * D * F
    assert items["shared experts"] == 2 * 2 * 2 * 3 * D * F
    norms = 3 * (2 * D + 14 + c.kv_lora_rank) + D
    assert items["norms and routers"] == 2 * norms + 2 * E * (2 * D + 4)


def test_quantised_forms_are_smaller(folders: Path) -> None:
    sizes = [plan(folders / form).items["routed experts"] for form in ("bf16", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]


def test_cache_and_room(folders: Path) -> None:
    c = tiny_config()
    token = (c.kv_lora_rank + c.qk_rope_head_dim) * 4 * 2
    need = plan(folders / "int8").weight_bytes
    found = plan(folders / "int8", memory_bytes=need + 10 * token + 3, read_bandwidth=1e6)
    assert found.cache_token_bytes == token
    assert found.cache_tokens == 10
    assert found.fits
    assert found.load_seconds == found.read_bytes / 1e6
    assert plan(folders / "int8", cache="float32").cache_token_bytes == 2 * token
    assert plan(folders / "int8", mtp=False).cache_token_bytes == token // 4 * 3


def test_the_published_cache_is_70_kb_a_token() -> None:
    """Facts 1.5: 576 numbers in 61 layers; the MTP module is one layer more."""
    from ziphius.config.recipe import load_recipe

    c: ModelConfig = load_recipe("671b").model
    width = c.kv_lora_rank + c.qk_rope_head_dim
    assert width * c.num_hidden_layers * 2 == 70_272


def test_without_mtp(folders: Path) -> None:
    found = plan(folders / "bf16", mtp=False)
    assert found.items[MTP] == 0
    assert found.read_bytes == found.weight_bytes < plan(folders / "bf16").read_bytes


def test_what_does_not_fit_says_how_much_is_missing(folders: Path) -> None:
    found = plan(folders / "bf16", memory_bytes=1000)
    assert (found.cache_tokens, found.fits) == (0, False)
    assert "does not fit" in found.table()
    assert "more are needed" in found.table()


def test_the_table(folders: Path) -> None:
    found = plan(folders / "int4", memory_bytes=2**30, read_bandwidth=1e9)
    table = found.table()
    for text in ("routed experts", "weights, stored", "1.00 GiB", "cache tokens that fit", "load"):
        assert text in table
    widths = {len(line) for line in table.splitlines()[1:]}
    assert len(widths) == 1


def test_no_tensor_is_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShardReader, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ShardReader, "read", refuse)
    for form in ("bf16", "fp8", "int4"):
        plan(folders / form, memory_bytes=10**9)


def test_bad_input(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="memory limit"):
        plan(folders / "bf16", memory_bytes=-1)
    with pytest.raises(BadInput, match="read bandwidth"):
        plan(folders / "bf16", read_bandwidth=0)
    with pytest.raises(BadInput, match="dtype"):
        plan(folders / "bf16", weights="int3")
    with pytest.raises(BadInput, match="no such folder"):
        plan(tmp_path / "absent")
    save(random_model(), tmp_path / "incomplete")
    change(tmp_path / "incomplete", {"model.norm.weight": None})
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        plan(tmp_path / "incomplete")
