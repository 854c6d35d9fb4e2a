"""How much may come to a rank in the worst case, known before a step: no token is ever dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.kernels.quantize import tile_count
from ziphius.parallel.layout import Layout

GIB = 2**30


@dataclass(frozen=True)
class Arrivals:
    """The most that one layer's dispatch may bring to one rank, with every token on its experts.

    ``forwarded`` rows pass through in hop one, rows of ``tokens`` tokens arrive in hop two, the
    experts compute on ``rows``. ``nbytes`` is the memory of one layer's forward pass for them:
    what the hops bring, copies for experts, the experts' products, and rows on the way back.
    """

    forwarded: int
    tokens: int
    rows: int
    nbytes: int

    def check(self, available: int) -> None:
        """Raise BadInput where it is more than ``available`` bytes."""
        if self.nbytes > available:
            raise BadInput(
                f"experts: in the worst case {self.rows} rows come to one rank in one layer and "
                f"take {self.nbytes / GIB:.2f} GiB, and {available / GIB:.2f} GiB are free: "
                "make pretrain.micro_batch_size or parallel.ep smaller"
            )


def worst_arrivals(
    config: ModelConfig,
    layout: Layout,
    tokens: int,
    *,
    slots: int | None = None,
    itemsize: int = 2,
    fp8: bool = False,
    exact: bool = True,
) -> Arrivals:
    """Bound what comes to a rank when every rank has up to ``tokens`` tokens in a micro-batch.

    ``slots`` are those of all ranks, by default one an expert; ``itemsize`` is that of rows, and
    with ``fp8`` dispatch brings codes and scales instead. With ``exact`` every expert's row passes
    through on its way back, and not only a token's sum.
    """
    nodes = len(layout.group_of("ep_peers", 0))
    D, F, K = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    own = (slots or config.n_routed_experts) // layout.ep
    forwarded, arrived = nodes * tokens, layout.ep * tokens
    # No token chooses an expert twice.
    rows = arrived * min(K, own)
    sent = D + 4 * tile_count(D) if fp8 else D * itemsize
    beside = 4 * K  # slots
    # Copies for experts with their gates, both halves of the first product, their product, the
    # result, and the result in the order in which it goes back.
    computed = sent + 8 + (3 * F + 2 * D) * itemsize
    returning = forwarded * (K if exact else 1) * D * itemsize
    nbytes = (forwarded + arrived) * (sent + beside) + rows * computed + returning
    return Arrivals(forwarded, arrived, rows, nbytes)
