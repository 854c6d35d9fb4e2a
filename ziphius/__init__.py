"""Ziphius: the DeepSeek-V3 system in one Python package.

Importing the package does no work and brings no heavy library; a name is loaded when it is used:

    load(path, dtype=..., device=...)   a checkpoint as a module: ids [B, T] to logits [B, T, V]
    save(model, path)                   a model as a Hugging Face checkpoint
    convert(source, target, to=...)     a checkpoint in another form
    LLM(path)                           a checkpoint that answers: generate, chat, score, stream
    SamplingParams(...)                 how to choose tokens, and where to stop
    load_recipe(name_or_path)           a recipe, checked
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziphius.checkpoint.convert import convert
    from ziphius.checkpoint.huggingface import load, save
    from ziphius.config.errors import BadInput, ZiphiusError
    from ziphius.config.model import ModelConfig
    from ziphius.config.recipe import Recipe, load_recipe
    from ziphius.inference.llm import LLM
    from ziphius.inference.params import SamplingParams
    from ziphius.model.transformer import Transformer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BadInput",
    "ModelConfig",
    "Recipe",
    "SamplingParams",
    "Transformer",
    "ZiphiusError",
    "convert",
    "load",
    "load_recipe",
    "save",
]

_HOMES = {
    "LLM": "ziphius.inference.llm",
    "BadInput": "ziphius.config.errors",
    "ModelConfig": "ziphius.config.model",
    "Recipe": "ziphius.config.recipe",
    "SamplingParams": "ziphius.inference.params",
    "Transformer": "ziphius.model.transformer",
    "ZiphiusError": "ziphius.config.errors",
    "convert": "ziphius.checkpoint.convert",
    "load": "ziphius.checkpoint.huggingface",
    "load_recipe": "ziphius.config.recipe",
    "save": "ziphius.checkpoint.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ziphius' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
