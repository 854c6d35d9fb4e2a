"""GPTQ of whole checkpoints: better than rounding on the text, exact about what it did."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import random_model
from ziphius.checkpoint.compressed import is_quantizable
from ziphius.checkpoint.convert import convert
from ziphius.checkpoint.huggingface import load, save
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from ziphius.inference.gptq import Calibration, Gptq
from ziphius.model.weights import named_weights

TEXT = "".join(f"def name_{n % 7}(x):\n    return x + {n % 5}\n\n" for n in range(150))
HOW = Gptq(bits=4, group_size=16, sequence_length=32, least_rows=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer knows the text, and the text beside it."""
    folder = tmp_path_factory.mktemp("gptq")
    model = random_model(vocab_size=300, num_nextn_predict_layers=2)
    save(model, folder / "source", dtype="bfloat16")
    save_tokenizer(train_tokenizer([TEXT], 300), folder / "source")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder / "source"


def calibrated(source: Path, target: Path, how: Gptq = HOW, **options: Any) -> Calibration:
    with Calibration(source, source.parent / "text.txt", how) as quantizer:
        convert(source, target, to=f"int{how.bits}", quantizer=quantizer, **options)
    return quantizer


def test_every_layer_comes_nearer_to_the_unquantised_one(source: Path, tmp_path: Path) -> None:
    calibrated(source, tmp_path / "gptq")
    convert(source, tmp_path / "rounded", to="int4", group_size=16)
    tokenizer = load_tokenizer(source)
    tokens = torch.tensor([tokenizer.encode(TEXT).ids[:640]]).view(-1, 32)
    with torch.no_grad():
        expected, found, rounded = (
            load(path, dtype="float32").features(tokens)
            for path in (source, tmp_path / "gptq", tmp_path / "rounded")
        )
    outputs = [(f.hidden_BTD, *f.mtp_hidden) for f in (expected, found, rounded)]
    for right, ours, plain in zip(*outputs, strict=True):
        assert (ours - right).norm() < 0.9 * (plain - right).norm()


def test_what_was_done_is_recorded(source: Path, tmp_path: Path) -> None:
    quantizer = calibrated(source, tmp_path / "gptq")
    record = json.loads((tmp_path / "gptq" / "config.json").read_text())["ziphius_quantization"]
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    assert record == {
        "method": "gptq",
        "bits": 4,
        "group_size": 16,
        "act_order": False,
        "damping": 0.01,
        "tokens": 65536,
        "sequence_length": 32,
        "least_rows": 24,
        "calibration_sha256": sha256,
        "calibration_tokens": record["calibration_tokens"],
        "experts": 4 * 8,
        "experts_rounded": quantizer.experts_rounded,
    }
    assert 0 < record["calibration_tokens"] <= len(TEXT)
    assert record["calibration_tokens"] % 32 == 0
    assert quantizer.experts == 4 * 8


def test_experts_with_few_rows_are_rounded(source: Path, tmp_path: Path) -> None:
    how = Gptq(bits=4, group_size=16, sequence_length=32, least_rows=10**9)
    assert calibrated(source, tmp_path / "gptq", how).experts_rounded == 4 * 8
    convert(source, tmp_path / "rounded", to="int4", group_size=16)
    rounded = dict(named_weights(load(tmp_path / "rounded")))
    same = {
        name: torch.equal(weight, rounded[name])
        for name, weight in named_weights(load(tmp_path / "gptq"))
    }
    for name, equal in same.items():
        assert equal == (".mlp.experts." in name or not is_quantizable(name)), name


def test_the_same_text_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    how = Gptq(bits=8, group_size=8, act_order=True, sequence_length=32, tokens=200)
    calibrated(source, tmp_path / "one", how)
    calibrated(source, tmp_path / "two", how)
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_mtp(source: Path, tmp_path: Path) -> None:
    with Calibration(source, source.parent / "text.txt", HOW, mtp=False) as quantizer:
        convert(source, tmp_path / "gptq", to="int4", mtp=False, quantizer=quantizer)
    assert quantizer.experts == 2 * 8
    assert load(tmp_path / "gptq").config.num_nextn_predict_layers == 0


def test_one_layer_is_in_memory(source: Path, tmp_path: Path) -> None:
    """Whatever layer is asked for, no other has real weights."""
    with Calibration(source, source.parent / "text.txt", HOW) as quantizer:
        find, seen = quantizer.codes, set()

        def watched(name: str, weight: torch.Tensor) -> Any:
            codes = find(name, weight)
            real = {
                parts[2]
                for n, t in named_weights(quantizer._model)
                if not t.is_meta and (parts := n.split("."))[1] == "layers"
            }
            assert real == {name.split(".")[2]}
            seen.update(real)
            return codes

        quantizer.codes = watched  # type: ignore[method-assign]
        convert(source, tmp_path / "gptq", to="int4", quantizer=quantizer)
    assert seen == {"0", "1", "2", "3", "4"}


# What is refused


def refused(source: Path, text: Path, how: Gptq = HOW) -> str:
    with pytest.raises(BadInput) as caught:
        Calibration(source, text, how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_texts_that_cannot_be_used(source: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused(source, tmp_path / "absent")
    (tmp_path / "empty").write_text("")
    assert "is empty" in refused(source, tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    assert "not UTF-8" in refused(source, tmp_path / "bytes")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    save(random_model(), tmp_path / "bare")
    (tmp_path / "text").write_text(TEXT)
    assert "tokenizer" in refused(tmp_path / "bare", tmp_path / "text")


@pytest.mark.parametrize(
    "fields",
    [{"bits": 3}, {"group_size": 0}, {"damping": -1.0}, {"damping": float("nan")}, {"tokens": 0}],
)
def test_impossible_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"gptq|damping"):
        Gptq(**fields)


def test_a_hessian_without_damping_names_the_matrix(source: Path, tmp_path: Path) -> None:
    how = Gptq(bits=4, group_size=16, damping=0.0, tokens=8, sequence_length=8)
    with pytest.raises(BadInput, match=r"model\.layers\.0.*raise the damping"):
        calibrated(source, tmp_path / "gptq", how)
    assert not (tmp_path / "gptq").exists()


def test_a_quantizer_of_another_width_is_refused(source: Path, tmp_path: Path) -> None:
    with (
        Calibration(source, source.parent / "text.txt", HOW) as quantizer,
        pytest.raises(BadInput, match="integers of 4 bits"),
    ):
        convert(source, tmp_path / "gptq", to="int8", quantizer=quantizer)


def test_later_layers_read_what_quantised_ones_write(source: Path, tmp_path: Path) -> None:
    """The Hessian of the second layer is that of the quantised first layer's output."""
    name, seen = "model.layers.1.self_attn.q_a_proj.weight", {}
    with Calibration(source, source.parent / "text.txt", HOW) as quantizer:
        find = quantizer.codes

        def watched(asked: str, weight: torch.Tensor) -> Any:
            codes = find(asked, weight)
            if asked == name:
                assert quantizer._inputs is not None
                seen["hessian"] = quantizer._inputs.hessian(name).clone()
            return codes

        quantizer.codes = watched  # type: ignore[method-assign]
        convert(source, tmp_path / "gptq", to="int4", quantizer=quantizer)
        batches = quantizer._tokens
    model = load(tmp_path / "gptq", dtype="float32")
    expected = torch.zeros_like(seen["hessian"])
    with torch.no_grad():
        for tokens in batches:
            x_BTD, _ = model.layers[0](model.embed_tokens(tokens), model.rope(tokens.shape[1]))
            x_ND = model.layers[1].input_layernorm(x_BTD).flatten(0, 1)
            expected += x_ND.T @ x_ND
    torch.testing.assert_close(seen["hessian"], expected, rtol=1e-3, atol=1e-2)
