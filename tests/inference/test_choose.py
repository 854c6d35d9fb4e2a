"""Names of devices and kernels: what they mean on a machine with GPUs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ziphius
from tests.support import random_model
from ziphius.config.errors import BadInput
from ziphius.inference import choose
from ziphius.inference.choose import choose_device, choose_kernels
from ziphius.inference.llm import LLM
from ziphius.kernels import select
from ziphius.kernels.select import ANSWER_ON_GPUS, ON_GPUS, TRITON, Kernels, gpu_answering_kernels

GPU = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as names go, where the second one is current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")],
)
def test_devices_by_name(name: str, expected: str) -> None:
    assert str(choose_device(name)) == expected
    assert choose_device(torch.device(name)) == choose_device(name)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda:2", "device = 'cuda:2': there are 2 here, numbered from 0"),
        ("gpu", "device = 'gpu': use cpu, cuda or cuda:N"),
        ("mps", "device = 'mps': use cpu, cuda or cuda:N"),
        ("", "device = '': use cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_not_there(name: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        choose_device(name)


def test_a_gpu_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", TRITON):
        assert choose_kernels(name, exact=False, device=GPU) == gpu_answering_kernels()
    assert choose_kernels("torch", exact=False, device=GPU) == Kernels()
    monkeypatch.setattr(choose, "has_triton", lambda: False)
    assert choose_kernels("auto", exact=False, device=GPU) == Kernels()


@pytest.mark.parametrize(
    ("name", "exact", "expected"),
    [
        ("auto", True, r"say fast_math=True \(--fast-math\)"),
        ("torch", True, r"say fast_math=True \(--fast-math\)"),
        ("compiled", False, "those are for processors: use triton on a GPU"),
        ("cuda", False, "use auto, compiled, torch or triton"),
    ],
)
def test_kernels_that_a_gpu_does_not_run(name: str, exact: bool, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        choose_kernels(name, exact=exact, device=GPU)


def test_kernels_for_gpus_on_a_processor_need_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ziphius.kernels.triton import bits

    monkeypatch.setattr(bits, "interpreted", lambda: False)
    with pytest.raises(BadInput, match=r"or set TRITON_INTERPRET=1") as error:
        choose_kernels(TRITON, exact=False)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(bits, "interpreted", lambda: True)
    assert choose_kernels(TRITON, exact=False) == gpu_answering_kernels()
    monkeypatch.setattr(select, "has_triton", lambda: False)
    with pytest.raises(BadInput, match="the package triton is not installed"):
        choose_kernels(TRITON, exact=False)


def test_every_kernel_that_answers_on_a_gpu_is_chosen() -> None:
    chosen = gpu_answering_kernels()
    assert set(ANSWER_ON_GPUS) <= set(ON_GPUS)
    assert all(getattr(chosen, op) == TRITON for op in ANSWER_ON_GPUS)
    assert chosen.grouped == "grouped_mm"
    assert chosen.function("mixture") is None, "experts in stages: rows are sorted on the device"


def test_what_is_for_processors(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose.torch.cuda, "is_available", lambda: True)
        patch.setattr(choose.torch.cuda, "device_count", lambda: 1)
        ziphius.save(random_model(), tmp_path / "model")
        with pytest.raises(BadInput, match="all experts lie on cuda:0"):
            LLM(tmp_path / "model", device="cuda:0", fast_math=True, expert_bytes="auto")
        with pytest.raises(BadInput, match="a plan counts processors' memory: leave it out"):
            LLM.plan(tmp_path / "model", device="cuda:0", fast_math=True)
