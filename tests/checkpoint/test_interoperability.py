"""Quantised checkpoints in transformers: numbers mean there what they mean here."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.published import assert_same, weights
from tests.support import open_in_transformers, random_model, random_tokens, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.huggingface import load, save

# Widths that divide into groups of 32 and, of FP8 weights, into blocks: transformers 5.24 takes the
# size of a block from the number of scales, and so refuses a ragged one or gets it wrong.
CONFIG = tiny_config(
    hidden_size=128, intermediate_size=256, num_attention_heads=2, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=64,
    moe_intermediate_size=128, n_shared_experts=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("to", "group_size", "library"),
    [
        ("int8", 32, "compressed_tensors"),
        ("int4", 32, "compressed_tensors"),
        ("int8", -1, "compressed_tensors"),
        ("int4", -1, "compressed_tensors"),
        ("int4+head", 32, "compressed_tensors"),
        ("fp8", 128, "accelerate"),
    ],
)
def test_transformers_computes_what_the_dequantised_weights_mean(
    tmp_path: Path, to: str, group_size: int, library: str
) -> None:
    pytest.importorskip(library)
    save(random_model(CONFIG), tmp_path / "source", dtype="bfloat16")
    to, _, head = to.partition("+")
    settings = {"to": to, "group_size": group_size, "head": bool(head)}
    convert(tmp_path / "source", tmp_path / "quantised", **settings)
    convert(tmp_path / "quantised", tmp_path / "plain", to="bf16")
    assert_same(load(tmp_path / "quantised"), weights(load(tmp_path / "plain")))
    tokens = random_tokens(CONFIG, 2, 16)
    with torch.no_grad():
        found, expected = (
            open_in_transformers(tmp_path / name, torch.bfloat16)(tokens).logits
            for name in ("quantised", "plain")
        )
    assert torch.equal(found, expected)
