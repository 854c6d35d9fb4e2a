"""The packed layout: names, shapes, config, what is refused, and how the library reads it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.published import change, change_config, is_fp8, layout, read_all, refused
from tests.support import random_model, tiny_config
from ziphius.checkpoint.compressed import (
    Packed,
    is_quantizable,
    packed_config,
    read_packed_config,
)
from ziphius.checkpoint.config_json import raw_config, read_config, stored_form
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.huggingface import Fp8Weight, WeightReader, examine, load, save
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.kernels.integers import QuantizedWeight, dequantize, pack, quantize
from ziphius.model.weights import named_weights

NAME = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A small checkpoint of 4-bit integers in groups of 8."""
    save(random_model(), tmp_path / "source", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "packed", to="int4", group_size=8)
    return tmp_path / "packed"


# Which tensors


def test_what_is_quantised_is_what_the_published_weights_quantise() -> None:
    for name in layout(tiny_config(num_nextn_predict_layers=2)):
        assert is_quantizable(name) == is_fp8(name), name


def test_the_ignore_list_names_every_linear_layer_that_is_not_quantised() -> None:
    import re

    ignore = [entry.removeprefix("re:") for entry in packed_config(Packed(4, 128))["ignore"]]
    for name in layout(tiny_config()):
        module = name.removesuffix(".weight")
        linear = not module.endswith(("norm", "embed_tokens", "bias"))
        ignored = any(re.match(pattern, module) for pattern in ignore)
        assert ignored == (linear and not is_quantizable(name)), name


# config.json

FORMS_OF_CONFIG = [
    Packed(4, 128),
    Packed(8, 32),
    Packed(8, -1),
    Packed(4, 128, 8),
    Packed(8, -1, 8),
]


@pytest.mark.parametrize("form", FORMS_OF_CONFIG)
def test_config_there_and_back(form: Packed) -> None:
    written = json.loads(json.dumps(packed_config(form)))
    assert read_packed_config(written, "config.json") == form
    assert stored_form({"quantization_config": written}) == form


@pytest.mark.parametrize("form", FORMS_OF_CONFIG)
def test_the_library_reads_the_config(form: Packed) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    found = library.QuantizationConfig.model_validate(packed_config(form))
    weights = found.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (form.bits, True)
    assert (weights.group_size or -1) == form.group_size
    assert weights.strategy == ("channel" if form.group_size == -1 else "group")
    assert ("group_1" in found.config_groups) == (form.head_bits is not None)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["format"], "nvfp4-pack-quantized", "quantization_config.format"),
        (["format"], "int-quantized", "pack-quantized"),
        (["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme"),
        (["sparsity_config"], {"format": "sparse-bitmask"}, "sparsity_config"),
        (["config_groups"], {}, "exactly one group"),
        (["config_groups", "group_1"], {}, "exactly one group"),
        (["config_groups", "group_1"], {"targets": ["re:lm_head$", "Linear"]}, "exactly one group"),
        (["config_groups", "group_1"], {"targets": ["lm_head"], "weights": None}, "weights"),
        (["config_groups", "group_0", "weights"], None, "weights"),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 8}, "input_activations"),
        (["config_groups", "group_0", "weights", "num_bits"], 3, "num_bits = 3"),
        (["config_groups", "group_0", "weights", "type"], "float", "type"),
        (["config_groups", "group_0", "weights", "symmetric"], False, "symmetric = false"),
        (["config_groups", "group_0", "weights", "actorder"], "group", "actorder"),
        (["config_groups", "group_0", "weights", "strategy"], "block", "strategy"),
        (["config_groups", "group_0", "weights", "group_size"], None, "group_size = null"),
    ],
)
def test_other_forms_are_refused_by_name(path: list[str], value: Any, said: str) -> None:
    scheme = copy.deepcopy(packed_config(Packed(4, 128)))
    table = scheme
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    with pytest.raises(BadInput) as caught:
        stored_form({"quantization_config": scheme}, where="here/config.json")
    assert said in str(caught.value)
    assert str(caught.value).startswith("here/config.json: quantization_config")
    assert "\n" not in str(caught.value)


def test_methods_of_other_libraries_are_refused() -> None:
    for method in ("gptq", "awq", "bitsandbytes", None):
        with pytest.raises(BadInput, match=r"must be \"fp8\" or \"compressed-tensors\""):
            stored_form({"quantization_config": {"quant_method": method}})


# Tensors


def test_names_shapes_and_dtypes(packed: Path) -> None:
    found, config = read_all(packed), read_config(packed)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in layout(config).items():
        if not is_fp8(name):
            bias = name.endswith("bias")
            expected[name] = (shape, torch.float32 if bias else torch.bfloat16)
            continue
        out, width = shape
        expected[name + "_packed"] = ((out, -(-width // 8)), torch.int32)
        expected[name + "_scale"] = ((out, -(-width // 8)), torch.bfloat16)
        expected[name + "_shape"] = ((2,), torch.int64)
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == expected


def test_loading_dequantises(packed: Path) -> None:
    source = dict(named_weights(load(packed.parent / "source", dtype="float32")))
    for name, weight in named_weights(load(packed, dtype="float32")):
        if is_quantizable(name):
            codes = quantize(source[name], 4, 8)
            assert torch.equal(weight, dequantize(*codes, 8, torch.float32)), name
        else:
            assert torch.equal(weight, source[name]), name


def test_the_stored_form_is_read_without_unpacking(packed: Path) -> None:
    config = read_config(packed)
    with ShardReader(packed) as reader:
        weights = WeightReader(reader, config, stored_form(raw_config(packed)))
        stored = weights.stored(NAME)
        assert isinstance(stored, QuantizedWeight)
        assert (stored.bits, stored.group_size, stored.shape) == (4, 8, (24, 11))
        assert stored.codes.shape == (24, 6)
        assert stored.scales.shape == (24, 2)
        expected = weights.read(NAME, torch.float32)
        assert torch.equal(stored.dequantize(torch.float32), expected)
        assert isinstance(weights.stored("model.norm.weight"), torch.Tensor)


def test_fp8_is_read_without_dequantising(packed: Path) -> None:
    target = packed.parent / "fp8"
    convert(packed.parent / "source", target, to="fp8")
    with ShardReader(target) as reader:
        weights = WeightReader(reader, read_config(target), stored_form(raw_config(target)))
        stored = weights.stored(NAME)
        assert isinstance(stored, Fp8Weight)
        assert stored.codes.dtype == torch.float8_e4m3fn
        assert stored.scale_inv.shape == (1, 1)


def test_parts_count_as_used(packed: Path) -> None:
    comparison = examine(packed)
    assert comparison.used == set(read_all(packed))
    assert not comparison.missing
    assert not comparison.unused


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_of_other_dtypes_are_read(packed: Path, dtype: torch.dtype) -> None:
    expected = dict(named_weights(load(packed, dtype="float32")))
    scales = {n: t.to(dtype) for n, t in read_all(packed).items() if n.endswith("_scale")}
    change(packed, dict(scales))
    for name, weight in named_weights(load(packed, dtype="float32")):
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-6)


# Damage


@pytest.mark.parametrize("suffix", ["_scale", "_shape"])
def test_a_missing_part_is_named(packed: Path, suffix: str) -> None:
    change(packed, {NAME + suffix: None})
    assert f"{NAME}{suffix} is missing" in refused(packed)


def test_missing_words_leave_their_parts_unused(packed: Path) -> None:
    change(packed, {NAME + "_packed": None})
    text = refused(packed)
    assert f"1 tensor(s) missing: {NAME}" in text
    assert "no place for" in text


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("_packed", torch.zeros(24, 3, dtype=torch.int32)),
        ("_packed", torch.zeros(24, 2, dtype=torch.int64)),
        ("_scale", torch.ones(24, 3)),
        ("_scale", torch.ones(24, 2, dtype=torch.int32)),
        ("_shape", torch.tensor([24, 11, 1])),
        ("_shape", torch.tensor([24.0, 11.0])),
        ("_shape", torch.tensor([24, 99])),
        ("_shape", torch.tensor([24, 12])),
        ("_shape", torch.tensor([11, 24])),
    ],
)
def test_a_part_that_does_not_fit_is_named(packed: Path, suffix: str, tensor: Any) -> None:
    change(packed, {NAME + suffix: tensor})
    assert NAME + suffix in refused(packed)


def test_packed_weights_under_another_config_are_refused(packed: Path) -> None:
    change_config(packed, quantization_config=None)
    assert "is packed but config.json has no quantization_config" in refused(packed)


def test_words_of_the_other_width_are_refused(packed: Path) -> None:
    scheme = raw_config(packed)["quantization_config"]
    scheme["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    change_config(packed, quantization_config=scheme)
    assert "in 8 bits with group size 8 needs int32" in refused(packed)


# The library


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (8, 16), (4, -1), (8, -1)])
def test_the_library_dequantises_to_the_same(bits: int, size: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight = torch.randn(24, 48)
    codes, scales = quantize(weight, bits, size)
    config = quantization.QuantizationConfig.model_validate(packed_config(Packed(bits, size)))
    state = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([24, 48]),
    }
    compressor = library.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(state, config.config_groups["group_0"])["weight"]
    assert torch.equal(theirs, dequantize(codes, scales, size, torch.bfloat16))
