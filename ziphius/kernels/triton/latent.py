"""The paged latent cache on a GPU: attention split over the sequence, and the rows and queries.

A row of the cache is read once from memory: it is key with all of its columns, value with its
first ``C``. A program has rows of queries times heads, so that neighbouring queries of a sequence
(MTP's two, a prefill chunk's) share what is read for one of them. On Hopper the copy engine feeds
the published widths in BF16 (``latent_hopper``); all else is plain Triton (``latent_attend``).
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.latent import LatentPages
from ziphius.kernels.project import require_no_gradient
from ziphius.kernels.triton import bits
from ziphius.kernels.triton.latent_attend import attend_kernel, merge_kernel

LOG2E = 1.4426950408889634
TILE_ROWS = 64  # queries times heads of a program; what a warp group multiplies at a time
LEAST_SPLIT = 256  # rows of the cache that are worth a program
_HOPPER = 9  # the major compute capability
_SEATS = 132  # programs of ``latent_hopper`` that run at a time there, one a multiprocessor


class Launch(NamedTuple):
    """Of plain Triton: rows of the cache met at a time, warps, stages, programs that fill a GPU."""

    met: int
    warps: int
    stages: int
    programs: int
    keys_first: bool  # the rows of the cache are those of the product, and not the queries'


class Launches(NamedTuple):
    """How ``attend`` is launched with few rows of queries and heads (32 at most), and with many."""

    few: Launch
    many: Launch


# The first whose blocks a page has whole is the choice; a benchmark may try the other.
HALF_LAUNCHES = (
    Launches(Launch(32, 4, 5, 264, True), Launch(64, 8, 2, 132, False)),
    Launches(Launch(32, 4, 5, 264, True), Launch(32, 8, 2, 132, False)),
)
SINGLE_LAUNCHES = Launches(Launch(16, 4, 1, 264, True), Launch(16, 8, 1, 132, False))


class TritonLatent:
    """The operations of ``TorchLatent`` for tensors on a GPU; they keep no graph.

    ``attend`` takes positions of a sequence's tokens as side by side and rising, a scale above
    zero, and pages of a power of two of rows. The split depends on shapes alone: no step waits for
    the host, and equal steps have equal bits. With ``launches``, for a benchmark, it is the plain
    kernel wherever it runs.
    """

    def __init__(self, launches: Launches | None = None) -> None:
        self.launches = launches

    def append(
        self, kv_Nc: Tensor, gain_C: Tensor, eps: float, turns: Sequence[Tensor], cache: LatentPages
    ) -> None:
        """Norm latents, rotate shared keys and write the rows where ``slots`` says."""
        require_no_gradient(kv_Nc)
        kv_Nc, pages = _rows(kv_Nc), cache.pages
        N, C, R = len(kv_Nc), len(gain_C), kv_Nc.shape[1] - len(gain_C)
        cosine_Nr, sine_Nr = (t.contiguous() for t in turns)
        if N:
            append_kernel[(N,)](
                *(kv_Nc, gain_C.contiguous(), cosine_Nr, sine_Nr, cache.slots_N, pages),
                *(kv_Nc.stride(0), eps),
                C=C,
                R=R,
                CP=_power(C),
                RP=_power(R // 2),
            )

    def queries(self, q_NHd: Tensor, absorbed_HCn: Tensor, turns: Sequence[Tensor]) -> Tensor:
        """Bring queries ``[N, H, nope + R]`` to the cache's rows: ``[N, H, C + R]``."""
        require_no_gradient(q_NHd, absorbed_HCn)
        q_NHd = q_NHd.contiguous()
        (N, H, d), (C, nope) = q_NHd.shape, absorbed_HCn.shape[1:]
        out_NHc = q_NHd.new_empty(N, H, C + d - nope)
        if not out_NHc.numel():
            return out_NHc
        absorbed_HnC = absorbed_HCn.transpose(1, 2).to(q_NHd.dtype)
        latent_HNC = out_NHc[..., :C].transpose(0, 1)
        torch.bmm(q_NHd[..., :nope].transpose(0, 1), absorbed_HnC, out=latent_HNC)
        cosine_Nr, sine_Nr = (t.contiguous() for t in turns)
        turn_kernel[(triton.cdiv(N * H, 32),)](
            *(q_NHd, cosine_Nr, sine_Nr, out_NHc, N * H, H),
            D=d,
            NOPE=nope,
            C=C,
            R=d - nope,
            RP=_power((d - nope) // 2),
        )
        return out_NHc

    def attend(self, q_NHc: Tensor, C: int, scale: float, cache: LatentPages) -> Tensor:
        """Attend to a sequence's rows up to each query's own position: ``[N, H, C]``."""
        require_no_gradient(q_NHc)
        q_NHc = q_NHc.contiguous()
        N, H, width = q_NHc.shape
        out_NHC = q_NHc.new_empty(N, H, C)
        if not out_NHC.numel():
            return out_NHC
        if self.launches is None and copyable(q_NHc, C, cache):
            return _attend_copied(q_NHc, scale, cache, out_NHC)
        queries, heads = tile_of(N, H, len(cache.tables))
        launch = self._launch(q_NHc.dtype, queries * heads, cache.pages.shape[1])
        blocks, page = triton.cdiv(H, heads), cache.pages.shape[1]
        bound = cache.tables.shape[1] * page
        splits = split_count(triton.cdiv(N, queries) * blocks, bound, launch.programs)
        part_SNHC, lse_SNH = _parts(out_NHC, splits)
        attend_kernel[(N * blocks, splits)](
            *(q_NHc, cache.pages, cache.tables, cache.sequence_N, cache.position_N),
            *(part_SNHC, lse_SNH, cache.tables.stride(0)),
            *(N, H, cache.first, scale * LOG2E),
            C=C,
            R=width - C,
            CP=_power(C),
            RP=_power(width - C),
            PAGE=page,
            QUERIES=queries,
            HEADS=heads,
            MET=launch.met,
            KEYS_FIRST=launch.keys_first,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        return _merged(part_SNHC, lse_SNH, out_NHC)

    def values(self, z_NHC: Tensor, up_HvC: Tensor) -> Tensor:
        """Bring what was gathered to the heads' values: ``[N, H, v]``."""
        require_no_gradient(z_NHC, up_HvC)
        out_NHv = z_NHC.new_empty(*z_NHC.shape[:2], up_HvC.shape[1])
        up_HCv = up_HvC.transpose(1, 2).to(z_NHC.dtype)
        torch.bmm(z_NHC.transpose(0, 1), up_HCv, out=out_NHv.transpose(0, 1))
        return out_NHv

    def _launch(self, dtype: torch.dtype, rows: int, page: int) -> Launch:
        launches = self.launches or choose_launches(dtype, page)
        return launches.few if rows <= TILE_ROWS // 2 else launches.many


def copyable(q_NHc: Tensor, C: int, cache: LatentPages) -> bool:
    """Say whether ``latent_hopper`` is made for a call: on Hopper, BF16, 512 + 64 columns.

    Its copies have 32 rows of one page, and begin at multiples of 16 bytes.
    """
    pages, device = cache.pages, q_NHc.device
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == _HOPPER
        and not bits.interpreted()
        and q_NHc.dtype == pages.dtype == torch.bfloat16
        and (C, q_NHc.shape[2] - C) == (512, 64)
        and pages.shape[1] % 32 == 0
        and pages.is_contiguous()
        and (pages.data_ptr() | q_NHc.data_ptr()) % 16 == 0
    )


def _attend_copied(q_NHc: Tensor, scale: float, cache: LatentPages, out_NHC: Tensor) -> Tensor:
    # Gluon is needed here only, and not every Triton has it.
    from ziphius.kernels.triton import latent_hopper

    N, H, _ = q_NHc.shape
    blocks = triton.cdiv(H, TILE_ROWS)
    queries = max(1, min(triton.cdiv(N, len(cache.tables)), TILE_ROWS // H))
    bound = cache.tables.shape[1] * cache.pages.shape[1]
    splits = even_splits(triton.cdiv(N, queries) * blocks, bound, _SEATS)
    part_SNHC, lse_SNH = _parts(out_NHC, splits)
    latent_hopper.launch(
        *(q_NHc, cache, part_SNHC, lse_SNH, scale * LOG2E),
        queries=queries,
        grid=(N * blocks, splits),
    )
    return _merged(part_SNHC, lse_SNH, out_NHC)


def _parts(out_NHC: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Return where ``splits`` parts of the result are written, and their log-sum-exps."""
    lse_SNH = out_NHC.new_empty(splits, *out_NHC.shape[:2], dtype=torch.float32)
    if splits == 1:
        return out_NHC, lse_SNH
    return out_NHC.new_empty(splits, *out_NHC.shape, dtype=torch.float32), lse_SNH


def _merged(part_SNHC: Tensor, lse_SNH: Tensor, out_NHC: Tensor) -> Tensor:
    N, H, C = out_NHC.shape
    if len(lse_SNH) > 1:
        grid = (N * H,)
        merge_kernel[grid](part_SNHC, lse_SNH, out_NHC, N * H, len(lse_SNH), C=C, CP=_power(C))
    return out_NHC


def even_splits(programs: int, bound: int, seats: int) -> int:
    """Choose in how many parts a sequence is cut: none, or so many that 1 to 4 waves are full.

    A program takes as long as some 3 blocks of 64 rows to begin and end, and as long as 2 more to
    hand over a part; 32 parts are merged in the time of one. ``bound`` is as for ``split_count``.
    """
    blocks, most = triton.cdiv(bound, 64), max(1, bound // LEAST_SPLIT)

    def blocks_in_turn(splits: int) -> int:
        each = triton.cdiv(blocks, splits) + (3 if splits == 1 else 5)
        return triton.cdiv(programs * splits, seats) * each + splits // 32

    full = (max(1, min(seats * waves // programs, most)) for waves in range(1, 5))
    return min((1, *full), key=blocks_in_turn)


def choose_launches(dtype: torch.dtype, page: int) -> Launches:
    """Return how ``attend`` is launched for pages of ``page`` rows."""
    if dtype == torch.float32:
        return SINGLE_LAUNCHES
    whole = (ours for ours in HALF_LAUNCHES if all(page % launch.met == 0 for launch in ours))
    return next(whole, HALF_LAUNCHES[-1])


def tile_of(N: int, H: int, sequences: int) -> tuple[int, int]:
    """Choose how many queries and heads a program has: powers of two, 16 to 64 together.

    As many queries as a sequence has on average; with 64 heads or more one query fills a tile, and
    programs of its neighbours find the rows in the GPU's cache.
    """
    heads = min(TILE_ROWS, triton.next_power_of_2(H))
    queries = triton.next_power_of_2(triton.cdiv(N, max(sequences, 1)))
    queries = min(queries, TILE_ROWS // heads)
    return queries, max(heads, 16 // queries)


def split_count(programs: int, bound: int, wanted: int) -> int:
    """Choose in how many parts a sequence is cut, if ``programs`` attend to uncut ones.

    ``bound`` is the most rows that any sequence can have.
    """
    return max(1, min(wanted // programs, triton.cdiv(bound, LEAST_SPLIT)))


@triton.jit
def append_kernel(
    kv_ptr, gain_ptr, cosine_ptr, sine_ptr, slots_ptr, pages_ptr, kv_row, eps,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Write the row of one token, or nothing where its slot is below zero."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n)
    if slot < 0:
        return
    kv_ptr += n * kv_row
    pages_ptr += slot * (C + R)
    columns = tl.arange(0, CP)
    x = tl.load(kv_ptr + columns, columns < C, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + columns, columns < C, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * gain
    tl.store(pages_ptr + columns, normed.to(pages_ptr.dtype.element_ty), columns < C)
    pairs = tl.arange(0, RP)
    turns = n * (R // 2) + pairs
    _turn(kv_ptr + C + 2 * pairs, cosine_ptr + turns, sine_ptr + turns,
          pages_ptr + C + 2 * pairs, pairs < R // 2)  # fmt: skip


@triton.jit
def turn_kernel(
    q_ptr, cosine_ptr, sine_ptr, out_ptr, rows, H,
    D: tl.constexpr, NOPE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Rotate the last ``R`` columns of 32 rows, each one query's head."""
    row = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)[:, None]
    pairs = tl.arange(0, RP)[None, :]
    turns = row // H * (R // 2) + pairs
    _turn(q_ptr + row * D + NOPE + 2 * pairs, cosine_ptr + turns, sine_ptr + turns,
          out_ptr + row * (C + R) + C + 2 * pairs, (row < rows) & (pairs < R // 2))  # fmt: skip


@triton.jit
def _turn(x_ptr, cosine_ptr, sine_ptr, out_ptr, inside):
    """Rotate pairs of neighbours; pointers are those of each pair's first."""
    cosine = tl.load(cosine_ptr, inside, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr, inside, other=0.0).to(tl.float32)
    even = tl.load(x_ptr, inside, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + 1, inside, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr, (even * cosine - odd * sine).to(kind), inside)
    tl.store(out_ptr + 1, (even * sine + odd * cosine).to(kind), inside)


def _rows(x_Nc: Tensor) -> Tensor:
    return x_Nc if x_Nc.stride(-1) == 1 else x_Nc.contiguous()


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
