"""What a run needs beside the weights: tensors as safetensors, numbers as JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ziphius.checkpoint.shards import write_file
from ziphius.config.errors import BadInput

STATE_FOLDER = "state"
_TENSORS = "optimizer.safetensors"
_NUMBERS = "state.json"


def write_state(
    checkpoint: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Write ``state/`` into a checkpoint folder that is being written."""
    folder = checkpoint / STATE_FOLDER
    folder.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(folder / _TENSORS, contiguous)
    write_numbers(checkpoint, numbers)


def write_numbers(checkpoint: Path, numbers: Mapping[str, Any]) -> None:
    """Write the numbers of a state whose tensors are written by others."""
    text = json.dumps(numbers, indent=2) + "\n"
    (checkpoint / STATE_FOLDER / _NUMBERS).write_text(text, "utf-8")


def read_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_state`` wrote. Raises BadInput when it is absent or damaged."""
    folder = checkpoint / STATE_FOLDER
    try:
        return load_file(folder / _TENSORS), read_numbers(checkpoint)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{folder}: no usable run state: {error}") from None


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """Read the numbers of a state. Raises BadInput when they are absent or damaged."""
    folder = checkpoint / STATE_FOLDER
    try:
        numbers: dict[str, Any] = json.loads((folder / _NUMBERS).read_text("utf-8"))
        return numbers
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: no usable run state: {error}") from None
