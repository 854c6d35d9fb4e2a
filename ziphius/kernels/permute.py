"""Moving token rows to their experts and back: each is the other's backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.quantize import Fp8


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        return u_ND.index_select(0, order_M.div(K, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        return unpermute(grads[0], order_M, inverse_M, ctx.K), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        return sum_choices(rows_MD.index_select(0, inverse_M).unflatten(0, (-1, K)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        return permute(grads[0], order_M, inverse_M, ctx.K), None, None, None


def permute(u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
    """Copy every token's row to its ``K`` places, sorted by expert: ``[N, D]`` to ``[N*K, D]``.

    ``order[m]`` is the flat (token, choice) index that lands in row ``m``; ``inverse`` undoes it.
    """
    return _Permute.apply(u_ND, order_M, inverse_M, K)


def unpermute(rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
    """Sum every token's ``K`` rows in the order of its choices: ``[N*K, D]`` to ``[N, D]``.

    The sum is taken in at least FP32, one row after the other, and rounded once.
    """
    return _Unpermute.apply(rows_MD, order_M, inverse_M, K)


def sum_choices(rows_NKD: Tensor) -> Tensor:
    """Sum every token's rows as ``unpermute`` does: ``[N, D]``."""
    # One addition after the other: the order of a built-in sum depends on the row's width.
    high = torch.promote_types(rows_NKD.dtype, torch.float32)
    total_ND = rows_NKD[:, 0].to(high, copy=True)
    for choice in range(1, rows_NKD.shape[1]):
        total_ND += rows_NKD[:, choice]
    return total_ND.to(rows_NKD.dtype)


def permute_tiles(q: Fp8, order_M: Tensor, inverse_M: Tensor, K: int) -> Fp8:
    """Copy every token's row of codes and of scales to its ``K`` places, as ``permute`` does.

    ``q`` has tiles, ``[N, D]``; the result is ``[N*K, D]``. There is no way back.
    """
    token_M = order_M.div(K, rounding_mode="floor")
    # There is no selection of FP8 on every machine; of bytes there is.
    codes_MD = q.codes.view(torch.uint8).index_select(0, token_M).view(q.codes.dtype)
    return Fp8(codes_MD, q.scales.index_select(0, token_M))


def sort_by_slot(slots_NK: Tensor, n_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort (token, choice) pairs by slot, stably: ``(order_M, inverse_M, counts_E)``, all int64.

    ``order[m]`` is the flat pair of row ``m``, ``inverse`` its inverse, ``counts`` the rows of each
    of ``n_slots``.
    """
    flat_M = slots_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return order_M, inverse_M, torch.bincount(flat_M, minlength=n_slots)


class _CompiledPermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int
    ) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.library, ctx.K = library, K
        u_ND = u_ND.contiguous()
        out_MD = u_ND.new_empty(len(order_M), u_ND.shape[1])
        library.call("permute", u_ND.dtype, u_ND, order_M, out_MD, *out_MD.shape, K)
        return out_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        du_ND = _CompiledUnpermute.apply(ctx.library, grads[0], order_M, inverse_M, ctx.K)
        return None, du_ND, None, None, None


class _CompiledUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int
    ) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.library, ctx.K = library, K
        rows_MD = rows_MD.contiguous()
        out_ND = rows_MD.new_empty(len(rows_MD) // K, rows_MD.shape[1])
        library.call("unpermute", rows_MD.dtype, rows_MD, inverse_M, out_ND, *out_ND.shape, K)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        drows_MD = _CompiledPermute.apply(ctx.library, grads[0], order_M, inverse_M, ctx.K)
        return None, drows_MD, None, None, None


def permute_compiled(
    library: Library, u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int
) -> Tensor:
    """Do what ``permute`` does; its backward sums without a copy between."""
    return _CompiledPermute.apply(library, u_ND, order_M, inverse_M, K)


def unpermute_compiled(
    library: Library, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int
) -> Tensor:
    """Do what ``unpermute`` does, bit for bit, without a copy between."""
    return _CompiledUnpermute.apply(library, rows_MD, order_M, inverse_M, K)


def permute_tiles_compiled(
    library: Library, q: Fp8, order_M: Tensor, inverse_M: Tensor, K: int
) -> Fp8:
    """Do what ``permute_tiles`` does."""
    codes_ND, scales_NG = q.codes.contiguous(), q.scales.contiguous()
    rows, width, groups = len(order_M), codes_ND.shape[1], scales_NG.shape[1]
    out = Fp8(codes_ND.new_empty(rows, width), scales_NG.new_empty(rows, groups))
    tensors = (codes_ND, scales_NG, order_M, *out[:2])
    library.call("permute_tiles", scales_NG.dtype, *tensors, rows, width, groups, K)
    return out


Move = Callable[[Tensor, Tensor, Tensor, int], Tensor]
VERSIONS: dict[str, Move] = {"torch": permute}
COMPILED = permute_compiled
BACK_VERSIONS: dict[str, Move] = {"torch": unpermute}
BACK_COMPILED = unpermute_compiled
MoveTiles = Callable[[Fp8, Tensor, Tensor, int], Fp8]
TILES_VERSIONS: dict[str, MoveTiles] = {"torch": permute_tiles}
TILES_COMPILED = permute_tiles_compiled
Sort = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
SORT_VERSIONS: dict[str, Sort] = {"torch": sort_by_slot}
