"""Attention on Hopper through the copy engine: its text on a processor, itself on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.near import assert_near
from tests.kernels.triton.test_latent import exact, on, ruin
from tests.support import latent_pages
from ziphius.kernels.latent import LatentPages
from ziphius.kernels.triton import latent
from ziphius.kernels.triton.latent import TritonLatent, even_splits

C, R = 512, 64


@pytest.fixture
def copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, let threads stand for warps."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] != 9:
            pytest.skip("not on Hopper")
        return
    from tests.kernels.triton import gluon_threads
    from ziphius.kernels.triton import latent_hopper

    launcher = gluon_threads.Launcher(latent_hopper, "hopper_attend_kernel")
    monkeypatch.setattr(latent_hopper, "hopper_attend_kernel", launcher)
    monkeypatch.setattr(latent_hopper, "TensorDescriptor", gluon_threads.Descriptor)
    monkeypatch.setattr(latent, "copyable", lambda *_: True)


def check(spans: list[tuple[int, int]], heads: int, device: torch.device, **options: Any) -> None:
    """Compare with the reference in float64; what is no key is NaN."""
    torch.manual_seed(0)
    cache: LatentPages = latent_pages(spans, C + R, torch.bfloat16, **options)
    ruin(cache, spans)
    q_NHc = torch.randn(len(cache.slots_N), heads, C + R, dtype=torch.bfloat16)
    found_NHC: Tensor = TritonLatent().attend(q_NHc.to(device), C, 0.05, on(cache, device))
    assert found_NHC.dtype == torch.bfloat16
    assert_near(found_NHC, exact(q_NHc, C, 0.05, cache), torch.bfloat16)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("splits", [1, 3, 17])
@pytest.mark.parametrize(
    ("spans", "heads"),
    [
        ([(0, 1), (63, 64), (64, 65), (200, 201)], 16),  # one query a sequence
        ([(5, 7), (63, 65), (299, 301)], 16),  # two that share a program
        ([(70, 71), (130, 131)], 128),  # two programs a token
        ([(30, 32), (0, 2)], 80),  # of which the second is not full
        ([(7, 8), (20, 161), (40, 41), (0, 3)], 3),  # a chunk beside single tokens
    ],
)
def test_attention(
    device: torch.device,
    spans: list[tuple[int, int]],
    heads: int,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latent, "even_splits", lambda *_: splits)
    check(spans, heads, device)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("page", [32, 64, 128])
@pytest.mark.parametrize("first", [0, 2, 70])
def test_pages_and_rows_that_are_no_keys(device: torch.device, page: int, first: int) -> None:
    check([(90, 92), (150, 151), (300, 301)], 16, device, page=page, first=first)


def test_waves_are_full() -> None:
    assert even_splits(128, 4096, 132) == 1
    assert even_splits(64, 4096, 132) == 2
    assert even_splits(256, 4096, 132) == 1
    assert even_splits(1, 4096, 132) == 16
    assert even_splits(1, 100, 132) == 1
    # One long request has the whole GPU, and a chunk of it fills the GPU uncut.
    assert even_splits(1, 100_000, 132) == 132
    assert even_splits(2, 100_000, 132) == 66
    assert even_splits(512, 100_000, 132) == 1
