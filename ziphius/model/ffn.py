"""The two feed-forward halves of a block, dense and mixture of experts, with the same stages."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels.fp8 import Operand, Tiled
from ziphius.kernels.mixture import Expert, Experts
from ziphius.kernels.select import Kernels
from ziphius.model.dispatch import Dispatcher, Lane, LocalDispatcher, Sent
from ziphius.model.experts import RoutedExperts
from ziphius.model.layers import Device, Linear
from ziphius.model.positions import Alone, Together
from ziphius.model.precision import Precision
from ziphius.model.router import Router, Routing


class Routed(NamedTuple):
    """A mixture's decision for a batch, ready to be dispatched."""

    routing: Routing
    sort: object | None  # the dispatcher's; None where the experts are computed in place


class FeedForward(Protocol):
    """The stages of a block's second half. ``u`` is the normed input ``[N, D]``."""

    def route(self, u_ND: Operand, chosen_NK: Tensor | None) -> Routed | None:
        """Decide where rows go; ``None`` where there is nothing to decide."""
        ...

    def dispatch(self, u_ND: Operand, routed: Routed | None) -> Sent | Operand:
        """Bring rows to the experts."""
        ...

    def run_experts(self, sent: Sent | Operand) -> Tensor:
        """Compute on the rows that arrived."""
        ...

    def combine(self, rows: Tensor, sent: Sent | Operand) -> Tensor:
        """Bring results back: ``[N, D]``."""
        ...

    def shared(self, u_ND: Operand) -> Tensor | None:
        """Compute what every token gets without routing, if anything."""
        ...

    def begin_dispatch(self, u_ND: Operand, routed: Routed | None, lane: Lane) -> object:
        """Begin to bring rows to the experts (see ``Dispatcher``)."""
        ...

    def end_dispatch(self, begun: object) -> Sent | Operand:
        """Return what has arrived."""
        ...

    def begin_combine(self, rows: Tensor, sent: Sent | Operand, lane: Lane) -> object:
        """Begin to bring results back."""
        ...

    def end_combine(self, begun: object) -> Tensor:
        """Return them: ``[N, D]``."""
        ...


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (facts 1.2)."""

    def __init__(
        self, width: int, inner: int, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.swiglu = kernels.function("swiglu")
        self.gate_proj = Linear(width, inner, precision, kernels, device)
        self.up_proj = Linear(width, inner, precision, kernels, device)
        self.down_proj = Linear(inner, width, precision, kernels, device)

    def forward(self, u_ND: Operand) -> Tensor:
        gate_NF, up_NF = self.gate_proj(u_ND), self.up_proj(u_ND)
        down = self.down_proj
        if down.fp8 is not None:
            return down.fp8.gated_linear(gate_NF, up_NF, None, down.weight, down.in_fp8())
        return down(self.activate(gate_NF, up_NF))

    def activate(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Apply the gated activation, ``[N, F]``."""
        hidden_NF: Tensor = self.swiglu(gate_NF, up_NF)
        return hidden_NF


class Dense(SwiGLU):
    """A feed-forward layer that every token passes: nothing to route, dispatch or combine."""

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, precision, kernels, device)
        self.together: Together = Alone()

    def route(self, u_ND: Operand, chosen_NK: Tensor | None) -> Routed | None:
        return None

    def dispatch(self, u_ND: Operand, routed: Routed | None) -> Sent | Operand:
        return self.together.gather(u_ND)

    def run_experts(self, sent: Sent | Operand) -> Tensor:
        assert not isinstance(sent, Sent), "a dense layer computes on the rows themselves"
        return self(sent)

    def combine(self, rows: Tensor, sent: Sent | Operand) -> Tensor:
        return self.together.give_back(rows)

    def shared(self, u_ND: Operand) -> Tensor | None:
        return None

    def begin_dispatch(self, u_ND: Operand, routed: Routed | None, lane: Lane) -> object:
        return self.dispatch(u_ND, routed)

    def end_dispatch(self, begun: object) -> Sent | Operand:
        assert isinstance(begun, Tensor | Tiled), "made by this class"
        return begun

    def begin_combine(self, rows: Tensor, sent: Sent | Operand, lane: Lane) -> object:
        return self.combine(rows, sent)

    def end_combine(self, begun: object) -> Tensor:
        assert isinstance(begun, Tensor), "made by this class"
        return begun


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE (report section 2.1.2): routed experts, and shared ones that all tokens pass.

    The shared experts are one SwiGLU of their joint width, neither scaled nor gated.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.dtype = precision.dtype("linear")
        self.gate = Router(config, precision, kernels, device)
        self.experts = RoutedExperts(config, precision, kernels, device)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width, precision, kernels, device)
        self.dispatcher: Dispatcher = LocalDispatcher(kernels)
        self.mixture = kernels.function("mixture")
        self.places: Experts | None = None

    def route(self, u_ND: Operand, chosen_NK: Tensor | None) -> Routed | None:
        routing = self.gate(u_ND.value if isinstance(u_ND, Tiled) else u_ND, chosen_NK)
        if self.mixture is not None:
            return Routed(routing, None)
        return Routed(routing, self.dispatcher.sort(routing.chosen_NK, self.experts.store))

    def dispatch(self, u_ND: Operand, routed: Routed | None) -> Sent | Operand:
        assert routed is not None, "a mixture layer dispatches what it has routed"
        if routed.sort is None:
            assert isinstance(u_ND, Tensor), "experts in place take rows as they are"
            return self.in_place(u_ND, routed.routing)
        return self.dispatcher.dispatch(self.as_rows(u_ND), routed.routing, routed.sort)

    def as_rows(self, u_ND: Operand) -> Operand:
        """Bring rows into the form in which they travel."""
        if isinstance(u_ND, Tiled) and self.experts.fp8 is None:
            u_ND = u_ND.value
        return u_ND.to(self.experts.dtype) if isinstance(u_ND, Tensor) else u_ND

    def in_place(self, u_ND: Tensor, routing: Routing) -> Tensor:
        """Compute all experts where the rows lie, in one kernel without a backward: ``[N, D]``."""
        places = self.places or self.locate()
        out_ND: Tensor = self.mixture(u_ND, routing.chosen_NK, routing.weights_NK, places)
        return out_ND

    def locate(self) -> Experts:
        """Note where the weights of every expert lie; it holds as long as they stay there."""
        return Experts(self.experts.store.in_memory(), [self.shared_expert()])

    def shared_expert(self) -> Expert:
        """Return the matrices of the shared experts, as one of their joint width."""
        one = self.shared_experts
        return Expert(one.gate_proj.weight, one.up_proj.weight, one.down_proj.weight)

    def run_experts(self, sent: Sent | Operand) -> Tensor:
        if isinstance(sent, Sent):
            return self.experts(sent)
        assert isinstance(sent, Tensor), "experts in place give rows"
        return sent

    def combine(self, rows: Tensor, sent: Sent | Operand) -> Tensor:
        if not isinstance(sent, Sent):
            return rows
        return self.dispatcher.combine(rows, sent).to(self.dtype)

    def shared(self, u_ND: Operand) -> Tensor | None:
        return self.shared_experts(u_ND) if self.mixture is None else None

    def begin_dispatch(self, u_ND: Operand, routed: Routed | None, lane: Lane) -> object:
        assert routed is not None, "a mixture layer dispatches what it has routed"
        assert routed.sort is not None, "rows of experts in place do not travel"
        rows_ND = self.as_rows(u_ND)
        return self.dispatcher.begin_dispatch(rows_ND, routed.routing, routed.sort, lane)

    def end_dispatch(self, begun: object) -> Sent | Operand:
        return self.dispatcher.end_dispatch(begun)

    def begin_combine(self, rows: Tensor, sent: Sent | Operand, lane: Lane) -> object:
        assert isinstance(sent, Sent), "rows of experts in place do not travel"
        return self.dispatcher.begin_combine(rows, sent, lane)

    def end_combine(self, begun: object) -> Tensor:
        return self.dispatcher.end_combine(begun).to(self.dtype)
