"""Causal attention over per-head keys and values: the expanded form of MLA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.kept import KeptOutput

# First position and end of stretches of a sequence.
Runs = Sequence[tuple[int, int]]


def causal_attention_reference(
    q_BHtd: Tensor,
    k_BHTd: Tensor,
    v_BHTv: Tensor,
    scale: float,
    documents_BT: Tensor | None = None,
    kept: KeptOutput | None = None,
    runs: Runs | None = None,
) -> Tensor:
    """Attend causally with expanded heads (report eq. 10), the whole score matrix written out.

    ``q`` is ``[B, H, t, d]``, ``k`` ``[B, H, T, d]``, ``v`` ``[B, H, T, v]``; the result is
    ``[B, H, t, v]`` in the dtype of ``v``. Scores and softmax are at least FP32. With
    ``documents``, the number of the document of every position, queries see the keys of their own
    document only. With ``kept`` the output is saved for backward as that has it, and not as it is.
    ``runs`` are (first, end) of the positions that the queries stand at, ascending; by default all.
    """
    if kept is not None:
        return _Kept.apply(q_BHtd, k_BHTd, v_BHTv, scale, documents_BT, kept, runs)
    weights_BHtT = _weights(q_BHtd, k_BHTd, scale, documents_BT, runs)
    return (weights_BHtT @ v_BHTv.to(weights_BHtT.dtype)).to(v_BHTv.dtype)


def _weights(
    q_BHtd: Tensor,
    k_BHTd: Tensor,
    scale: float,
    documents_BT: Tensor | None,
    runs: Runs | None = None,
) -> Tensor:
    high = torch.promote_types(q_BHtd.dtype, torch.float32)
    scores_BHtT = (q_BHtd.to(high) @ k_BHTd.to(high).transpose(-1, -2)) * scale
    T = scores_BHtT.shape[-1]
    visible = torch.cat([_seen(*run, T, documents_BT, q_BHtd) for run in runs or [(0, T)]], dim=-2)
    return scores_BHtT.masked_fill(~visible, float("-inf")).softmax(-1)


class _Kept(torch.autograd.Function):
    """Backward written out: the output enters it once, as the sum of ``dout * out`` of a query."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTd: Tensor,
        k_BHTd: Tensor,
        v_BHTv: Tensor,
        scale: float,
        documents_BT: Tensor | None,
        kept: KeptOutput,
        runs: Runs | None = None,
    ) -> Tensor:
        out_BHTv = causal_attention_sdpa(q_BHTd, k_BHTd, v_BHTv, scale, documents_BT, runs=runs)
        ctx.save_for_backward(q_BHTd, k_BHTd, v_BHTv, documents_BT, *kept.keep(out_BHTv))
        ctx.scale, ctx.kept, ctx.runs = scale, kept, runs
        return out_BHTv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTd, k_BHTd, v_BHTv, documents_BT, *saved = ctx.saved_tensors
        weights_BHTT = _weights(q_BHTd, k_BHTd, ctx.scale, documents_BT, ctx.runs)
        q, k, v, dout = (x.to(weights_BHTT.dtype) for x in (q_BHTd, k_BHTd, v_BHTv, grads[0]))
        out_BHTv = ctx.kept.restore(saved, _as_queries(v_BHTv, q_BHTd)).to(dout.dtype)
        along_BHT1 = (dout * out_BHTv).sum(-1, keepdim=True)
        dscores_BHTT = weights_BHTT * (dout @ v.transpose(-1, -2) - along_BHT1) * ctx.scale
        dq, dk = dscores_BHTT @ k, dscores_BHTT.transpose(-1, -2) @ q
        dv = weights_BHTT.transpose(-1, -2) @ dout
        gradients = zip((dq, dk, dv), (q_BHTd, k_BHTd, v_BHTv), strict=True)
        return *(d.to(x.dtype) for d, x in gradients), None, None, None, None


def causal_attention_sdpa(
    q_BHtd: Tensor,
    k_BHTd: Tensor,
    v_BHTv: Tensor,
    scale: float,
    documents_BT: Tensor | None = None,
    kept: KeptOutput | None = None,
    runs: Runs | None = None,
) -> Tensor:
    """Do the same through torch's fused attention, which never holds the score matrix.

    Every run meets the keys up to its end. The fused CPU kernel wants ``equal_widths`` of keys and
    values; it is fastest to have them so. torch's backward takes its own output: with ``kept`` ours
    is written out.
    """
    if kept is not None:
        return _Kept.apply(q_BHtd, k_BHTd, v_BHTv, scale, documents_BT, kept, runs)
    v = v_BHTv.shape[-1]
    q_BHtd, k_BHTd, v_BHTv = equal_widths(q_BHtd, k_BHTd, v_BHTv)
    outs, begin = [], 0
    for first, end in runs or [(0, k_BHTd.shape[2])]:
        q_BHrd, begin = q_BHtd[:, :, begin : begin + end - first], begin + end - first
        plain = first == 0 and documents_BT is None
        mask = None if plain else _seen(first, end, end, documents_BT, q_BHtd)
        k_BHed, v_BHev = k_BHTd[:, :, :end], v_BHTv[:, :, :end]
        out = F.scaled_dot_product_attention(
            q_BHrd, k_BHed, v_BHev, attn_mask=mask, is_causal=plain, scale=scale
        )
        outs.append(out)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2))[..., :v]


def _seen(first: int, end: int, keys: int, documents_BT: Tensor | None, like: Tensor) -> Tensor:
    """Say which of the first ``keys`` positions the queries at ``first`` to ``end`` may see.

    Bool ``[1 or B, 1, end - first, keys]``: earlier ones or their own, of their document. Padding
    is a document of its own, so every query sees something.
    """
    place_T = torch.arange(keys, device=like.device)
    seen = (place_T <= place_T[first:end, None])[None, None]
    if documents_BT is not None:
        ours, theirs = documents_BT[:, None, first:end, None], documents_BT[:, None, None, :keys]
        seen = seen & (ours == theirs)
    return seen


def _as_queries(v_BHTv: Tensor, q_BHtd: Tensor) -> Tensor:
    """Return something of the shape of the queries' output, whose numbers nobody reads."""
    t = q_BHtd.shape[2]
    return v_BHTv if v_BHTv.shape[2] == t else v_BHTv[:, :, :t]


def equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of keys and values with zeros, queries like keys.

    Zeros add nothing to a score, and a padded column of the values gives a column to cut off.
    """
    width = max(k.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


class _Compiled(torch.autograd.Function):
    """Keeps its inputs, its output or what ``kept`` makes of it, and one number a query."""

    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        q_BHTd: Tensor,
        k_BHTd: Tensor,
        v_BHTv: Tensor,
        scale: float,
        documents_BT: Tensor | None,
        kept: KeptOutput | None,
    ) -> Tensor:
        q_BHTd, k_BHTd, v_BHTv = (_rows(x) for x in (q_BHTd, k_BHTd, v_BHTv))
        if documents_BT is not None:
            documents_BT = documents_BT.to(torch.int64).contiguous()
        high = torch.promote_types(q_BHTd.dtype, torch.float32)
        out_BHTv = _like(v_BHTv)
        log_sums_BHT = torch.empty(q_BHTd.shape[:3], dtype=high)
        tensors = (q_BHTd, k_BHTd, v_BHTv, out_BHTv)
        ctx.size = (*q_BHTd.shape, v_BHTv.shape[-1], scale)
        library.call(
            "attention_forward",
            q_BHTd.dtype,
            *tensors[:3],
            _strides(*tensors),
            documents_BT,
            out_BHTv,
            log_sums_BHT,
            *ctx.size,
        )
        saved = (out_BHTv,) if kept is None else kept.keep(out_BHTv)
        ctx.save_for_backward(*tensors[:3], log_sums_BHT, documents_BT, *saved)
        ctx.library, ctx.kept = library, kept
        return out_BHTv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTd, k_BHTd, v_BHTv, log_sums_BHT, documents_BT, *saved = ctx.saved_tensors
        out_BHTv = saved[0] if ctx.kept is None else ctx.kept.restore(saved, v_BHTv)
        tensors = (q_BHTd, k_BHTd, v_BHTv, out_BHTv)
        inputs = (*tensors, _rows(grads[0]))
        outputs = tuple(_like(x) for x in tensors[:3])
        ctx.library.call(
            "attention_backward",
            tensors[0].dtype,
            *inputs,
            _strides(*inputs, *outputs),
            documents_BT,
            log_sums_BHT,
            *outputs,
            *ctx.size,
        )
        dq_BHTd, dk_BHTd, dv_BHTv = outputs
        return None, dq_BHTd, dk_BHTd, dv_BHTv, None, None, None


def _rows(x_BHTd: Tensor) -> Tensor:
    """Have the numbers of a head's position side by side."""
    return x_BHTd if x_BHTd.stride(-1) == 1 else x_BHTd.contiguous()


def _like(x_BHTd: Tensor) -> Tensor:
    """Make a ``[B, H, T, d]`` whose memory is ``[B, T, H, d]``, as projections have it."""
    B, H, T, d = x_BHTd.shape
    return torch.empty(B, T, H, d, dtype=x_BHTd.dtype).transpose(1, 2)


def _strides(*tensors: Tensor) -> Any:
    strides = [x.stride(axis) for x in tensors for axis in range(3)]
    return (ctypes.c_int64 * len(strides))(*strides)


def causal_attention_compiled(
    library: Library,
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTv: Tensor,
    scale: float,
    documents_BT: Tensor | None = None,
    kept: KeptOutput | None = None,
) -> Tensor:
    """Do the same in blocks that stay in a processor's cache, none of them above the diagonal."""
    return _Compiled.apply(library, q_BHTd, k_BHTd, v_BHTv, scale, documents_BT, kept)


# The versions that know queries of some positions only.
OF_RUNS = frozenset({"reference", "sdpa"})

# Versions that pad keys or values unless they are given equal widths.
WANT_EQUAL_WIDTHS = frozenset({"sdpa"})

VERSIONS: dict[str, Callable[..., Tensor]] = {
    "reference": causal_attention_reference,
    "sdpa": causal_attention_sdpa,
}
COMPILED = causal_attention_compiled
