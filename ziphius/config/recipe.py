"""A recipe: one TOML file with a table a concern, read, overridden, checked and written back."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import model_validator

from ziphius.config.data import DataConfig
from ziphius.config.distill import DistillConfig
from ziphius.config.dpo import DpoConfig
from ziphius.config.errors import BadInput
from ziphius.config.extend import ExtendConfig
from ziphius.config.grpo import GrpoConfig
from ziphius.config.guard import GuardConfig
from ziphius.config.model import ModelConfig
from ziphius.config.parallel import ParallelConfig
from ziphius.config.precision import PrecisionConfig
from ziphius.config.pretrain import PretrainConfig
from ziphius.config.reward import RewardConfig
from ziphius.config.run import RunConfig
from ziphius.config.sft import SftConfig
from ziphius.config.table import Table, build, nearest
from ziphius.config.tokenizer import TokenizerConfig


class Recipe(Table):
    """Everything a run depends on."""

    model: ModelConfig
    pretrain: PretrainConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()
    extend: ExtendConfig | None = None
    sft: SftConfig | None = None
    reward: RewardConfig | None = None
    distill: DistillConfig | None = None
    dpo: DpoConfig | None = None
    grpo: GrpoConfig | None = None

    @model_validator(mode="after")
    def _tables_agree(self) -> Recipe:
        if self.tokenizer.path is None and self.tokenizer.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size = {self.tokenizer.vocab_size} and model.vocab_size = "
                f"{self.model.vocab_size} differ: set both to the same value"
            )
        if (self.model.bos_token_id, self.model.eos_token_id) != (0, 1):
            raise ValueError(
                f"model.bos_token_id = {self.model.bos_token_id} and model.eos_token_id = "
                f"{self.model.eos_token_id}: a recipe trains V3's tokenizer, with 0 and 1"
            )
        needed = self.pretrain.sequence_length
        if needed > self.model.max_position_embeddings:
            raise ValueError(
                f"pretrain.sequence_length = {needed} exceeds model.max_position_embeddings = "
                f"{self.model.max_position_embeddings}"
            )
        if self.model.num_nextn_predict_layers >= needed:
            raise ValueError(
                f"pretrain.sequence_length = {needed} leaves no target to "
                f"num_nextn_predict_layers = {self.model.num_nextn_predict_layers}"
            )
        return self


def preset_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("ziphius.config") / "presets"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name[-5:] == ".toml")


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a preset's name or a file's path, then apply ``table.key=value`` strings.

    Raises BadInput for a source that does not exist, bad TOML, unknown keys and impossible values.
    """
    values = _read_values(source)
    for override in overrides:
        _override(values, override)
    return build(Recipe, values, where=f"recipe {source}")


def read_recipe(text: str, where: str) -> Recipe:
    """Read a recipe from TOML. Raises BadInput, which names ``where`` it comes from."""
    return build(Recipe, _parse(text, where), where=f"recipe {where}")


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as TOML that ``load_recipe`` reads back equal."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def changed_keys(first: Recipe, second: Recipe) -> list[str]:
    """List every ``table.key`` in which two recipes differ, sorted."""
    one, other = (
        {
            f"{table}.{key}": value
            for table, fields in recipe.model_dump(exclude_none=True).items()
            for key, value in fields.items()
        }
        for recipe in (first, second)
    )
    return sorted(key for key in one | other if one.get(key) != other.get(key))


def _read_values(source: str) -> dict[str, Any]:
    if source in preset_names():
        text = (resources.files("ziphius.config") / "presets" / f"{source}.toml").read_text("utf-8")
        return _parse(text, source)
    path = Path(source)
    if not path.is_file():
        hint = nearest(source, preset_names())
        raise BadInput(f"recipe {source}: neither a file nor a preset{hint}")
    try:
        return _parse(path.read_text("utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {source}: cannot be read: {error}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"recipe {source}: not valid TOML: {error}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Apply one ``table.key=value``. The value is TOML, else a bare string; ``null`` unsets it."""
    name, equals, text = override.partition("=")
    path = name.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise BadInput(f"--set {override}: write table.key=value, as in pretrain.steps=100")
    table: Any = values
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise BadInput(f"--set {override}: '{part}' is a value, not a table")
    if text.strip() == "null":
        table.pop(path[-1], None)
        return
    table[path[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        parsed: Mapping[str, Any] = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text
