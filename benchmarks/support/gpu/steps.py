"""What stands beside products in a step: heads out of up-projections and back, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from support.gpu.passes import bound_of
from support.gpu.rows import EAGER, also_compiled
from ziphius.kernels.adamw import Rates, adamw_step
from ziphius.model.rope import Rope, rotate


@dataclass(frozen=True)
class Sizes:
    """Tokens, heads and their widths (plain, rotary, of values), and the weights of an update."""

    tokens: int
    heads: int
    widths: tuple[int, int, int]
    weights: int


FULL = Sizes(4096, 128, (128, 64, 128), 2**28)
SMALL = Sizes(512, 16, (128, 64, 128), 2**22)
TOY = Sizes(19, 5, (24, 8, 12), 2500)
# A large rate, so that an update weighs as much as what it changes.
RATES = Rates(0.9, 0.95, 0.9, 0.3, 0.2, 1e-8, 0.125)


class Projected(NamedTuple):
    """What the up-projections gave, the shared rotary key, and the angles of every token."""

    q_BTHd: Tensor
    kv_BTHo: Tensor
    k_rope_BTR: Tensor
    cos_Tr: Tensor
    sin_Tr: Tensor


class Gradients(NamedTuple):
    """What backward of it is given."""

    dq_BTHd: Tensor
    dk_BTHd: Tensor
    dv_BTHv: Tensor
    cos_Tr: Tensor
    sin_Tr: Tensor


class Weights(NamedTuple):
    """A parameter, its gradient, and its moments."""

    p: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor


def heads(place: Place, sizes: Sizes) -> list[Entry]:
    """Return the expansion to heads and its backward."""
    return [_expand(place, sizes), _expand_backward(place, sizes)]


def _angles(place: Place, generator: Generator, T: int, R: int) -> tuple[Tensor, Tensor]:
    angles_Tr = 100 * torch.rand(T, R // 2, generator=generator, device=place.device)
    return angles_Tr.cos(), angles_Tr.sin()


def expand(x: Projected) -> Sequence[Tensor]:
    """Do it in the steps of ``model/mla.py``."""
    rope, R = Rope(x.cos_Tr, x.sin_Tr), x.k_rope_BTR.shape[-1]
    nope = x.q_BTHd.shape[-1] - R
    q_nope, q_rope = x.q_BTHd.split((nope, R), -1)
    k_nope, v = x.kv_BTHo.tensor_split((nope,), -1)
    k_rope = rotate(x.k_rope_BTR.unsqueeze(2), rope).expand(-1, -1, x.q_BTHd.shape[2], -1)
    return torch.cat((q_nope, rotate(q_rope, rope)), -1), torch.cat((k_nope, k_rope), -1), v


def expand_backward(x: Gradients) -> Sequence[Tensor]:
    """Go back through these steps."""
    back, R = Rope(x.cos_Tr, -x.sin_Tr), 2 * x.cos_Tr.shape[-1]
    dq_nope, dq_rope = x.dq_BTHd.tensor_split((x.dq_BTHd.shape[-1] - R,), -1)
    dk_nope, dk_rope = x.dk_BTHd.tensor_split((x.dk_BTHd.shape[-1] - R,), -1)
    shared = rotate(dk_rope.sum(2, keepdim=True), back).squeeze(2)
    dq = torch.cat((dq_nope, rotate(dq_rope, back)), -1)
    return dq, torch.cat((dk_nope, x.dv_BTHv), -1), shared


def _expand(place: Place, sizes: Sizes) -> Entry:
    """Ours turns queries in their place, and leaves values where they are."""
    T, H, (nope, R, v) = sizes.tokens, sizes.heads, sizes.widths

    def make(generator: Generator) -> Projected:
        q_BTHd = place.normal(generator, 1, T, H, nope + R)
        kv_BTHo = place.normal(generator, 1, T, H, nope + v)
        k_rope_BTR = place.normal(generator, 1, T, R)
        return Projected(q_BTHd, kv_BTHo, k_rope_BTR, *_angles(place, generator, T, R))

    def ours(x: Projected) -> Sequence[Tensor]:
        from ziphius.kernels.triton.expand import expand_heads_triton

        return expand_heads_triton(*x, own_q=True)

    numbers = T * H * (2 * R + nope + nope + R) + T * R
    return Entry(
        section="expand",
        name=f"expand forward {T} tokens, {H} heads",
        make=make,
        reference=expand,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, expand),
        peers=also_compiled(expand),
        nbytes=float(numbers * place.storage.itemsize + 4 * T * R),
        goal=(COPY, 0.8),
    )


def _expand_backward(place: Place, sizes: Sizes) -> Entry:
    T, H, (nope, R, v) = sizes.tokens, sizes.heads, sizes.widths

    def make(generator: Generator) -> Gradients:
        shapes = ((1, T, H, nope + R), (1, T, H, nope + R), (1, T, H, v))
        grads = [place.normal(generator, *shape) for shape in shapes]
        return Gradients(*grads, *_angles(place, generator, T, R))

    def ours(x: Gradients) -> Sequence[Tensor]:
        from ziphius.kernels.triton.expand import expand_backward_triton

        return expand_backward_triton(*x)

    def reference(x: Gradients) -> Sequence[Tensor]:
        dq, dkv, _ = expand_backward(x)
        return dq, dkv, _shared(x)

    numbers = T * H * (2 * (nope + R) + 2 * (nope + v) + R) + T * R
    # torch rounds the sum over heads before it is turned.
    peers = [
        Version(x.name, x.run, bound=2e-2, slow=x.slow) for x in also_compiled(expand_backward)
    ]
    return Entry(
        section="expand",
        name=f"expand backward {T} tokens, {H} heads",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, expand_backward, bound=2e-2),
        peers=peers,
        nbytes=float(numbers * place.storage.itemsize + 4 * T * R),
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


def _shared(x: Gradients) -> Tensor:
    """Sum the gradient of the shared key in float64."""
    R = 2 * x.cos_Tr.shape[-1]
    back = Rope(x.cos_Tr.double(), -x.sin_Tr.double())
    return rotate(x.dk_BTHd[..., -R:].double().sum(2, keepdim=True), back).squeeze(2)


def updates(place: Place, sizes: Sizes) -> list[Entry]:
    """Return a step of AdamW with moments in the storage's dtype."""
    count, kept = sizes.weights, place.storage

    def make(generator: Generator) -> Weights:
        p, grad, first, second = (
            place.normal(generator, count, dtype=dtype)
            for dtype in (torch.float32, torch.float32, kept, kept)
        )
        return Weights(p, grad.mul_(8), first, second.abs_())

    def ours(x: Weights) -> Sequence[Tensor]:
        from ziphius.kernels.triton.adamw import adamw_step_triton

        adamw_step_triton(*x, RATES)
        return x.p, x.first, x.second

    def plain(x: Weights) -> Sequence[Tensor]:
        adamw_step(*x, RATES)
        return x.p, x.first, x.second

    def reference(x: Weights) -> Sequence[Tensor]:
        """In parts, since float64 takes much room."""
        for parts in zip(*(tensor.split(2**24) for tensor in x), strict=True):
            wide = [part.double() for part in parts]
            adamw_step(*wide, RATES)
            for part, new in zip(parts, wide, strict=True):
                part.copy_(new)
        return x.p, x.first, x.second

    return [
        Entry(
            section="adamw",
            name=f"adamw {count} parameters",
            make=make,
            reference=reference,
            ours=Version(OURS, ours),
            plain=Version(PLAIN, plain),
            peers=(Version(EAGER, plain),),
            nbytes=count * (3 * 4.0 + 4 * kept.itemsize),
            bound=bound_of(place),
            goal=(COPY, 0.8),
        )
    ]
