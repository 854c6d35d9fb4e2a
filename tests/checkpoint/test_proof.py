"""The proof of a conversion: it holds for ours, and sees every fault; and when FP8 comes back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint import published
from tests.checkpoint.published import change, change_config, is_fp8, read_all
from tests.support import random_model, tiny_config
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.fp8 import dequantize_blocks, quantize_blocks
from ziphius.checkpoint.huggingface import save
from ziphius.checkpoint.proof import BLOCK_BOUND, BLOCKS, COPIED, HALF_STEP, ROUNDED, Proved, prove
from ziphius.config.errors import BadInput

NAME = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALE = f"{NAME}_scale_inv"
PLAIN = "model.layers.2.eh_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """BF16, with a block of zeros and one of tiny numbers."""
    model = random_model(published.ragged_config(), seed=4)
    save(model, tmp_path / "source", dtype="bfloat16")
    weight = read_all(tmp_path / "source")[NAME].clone()
    weight[:128, :128] = 0
    weight[128:, :128] = 3e-6
    change(tmp_path / "source", {NAME: weight})
    return tmp_path / "source"


def faults(source: Path, target: Path) -> dict[str, str]:
    return {each.name: each.fault for each in prove(source, target) if each.fault}


def kinds(proved: list[Proved]) -> dict[str, set[str]]:
    return {kind: {p.name for p in proved if p.kind == kind} for kind in {p.kind for p in proved}}


# What holds


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_every_conversion_of_ours_is_within_its_bounds(
    source: Path, tmp_path: Path, scales: str
) -> None:
    """A chain: BF16 to FP8 and to BF16, FP32 and FP8 from there."""
    convert(source, tmp_path / "fp8", "fp8", scales=scales)
    proved = prove(source, tmp_path / "fp8")
    blocks = {name for name in read_all(source) if is_fp8(name)}
    assert kinds(proved) == {BLOCKS: blocks, COPIED: set(read_all(source)) - blocks}
    worst = max(each.error for each in proved)
    bound = BLOCK_BOUND[scales]
    assert {each.bound for each in proved if each.kind == BLOCKS} == {bound}
    assert bound * 0.95 < worst <= bound * 1.00001
    assert not any(each.fault for each in proved)
    for to, step in (("bf16", HALF_STEP[torch.bfloat16]), ("fp32", HALF_STEP[torch.float32])):
        convert(tmp_path / "fp8", tmp_path / to, to)
        proved = prove(tmp_path / "fp8", tmp_path / to)
        assert kinds(proved)[ROUNDED] == blocks
        assert not any(each.fault for each in proved)
        worst = max(each.error for each in proved)
        assert worst == 0 if scales == "ue8m0" else step * 0.9 < worst <= step
    convert(tmp_path / "fp8", tmp_path / "again", "fp8")
    assert kinds(prove(tmp_path / "fp8", tmp_path / "again")) == {COPIED: set(read_all(source))}


def test_the_bounds_are_reached() -> None:
    """By numbers in the middle between two of E4M3, of blocks that are chosen to be worst."""
    middle = torch.full((128, 128), 1.0)
    for largest, other, power, bound in (
        (448.0, 432.0, False, BLOCK_BOUND["float32"]),
        (272.0, 272.0, True, BLOCK_BOUND["ue8m0"]),
    ):
        block = middle * other
        block[0, 0] = largest
        off = (
            dequantize_blocks(*quantize_blocks(block, power_of_two=power), torch.float64)
        ) - block
        assert float(off.abs().max()) / largest == pytest.approx(bound, rel=1e-6)


def test_mtp_may_stay_behind(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "main", "fp8", mtp=False)
    proved = prove(source, tmp_path / "main", mtp=False)
    assert {each.name for each in proved} == set(
        published.layout(published.ragged_config(num_nextn_predict_layers=0))
    )
    with pytest.raises(BadInput, match="another network"):
        prove(source, tmp_path / "main")


def test_progress_counts_numbers(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "fp8", "fp8")
    told: list[tuple[str, int, int]] = []
    prove(source, tmp_path / "fp8", on_progress=lambda *step: told.append(step))
    total = sum(tensor.numel() for tensor in read_all(source).values())
    assert (told[0], told[-1]) == (("proving", 0, total), ("proving", total, total))
    assert len(told) == len(read_all(source)) + 1


# What does not


def test_every_fault_is_seen_and_named(source: Path, tmp_path: Path) -> None:
    """One number, one scale, one rounding mode."""
    target = tmp_path / "fp8"
    convert(source, target, "fp8")
    right = read_all(target)
    codes, scale = right[NAME], right[SCALE]
    one = codes.clone().view(torch.uint8)
    one[129, 129] ^= 1  # the next number
    large = scale.clone()
    large[0, 1] *= 1.01
    anew = quantize_blocks(dequantize_blocks(codes, scale, torch.float32) * 1.02)
    for wrong, fault in (
        ({NAME: one.view(codes.dtype)}, "not the nearest"),
        ({SCALE: large}, ""),
        (dict(zip((NAME, SCALE), anew, strict=True)), ""),
    ):
        change(target, {NAME: codes, SCALE: scale, **wrong})
        found = faults(source, target)
        assert set(found) == {NAME}
        assert fault in found[NAME]
    change(target, {NAME: codes, SCALE: scale, PLAIN: right[PLAIN] * 1.01})
    assert set(faults(source, target)) == {PLAIN}
    # A scale twice too large: numbers are the nearest ones it has, and a bit is lost at the bottom.
    weight = read_all(source)[NAME].float()
    twice = quantize_blocks(weight, power_of_two=True)[1] * 2
    spread = twice.repeat_interleave(128, 0).repeat_interleave(128, 1)[:136, :130]
    rounded = (weight / spread).to(codes.dtype)
    convert(source, tmp_path / "ue8m0", "fp8", scales="ue8m0")
    change(tmp_path / "ue8m0", {NAME: rounded, SCALE: twice})
    assert "does not belong" in faults(source, tmp_path / "ue8m0")[NAME]


def test_a_copy_must_be_one(tmp_path: Path) -> None:
    published.write_published(tmp_path / "official", published.ragged_config())
    convert(tmp_path / "official", tmp_path / "again", "fp8")
    assert faults(tmp_path / "official", tmp_path / "again") == {}
    found = read_all(tmp_path / "again")
    change(tmp_path / "again", {SCALE: found[SCALE] * (1 + 2**-23)})
    assert faults(tmp_path / "official", tmp_path / "again") == {
        NAME: "codes or scales are not those of the source"
    }


def test_what_config_announces_must_be_so(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "fp8"
    convert(source, target, "fp8")
    change_config(target, quantization_config={**published.QUANTIZATION, "scale_fmt": "ue8m0"})
    assert len(faults(source, target)) == sum(map(is_fp8, read_all(source)))
    with pytest.raises(BadInput, match="other numbers than powers of two"):
        convert(target, tmp_path / "again", "fp8")


def test_what_never_is_in_fp8_must_not_be(source: Path, tmp_path: Path) -> None:
    """eh_proj is BF16 (facts 3.2), and the routing bias FP32."""
    target = tmp_path / "fp8"
    convert(source, target, "fp8")
    codes, scale = quantize_blocks(read_all(target)[PLAIN])
    change(target, {PLAIN: codes, f"{PLAIN}_scale_inv": scale})
    assert faults(source, target) == {PLAIN: "is in FP8 and belongs to what never is"}
    bias = f"model.layers.1.mlp.gate.{published.ROUTING_BIAS}"
    right = read_all(target)
    change(target, {PLAIN: read_all(source)[PLAIN], f"{PLAIN}_scale_inv": None,
                    bias: right[bias].bfloat16()})  # fmt: skip
    assert "torch.bfloat16" in faults(source, target)[bias]


def test_integers_and_other_networks_are_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "int8", "int8", group_size=8)
    with pytest.raises(BadInput, match="holds integers"):
        prove(source, tmp_path / "int8")
    save(random_model(tiny_config()), tmp_path / "other")
    with pytest.raises(BadInput, match="another network"):
        prove(source, tmp_path / "other")
    convert(tmp_path / "int8", tmp_path / "bf16")  # as a source they are like any other
    assert faults(tmp_path / "int8", tmp_path / "bf16") == {}


# FP8 to BF16 and back


def bits(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.view(torch.uint8) for name, tensor in read_all(folder).items()}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_fp8_that_was_made_from_bf16_comes_back_bit_for_bit(source: Path, tmp_path: Path) -> None:
    """A block's largest number is 448 scales there, and in BF16 exactly what it was."""
    convert(source, tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "again", "fp8")
    assert differ(bits(tmp_path / "fp8"), bits(tmp_path / "again")) == set()


def test_of_other_scales_codes_come_back_and_scales_move_by_half_a_step_of_bf16(
    source: Path, tmp_path: Path
) -> None:
    """Scales that come from FP32 weights, as those of the published model may."""
    convert(source, tmp_path / "fp8", "fp8")
    scaled = {
        name: tensor * (1 + 0.3 * torch.rand(tensor.shape, generator=torch.Generator()))
        for name, tensor in read_all(tmp_path / "fp8").items()
        if name.endswith("_scale_inv") and name != SCALE  # which has tiny blocks
    }
    change(tmp_path / "fp8", dict(scaled))
    convert(tmp_path / "fp8", tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "again", "fp8")
    assert differ(bits(tmp_path / "fp8"), bits(tmp_path / "again")) == set(scaled)
    for name, scale in scaled.items():
        torch.testing.assert_close(read_all(tmp_path / "again")[name], scale, rtol=2**-8, atol=0)
    # Through FP32 nothing moves but the last bit of a scale.
    convert(tmp_path / "fp8", tmp_path / "fp32", "fp32")
    convert(tmp_path / "fp32", tmp_path / "third", "fp8")
    third = read_all(tmp_path / "third")
    assert differ(bits(tmp_path / "fp8"), bits(tmp_path / "third")) <= set(scaled)
    for name, scale in scaled.items():
        torch.testing.assert_close(third[name], scale, rtol=2**-22, atol=0)


def test_powers_of_two_keep_every_number(source: Path, tmp_path: Path) -> None:
    """Where a block's largest code is 224 the scale halves and codes double; the numbers stay."""
    convert(source, tmp_path / "fp8", "fp8", scales="ue8m0")
    convert(tmp_path / "fp8", tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "again", "fp8", scales="ue8m0")
    convert(tmp_path / "again", tmp_path / "back")
    assert differ(bits(tmp_path / "bf16"), bits(tmp_path / "back")) == set()
    one, other = read_all(tmp_path / "fp8"), read_all(tmp_path / "again")
    moved = 0
    for name in filter(is_fp8, one):
        scale, after = one[f"{name}_scale_inv"], other[f"{name}_scale_inv"]
        for i, j in (scale != after).nonzero().tolist():
            block = one[name][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float()
            assert block.abs().max() == 224
            assert after[i, j] == scale[i, j] / 2
            moved += 1
    assert moved
