"""The paged latent cache and attention over it in the absorbed form (facts 1.5, 1.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import TYPES, Library
from ziphius.kernels.norm import rms_norm_reference
from ziphius.kernels.project import project_heads_compiled, require_no_gradient

TILE = 32  # keys that are met at a time; a page holds whole tiles


class LatentPages(NamedTuple):
    """One layer's cache, and where the rows of a step's ``N`` tokens lie in it.

    ``pages`` is ``[n_pages, page, C + R]``: normed latents and rotated keys. ``slots`` is where
    each new row goes, page * size + offset, or -1 where it is not written. ``tables`` has the pages
    of every sequence, ``sequence`` and ``position`` say whose and which position a token is; tokens
    of a sequence stand side by side, in order. All int64. Rows before ``first`` are no keys.
    """

    pages: Tensor
    slots_N: Tensor
    tables: Tensor
    sequence_N: Tensor
    position_N: Tensor
    first: int = 0


class TorchLatent:
    """The operations in plain PyTorch: the specification, slow."""

    def append(
        self, kv_Nc: Tensor, gain_C: Tensor, eps: float, turns: Sequence[Tensor], cache: LatentPages
    ) -> None:
        """Norm latents, rotate shared keys and write the rows where ``slots`` says.

        ``kv`` is ``[N, C + R]``; ``turns`` are cosines and sines ``[N, R / 2]``. A cache keeps no
        graph.
        """
        C = len(gain_C)
        latent_NC = rms_norm_reference(kv_Nc[:, :C], gain_C, eps)
        rows_Nc = torch.cat((latent_NC, _turned(kv_Nc[:, C:], *turns)), -1)
        written_N = cache.slots_N >= 0
        cache.pages.flatten(0, 1)[cache.slots_N[written_N]] = rows_Nc[written_N].detach()

    def queries(self, q_NHd: Tensor, absorbed_HCn: Tensor, turns: Sequence[Tensor]) -> Tensor:
        """Bring queries ``[N, H, nope + R]`` to the cache's rows: ``[N, H, C + R]``.

        ``absorbed`` are the keys' up-projections, turned: ``[H, C, nope]``.
        """
        high = torch.promote_types(q_NHd.dtype, torch.float32)
        nope = absorbed_HCn.shape[-1]
        q_NHn = q_NHd[..., :nope].to(high)
        latent_NHC = torch.einsum("nhi,hci->nhc", q_NHn, absorbed_HCn.to(high)).to(q_NHd.dtype)
        cosine, sine = (t.unsqueeze(1) for t in turns)
        return torch.cat((latent_NHC, _turned(q_NHd[..., nope:], cosine, sine)), -1)

    def attend(self, q_NHc: Tensor, C: int, scale: float, cache: LatentPages) -> Tensor:
        """Attend to a sequence's rows up to each query's own position: ``[N, H, C]``.

        Scores, weights and sums are at least FP32; weights are rounded to the dtype of the values.
        """
        high = torch.promote_types(q_NHc.dtype, torch.float32)
        out_NHC = q_NHc.new_empty(*q_NHc.shape[:2], C)
        for n, (s, p) in enumerate(zip(cache.sequence_N, cache.position_N.tolist(), strict=True)):
            rows_Sc = cache.pages[cache.tables[s]].flatten(0, 1)[cache.first : p + 1].to(high)
            scores_HS = (q_NHc[n].to(high) @ rows_Sc.T) * scale
            weights_HS = (scores_HS - scores_HS.amax(-1, keepdim=True)).exp()
            rounded_HS = weights_HS.to(q_NHc.dtype).to(high)
            out_HC = (rounded_HS @ rows_Sc[:, :C]) / weights_HS.sum(-1, keepdim=True)
            out_NHC[n] = out_HC.to(q_NHc.dtype)
        return out_NHC

    def values(self, z_NHC: Tensor, up_HvC: Tensor) -> Tensor:
        """Bring what was gathered to the heads' values: ``[N, H, v]``."""
        high = torch.promote_types(z_NHC.dtype, torch.float32)
        out = torch.einsum("nhc,hvc->nhv", z_NHC.to(high), up_HvC.to(high))
        return out.to(z_NHC.dtype)


class CompiledLatent:
    """The same, compiled: a query's result does not depend on batch, chunks or pages."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def append(
        self, kv_Nc: Tensor, gain_C: Tensor, eps: float, turns: Sequence[Tensor], cache: LatentPages
    ) -> None:
        require_no_gradient(kv_Nc)
        kv_Nc, C = kv_Nc.contiguous(), len(gain_C)
        sizes = (len(kv_Nc), C, kv_Nc.shape[1] - C, eps)
        gain = (TYPES[gain_C.dtype], gain_C.contiguous())
        tensors = (kv_Nc, *gain, *turns, cache.slots_N, cache.pages)
        self.library.call("latent_append", kv_Nc.dtype, *tensors, *sizes)

    def queries(self, q_NHd: Tensor, absorbed_HCn: Tensor, turns: Sequence[Tensor]) -> Tensor:
        require_no_gradient(q_NHd)
        q_NHd = q_NHd.contiguous()
        N, H, d = q_NHd.shape
        C, nope = absorbed_HCn.shape[1:]
        out_NHc = q_NHd.new_empty(N, H, C + d - nope)
        project_heads_compiled(self.library, q_NHd, absorbed_HCn, out_NHc)
        sizes = (N, H, nope, d - nope, C)
        self.library.call("latent_turn", q_NHd.dtype, q_NHd, *turns, out_NHc, *sizes)
        return out_NHc

    def attend(self, q_NHc: Tensor, C: int, scale: float, cache: LatentPages) -> Tensor:
        N, H, width = q_NHc.shape
        page = cache.pages.shape[1]
        if page % TILE:
            raise ValueError(f"a page holds whole tiles of {TILE} positions, not {page}")
        out_NHC = q_NHc.new_empty(N, H, C)
        where = (cache.pages, page, cache.tables, cache.tables.stride(0))
        self.library.call(
            "latent_attend",
            q_NHc.dtype,
            *(q_NHc, *where, cache.sequence_N, cache.position_N, cache.first, out_NHC),
            *(N, H, C, width - C, scale),
        )
        return out_NHC

    def values(self, z_NHC: Tensor, up_HvC: Tensor) -> Tensor:
        out_NHv = z_NHC.new_empty(*z_NHC.shape[:2], up_HvC.shape[1])
        project_heads_compiled(self.library, z_NHC, up_HvC, out_NHv)
        return out_NHv


Latent = TorchLatent | CompiledLatent


def _turned(x_NR: Tensor, cosine_Nr: Tensor, sine_Nr: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension, in the dtype of the angles."""
    even, odd = x_NR.to(cosine_Nr.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack(
        (even * cosine_Nr - odd * sine_Nr, even * sine_Nr + odd * cosine_Nr), dim=-1
    )
    return turned.flatten(-2).to(x_NR.dtype)


VERSIONS: dict[str, Callable[[], Latent]] = {"torch": TorchLatent}
COMPILED = CompiledLatent
