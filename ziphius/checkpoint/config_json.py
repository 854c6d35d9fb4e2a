"""``config.json`` in its two spellings: the published one and that of transformers 5 (facts 1.8).

Published V3 configs have ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` at the top level.
transformers 5 writes ``rope_parameters`` and ``dtype`` and drops the keys of which it knows one
value only. Both are read. The published spelling is written, because every engine reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from ziphius.checkpoint.compressed import METHOD, Packed, read_packed_config
from ziphius.checkpoint.folder import CONFIG_FILE
from ziphius.checkpoint.fp8 import BLOCK
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig, Yarn
from ziphius.config.table import build

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPES = ("deepseek_v3", "kimi_k2")

# The network has these properties built in. transformers does not write all of them, so that a
# key may be absent; other engines choose their code by them, so that all are written.
_BUILT_IN: Mapping[str, Any] = MappingProxyType(
    {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
    }
)
_SPELLED_APART = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "num_nextn_predict_layers",
        "num_labels",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
    }
)
# Fields of ModelConfig that have the same name and meaning in config.json. All are required.
_COPIED = tuple(
    name for name in ModelConfig.model_fields if name not in _SPELLED_APART | _BUILT_IN.keys()
)
_ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", *Yarn.model_fields})
# Keys of a rotary table that change the arithmetic, and the value at which they do not.
_NEUTRAL_ROPE: Mapping[str, Any] = MappingProxyType(
    {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
)
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "float64": torch.float64,
    }
)


def config_json(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``config.json`` says about a network whose weights are stored as ``dtype``.

    transformers opens it without remote code. A YaRN ``mscale`` or ``mscale_all_dim`` of zero is
    left out, because that is how a config says "absent" to every engine. ``initializer_range`` is
    the standard deviation really used (facts 1.8 notes that the published one is not).
    """
    name = _dtype_name(dtype)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPES[0],
        **{key: getattr(config, key) for key in _COPIED},
        **_BUILT_IN,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        # transformers' name for the scores of its ForSequenceClassification.
        **({"num_labels": config.num_labels} if config.num_labels else {}),
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        "rope_scaling": _written_yarn(config.rope_scaling),
        "attention_dropout": 0.0,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "torch_dtype": name,
        "dtype": name,
    }


def raw_config(folder: Path) -> dict[str, Any]:
    """Return ``folder/config.json`` as it stands. Raises BadInput if it is no JSON object."""
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{folder}: no {CONFIG_FILE}, so this is no checkpoint: give a Hugging Face folder"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}: restore the file") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: holds {type(raw).__name__}, not a JSON object: restore the file")
    return raw


def read_config(folder: Path, *, mtp: bool = True) -> ModelConfig:
    """Read ``folder/config.json`` in either spelling; without ``mtp`` as if it had no module.

    Raises BadInput for a file that is missing or no JSON, for a missing key, and for every value
    that describes another network than this one; the message names file, key, value and choices.
    An absent ``num_nextn_predict_layers`` means no MTP module.
    """
    raw = raw_config(folder)
    where = str(folder / CONFIG_FILE)
    _require_this_network(raw, where)
    stored_form(raw, where=where)
    stored_dtype(raw, where=where)
    missing = [key for key in _COPIED if key not in raw]
    if missing:
        raise BadInput(f"{where}: required keys are missing: {', '.join(missing)}")
    theta, yarn = _rope(raw, where)
    values = {
        **{key: raw[key] for key in _COPIED},
        "num_nextn_predict_layers": (
            raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers")) or 0
        ),
        "num_labels": raw.get("num_labels") or 0,
        "initializer_range": raw.get("initializer_range") or None,
        **{k: raw[k] for k in ("bos_token_id", "eos_token_id") if raw.get(k) is not None},
        "rope_theta": theta,
        "rope_scaling": yarn,
    }
    config = build(ModelConfig, values, where=where)
    heads = raw.get("num_key_value_heads")
    if heads is not None and heads != config.num_attention_heads:
        _refuse(where, "num_key_value_heads", heads, f"{config.num_attention_heads}, as many as"
                " num_attention_heads")  # fmt: skip
    return config if mtp else config.model_copy(update={"num_nextn_predict_layers": 0})


def stored_form(
    raw: Mapping[str, Any], *, where: str = CONFIG_FILE
) -> tuple[int, int] | Packed | None:
    """Return how quantised weights are stored, None if none are.

    FP8 has the (rows, columns) that share a scale. Raises BadInput for every scheme but two: the
    published one, which is E4M3, 128 x 128 blocks, and activations quantised while the network
    runs (facts 1.8, 4.2); and the integers of ``read_packed_config``. ``where`` begins the message.
    """
    scheme = raw.get("quantization_config")
    if scheme is None:
        return None
    if not isinstance(scheme, dict):
        _refuse(where, "quantization_config", scheme, "a table with a quant_method, or null")
    if scheme.get("quant_method") == METHOD:
        return read_packed_config(scheme, where)
    supported: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8", METHOD),
        "fmt": ("e4m3", None),
        "weight_block_size": (list(BLOCK),),
        "activation_scheme": ("dynamic", None),
        # Where it is absent transformers writes "float".
        "scale_fmt": (None, "ue8m0", "float"),
    }
    for key, choices in supported.items():
        if scheme.get(key) not in choices:
            names = " or ".join(json.dumps(choice) for choice in choices)
            _refuse(where, f"quantization_config.{key}", scheme.get(key), names)
    return BLOCK


def scale_format(raw: Mapping[str, Any]) -> str | None:
    """Return the format of FP8 scales, float32 or ue8m0 (facts 1.8); None without FP8 weights."""
    if stored_form(raw) != BLOCK:
        return None
    return "ue8m0" if raw["quantization_config"].get("scale_fmt") == "ue8m0" else "float32"


def stored_dtype(raw: Mapping[str, Any], *, where: str = CONFIG_FILE) -> torch.dtype:
    """Return the dtype of the weights that are not quantised: ``dtype``, else ``torch_dtype``.

    Without either it is float32, which is what transformers assumes. Raises BadInput for others
    than bfloat16, float16, float32 and float64.
    """
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    value = raw.get(key)
    if value is None:
        return torch.float32
    dtype = _DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        _refuse(where, key, value, ", ".join(_DTYPES))
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    names = {known: name for name, known in _DTYPES.items()}
    if dtype not in names:
        raise BadInput(f"{CONFIG_FILE}: weights cannot be stored as {dtype}: use {list(_DTYPES)}")
    return names[dtype]


def _refuse(where: str, key: str, value: Any, supported: str) -> NoReturn:
    shown = json.dumps(value)
    raise BadInput(f"{where}: {key} = {shown} is not supported: it must be {supported}")


def _require_this_network(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config that names another network, or a variant that this one has no code for."""
    if "model_type" not in raw:
        raise BadInput(f"{where}: required keys are missing: model_type")
    if raw["model_type"] not in MODEL_TYPES:
        _refuse(where, "model_type", raw["model_type"], " or ".join(MODEL_TYPES))
    if (raw.get("architectures") or [ARCHITECTURE]) != [ARCHITECTURE]:
        _refuse(where, "architectures", raw["architectures"], f'["{ARCHITECTURE}"]')
    for key, value in _BUILT_IN.items():
        if key in raw and raw[key] != value:
            _refuse(where, key, raw[key], json.dumps(value))


def _rope(raw: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Return rope_theta and the fields of Yarn; the order of precedence is that of transformers."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        _refuse(where, name, rope, "a table or null")
    given = {f"{name}.{key}": value for key, value in rope.items() if key not in _ROPE_KEYS}
    given["partial_rotary_factor"] = raw.get("partial_rotary_factor") or 1.0
    for key, value in given.items():
        neutral = _NEUTRAL_ROPE.get(key.rpartition(".")[2], "absent")
        if value != neutral:
            _refuse(where, key, value, json.dumps(neutral) if neutral != "absent" else neutral)
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        _refuse(where, f"{name}.rope_type", kind, "yarn or default")
    if "factor" not in rope:
        raise BadInput(f"{where}: required keys are missing: {name}.factor")
    original = "original_max_position_embeddings"
    yarn = {
        "factor": rope["factor"],
        original: raw.get(original) or rope.get(original) or raw["max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        # Absent is not the same as 1: transformers then scales cosine and sine, not the softmax.
        "mscale": rope.get("mscale") or 0.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }
    return theta, yarn


def _written_yarn(yarn: Yarn | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    present = {key: value for key, value in yarn.model_dump().items() if value}
    return {"type": "yarn", "rope_type": "yarn", **present}
