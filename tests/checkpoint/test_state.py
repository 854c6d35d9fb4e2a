"""A run's state: what is written can be read, and damage is told in one line."""

from pathlib import Path

import pytest
import torch

from ziphius.checkpoint.state import read_state, write_state
from ziphius.config.errors import BadInput

TENSORS = {
    "first.a": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "second.a": torch.tensor([1.5, -2.0]).bfloat16(),
}
NUMBERS = {"optimizer_steps": 3, "loader": {"rows_dealt": 2**52 + 1}}


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_state(tmp_path, TENSORS, NUMBERS)
    tensors, numbers = read_state(tmp_path)
    assert numbers == NUMBERS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_state_is_told_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    write_state(tmp_path, TENSORS, NUMBERS)
    path = tmp_path / "state" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="no usable run state") as error:
        read_state(tmp_path)
    assert "\n" not in str(error.value)
