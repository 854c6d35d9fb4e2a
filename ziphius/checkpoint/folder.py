"""Which folder a path means, a checkpoint or the newest one of a run; and its small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ziphius.checkpoint.files import recover_directory
from ziphius.config.errors import BadInput, in_one_line

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
STEP_PREFIX = "step-"


def checkpoint_folder(path: Path) -> Path:
    """Return the Hugging Face folder that ``path`` means: itself, a run's final checkpoint, or the
    newest one of a run that has not ended.
    """
    stages = sorted((path / "stages").glob("*"))
    newest = [checkpoint for stage in stages for checkpoint in stage_checkpoints(stage)]
    for folder in (path, path / "checkpoint", *newest):
        recover_directory(folder)
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder: give a Hugging Face folder or a run folder")
    raise BadInput(f"{path}: no {CONFIG_FILE} there or in its checkpoint/: not a checkpoint")


def stage_checkpoints(stage: Path) -> list[Path]:
    """List the checkpoints of a stage of a run, ``step-N``, the newest first."""
    if not stage.is_dir():
        return []
    numbered = [
        (int(path.name.removeprefix(STEP_PREFIX)), path)
        for path in stage.iterdir()
        if path.name.removeprefix(STEP_PREFIX).isdecimal() and path.name.startswith(STEP_PREFIX)
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def read_json_object(file: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one where there is no file.

    Raises BadInput for a file that can't be read, or holds anything else.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read: {in_one_line(error)}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: holds no JSON object: restore the checkpoint's own")
    return value
