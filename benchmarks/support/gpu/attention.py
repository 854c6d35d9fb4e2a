"""Latent attention: decode over the paged cache, absorbed, and prefill in the expanded form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from ziphius.kernels import attention
from ziphius.kernels.latent import LatentPages, TorchLatent

C, R, NOPE, V = 512, 64, 128, 128
SCALE = (NOPE + R) ** -0.5
MATH = "torch products, no pages"
SDPA, CUDNN, FLEX = "SDPA, values padded", "SDPA of cuDNN", "FlexAttention"


@dataclass(frozen=True)
class Sizes:
    """Decode: sequences, rows, heads and queries each. Prefill: heads and tokens."""

    batch: int
    length: int
    heads: Sequence[int]
    queries: Sequence[int]
    page: int
    prefill: tuple[int, int]
    documents: int


FULL = Sizes(128, 4096, (16, 128), (1, 2), 64, (128, 4096), 7)
SMALL = Sizes(4, 256, (16,), (1, 2), 64, (8, 256), 3)
TOY = Sizes(3, 40, (3,), (1, 2), 16, (2, 37), 3)


def decode(place: Place, sizes: Sizes) -> list[Entry]:
    """Return steps over sequences of equal lengths, and one over lengths that differ."""
    pairs = [(heads, queries) for queries in sizes.queries for heads in sizes.heads]
    equal = [_decode(place, sizes, [sizes.length] * sizes.batch, *pair) for pair in pairs]
    lengths = [max(2, sizes.length * (n + 1) // sizes.batch) for n in range(sizes.batch)]
    return [*equal, _decode(place, sizes, lengths, *pairs[-1])]


class Step(NamedTuple):
    """The queries of a decode step, and the pages of all sequences."""

    q_NHc: Tensor
    cache: LatentPages


def _decode(place: Place, sizes: Sizes, lengths: Sequence[int], heads: int, queries: int) -> Entry:
    N, rows, widest = len(lengths) * queries, sum(lengths), max(lengths)

    def make(generator: Generator) -> Step:
        device, each = place.device, -(-widest // sizes.page)
        pages = place.normal(generator, len(lengths) * each, sizes.page, C + R)
        shuffled = torch.randperm(len(pages), generator=generator, device=device)
        ends = torch.tensor(lengths, device=device).repeat_interleave(queries)
        back = torch.arange(queries, device=device).flip(0).repeat(len(lengths))
        sequence_N = torch.arange(len(lengths), device=device).repeat_interleave(queries)
        slots_N = torch.full((N,), -1, device=device)
        where = (slots_N, shuffled.view(len(lengths), each), sequence_N, ends - 1 - back)
        return Step(place.normal(generator, N, heads, C + R), LatentPages(pages, *where))

    def use(kernels: Any) -> Callable[[Step], Tensor]:
        return lambda x: kernels.attend(x.q_NHc, C, SCALE, x.cache)

    def ours(x: Step) -> Tensor:
        from ziphius.kernels.triton.latent import TritonLatent

        return use(TritonLatent())(x)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton import latent

        tried = latent.HALF_LAUNCHES
        return [Version(str(tuple(one)), use(latent.TritonLatent(one))) for one in tried]

    def reference(x: Step) -> Tensor:
        parts = [_attend(_joined(x, heads, queries, slice(n, n + 16))) for n in range(0, N, 16)]
        return torch.cat(parts)

    assert 16 % queries == 0, "sequences are computed whole"
    uneven = "" if len(set(lengths)) == 1 else f"{min(lengths)} to "
    scores = float(queries * rows - len(lengths) * queries * (queries - 1) // 2)
    peer = Version(MATH, _attend_in_storage, lambda x: _joined(x, heads, queries), bound=2e-2)
    return Entry(
        section="decode",
        name=f"{len(lengths)} x {uneven}{widest}, {heads} heads, {queries} queries",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: TorchLatent().attend(x.q_NHc, C, SCALE, x.cache)),
        peers=(peer,),
        flops=2.0 * scores * heads * (2 * C + R),
        nbytes=(rows * (C + R) + N * heads * (2 * C + R)) * place.storage.itemsize,
        bound=1e-2 if place.storage == torch.bfloat16 else 1e-4,
        # Below that many operations a byte it waits for memory (facts 9.9).
        goal=(COPY, 0.8) if heads * queries < 128 else None,
        candidates=candidates,
    )


class Joined(NamedTuple):
    """Sequences side by side without pages: queries ``[B, H * q, c]``, rows ``[B, S, c]``."""

    q_BQc: Tensor
    rows_BSc: Tensor
    hidden_BQS: Tensor | None
    heads: int


def _joined(x: Step, heads: int, queries: int, tokens: slice = slice(None)) -> Joined:
    """Bring the pages of some tokens' sequences into order."""
    cache, q_NHc = x.cache, x.q_NHc[tokens]
    sequence_B = cache.sequence_N[tokens][::queries]
    rows_BSc = cache.pages[cache.tables[sequence_B]].flatten(1, 2)
    q_BQc = q_NHc.unflatten(0, (-1, queries)).transpose(1, 2).flatten(1, 2).contiguous()
    position_BQ = cache.position_N[tokens].view(-1, 1, queries).expand(-1, heads, -1).flatten(1)
    hidden_BQS = torch.arange(rows_BSc.shape[1], device=q_NHc.device) > position_BQ.unsqueeze(-1)
    return Joined(q_BQc, rows_BSc, hidden_BQS if hidden_BQS.any() else None, heads)


def _attend(x: Joined) -> Tensor:
    """Attend in float64: ``[N, H, C]``."""
    return _attend_in_storage(x._replace(q_BQc=x.q_BQc.double(), rows_BSc=x.rows_BSc.double()))


def _attend_in_storage(x: Joined) -> Tensor:
    scores_BQS = (x.q_BQc * SCALE) @ x.rows_BSc.transpose(1, 2)
    if x.hidden_BQS is not None:
        scores_BQS.masked_fill_(x.hidden_BQS, float("-inf"))
    out_BQC = scores_BQS.softmax(-1) @ x.rows_BSc[..., :C]
    return out_BQC.unflatten(1, (x.heads, -1)).transpose(1, 2).flatten(0, 1)


class Heads(NamedTuple):
    """Queries, keys and values ``[1, H, T, width]``, and the document of each token."""

    q: Tensor
    k: Tensor
    v: Tensor
    documents_BT: Tensor | None
    dout: Tensor | None = None


def prefill(place: Place, sizes: Sizes) -> list[Entry]:
    """Return causal attention over a row of one document and of several, and its backward."""
    return [
        _prefill(place, sizes, 1),
        _prefill(place, sizes, sizes.documents),
        _prefill(place, sizes, 1, backward=True),
    ]


def _lengths(tokens: int, documents: int) -> list[int]:
    """Cut a row into documents of rising lengths."""
    shares = range(1, documents + 1)
    lengths = [max(1, tokens * share // sum(shares)) for share in shares]
    return [*lengths[:-1], tokens - sum(lengths[:-1])]


def _prefill(place: Place, sizes: Sizes, documents: int, *, backward: bool = False) -> Entry:
    H, T = sizes.prefill
    lengths = _lengths(T, documents)

    def make(generator: Generator) -> Heads:
        widths = (NOPE + R, NOPE + R, V)
        q, k, v = (place.normal(generator, 1, T, H, w).transpose(1, 2) for w in widths)
        numbers = torch.arange(documents, device=place.device)
        documents_BT = numbers.repeat_interleave(torch.tensor(lengths, device=place.device))[None]
        dout = place.normal(generator, 1, T, H, V).transpose(1, 2) if backward else None
        return Heads(q, k, v, documents_BT if documents > 1 else None, dout)

    def through(attend: Callable[..., Tensor]) -> Callable[[Heads], Any]:
        return lambda x: _run(attend, x)

    def ours(x: Heads) -> Any:
        from ziphius.kernels.triton.attention import causal_attention_triton

        return _run(causal_attention_triton, x)

    def candidates() -> Sequence[Version]:
        from functools import partial

        from ziphius.kernels.triton.attention import HALF_TILES, causal_attention_triton

        return [
            Version(str(tuple(map(tuple, t))), through(partial(causal_attention_triton, tiles=t)))
            for t in HALF_TILES
        ]

    pairs = sum(length * (length + 1) / 2 for length in lengths)
    forward = 2.0 * H * pairs * (NOPE + R + V)
    # Backward: scores once more, and the gradients of weights, values, queries and keys.
    back = 2.0 * H * pairs * (3 * (NOPE + R) + 2 * V)
    moved = H * T * (2 * (NOPE + R) + 2 * V)
    kind = "forward and backward" if backward else "forward"
    return Entry(
        section="prefill",
        name=f"{kind}, {H} heads, {T} tokens, {documents} documents",
        make=make,
        reference=lambda x: _by_heads(x),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, through(attention.causal_attention_reference)),
        peers=_prefill_peers(place, through, documents),
        flops=forward + back if backward else forward,
        nbytes=moved * place.storage.itemsize * (3 if backward else 1),
        bound=1e-2 if place.storage == torch.bfloat16 else 1e-4,
        candidates=candidates,
    )


def _run(attend: Callable[..., Tensor], x: Heads) -> Any:
    """Return the result, and the gradients if there is a gradient of the result."""
    if x.dout is None:
        with torch.no_grad():
            return attend(x.q, x.k, x.v, SCALE, x.documents_BT)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in x[:3]]
        out = attend(*leaves, SCALE, x.documents_BT)
        return out.detach(), *torch.autograd.grad(out, leaves, x.dout)


def _by_heads(x: Heads, at_a_time: int = 4) -> Sequence[Tensor]:
    """Compute the reference in float64, some heads at a time."""
    parts = []
    for h in range(0, x.q.shape[1], at_a_time):
        heads = slice(h, h + at_a_time)
        wide = [None if t is None else t[:, heads].double() for t in (*x[:3], x.dout)]
        some = Heads(*wide[:3], x.documents_BT, wide[3])
        result = _run(attention.causal_attention_reference, some)
        parts.append((result,) if isinstance(result, Tensor) else result)
    return [torch.cat(one, 1) for one in zip(*parts, strict=True)]


def _prefill_peers(
    place: Place, through: Callable[[Any], Any], documents: int
) -> Sequence[Version]:
    """Return SDPA by each kernel that can, on GPUs also FlexAttention where documents count."""
    sdpa = Version(SDPA, through(attention.causal_attention_sdpa), bound=2e-2)
    if place.device.type != "cuda":
        return (sdpa,)
    if documents == 1:
        return (sdpa, Version(CUDNN, through(_cudnn), bound=2e-2))
    return (sdpa, Version(FLEX, _flex, _flex_inputs, bound=2e-2, slow=True))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BT: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _flex_inputs(x: Heads) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents_T = x.documents_BT[0]  # type: ignore[index]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_T[query] == documents_T[key])

    T = len(documents_T)
    mask = create_block_mask(visible, None, None, T, T, device=x.q.device)
    return (*x[:3], mask, torch.compile(flex_attention, dynamic=False))


def _flex(x: Any) -> Tensor:
    q, k, v, mask, attend = x
    return attend(q, k, v, block_mask=mask, scale=SCALE)
