"""The checkpoint that a later stage begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ziphius.checkpoint.config_json import read_config
from ziphius.checkpoint.files import is_weight_file, sha256_of
from ziphius.checkpoint.folder import CONFIG_FILE, TOKENIZER_FILE, checkpoint_folder
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.config.recipe import Recipe
from ziphius.data.tokenizer import BOS_ID, EOS_ID, read_tokenizer
from ziphius.parallel.collectives import Axis, alone
from ziphius.training.together import by_first


@dataclass(frozen=True)
class Start:
    """A checkpoint's folder, network and tokenizer. ``sha256`` is of its weights and settings."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    sha256: str

    @property
    def about(self) -> dict[str, str]:
        """What a summary tells of it."""
        return {"start": str(self.folder), "start_sha256": self.sha256}

    def into(self, recipe: Recipe, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Return a recipe with the network and the tokenizer of this checkpoint.

        ``changes`` are dimensions in which the network is to differ.
        """
        path = str(self.folder / TOKENIZER_FILE)
        tokenizer = recipe.tokenizer.model_copy(update={"path": path})
        model = self.config.model_copy(update=dict(changes or {}))
        return recipe.model_copy(update={"model": model, "tokenizer": tokenizer})


def open_start(path: Path, axis: Axis | None = None) -> Start:
    """Open a checkpoint, or a run's, to train on from it. The ranks of an axis do this together.

    Raises BadInput for one without a tokenizer, or with another beginning and end than ours.
    """
    folder = checkpoint_folder(path).absolute()
    if not (folder / TOKENIZER_FILE).is_file():
        raise BadInput(f"{folder}: has no {TOKENIZER_FILE}: training on needs the tokenizer")
    config = read_config(folder)
    if (config.bos_token_id, config.eos_token_id) != (BOS_ID, EOS_ID):
        raise BadInput(
            f"{folder}: bos_token_id = {config.bos_token_id} and eos_token_id = "
            f"{config.eos_token_id}: training on needs V3's, {BOS_ID} and {EOS_ID}"
        )
    digest = by_first(axis or alone(), lambda: checkpoint_sha256(folder))
    return Start(folder, config, read_tokenizer(folder / TOKENIZER_FILE), digest)


def checkpoint_sha256(folder: Path) -> str:
    """Return one SHA-256 of all files of a checkpoint that say what it computes."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in (CONFIG_FILE, TOKENIZER_FILE) or is_weight_file(path.name):
            digest.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()
