"""Versions are chosen by name, and a name that is not there is an error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ziphius.config.errors import BadInput
from ziphius.kernels.select import OPERATIONS, Kernels, widening_pays


def test_defaults_exist_and_are_printed() -> None:
    kernels = Kernels()
    for op, (versions, _) in OPERATIONS.items():
        assert getattr(kernels, op) in versions
        assert f"{op}={getattr(kernels, op)}" in str(kernels).split()
    assert set(OPERATIONS) == {f.name for f in dataclasses.fields(kernels)} - {"library", "spared"}


def test_every_operation_has_a_reference() -> None:
    Kernels(attention="reference", grouped="reference")


def test_an_unknown_version_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="kernel grouped: no version 'lopo'; did you mean 'loop'"):
        Kernels(grouped="lopo")


def test_a_choice_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Kernels().attention = "reference"


def test_measuring_products_gives_an_answer_and_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    assert widening_pays(size=64, rounds=2) in (True, False)
    assert torch.get_num_threads() == before
