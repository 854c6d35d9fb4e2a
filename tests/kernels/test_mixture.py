"""A mixture's experts in place: the reference by hand, and the compiled kernel against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.weights import DTYPES, FORMS, assert_near, dense, random_weight
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.mixture import Expert, Experts, mixture_compiled, mixture_reference

EXPERTS, CHOICES = 6, 3


def random_experts(form: str, D: int, F: int, shared: int, seed: int = 0) -> Experts:
    def expert(number: int) -> Expert:
        shapes = ((F, D), (F, D), (D, F))
        return Expert(
            *(
                random_weight(form, *shape, group=32, seed=seed + 3 * number + place)
                for place, shape in enumerate(shapes)
            )
        )

    made = [expert(number) for number in range(EXPERTS + shared)]
    return Experts(made[:EXPERTS], made[EXPERTS:])


def random_rows(N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows, their experts and gates."""
    chosen_NK = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(N)])
    gates_NK = torch.rand(N, CHOICES, dtype=torch.promote_types(dtype, torch.float32)) * 2
    return torch.randn(N, D).to(dtype), chosen_NK, gates_NK


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_reference_by_hand(shared: int) -> None:
    """Facts 1.7: the gate enters before the down projection, and shared experts are not gated."""
    experts = random_experts("float64", 10, 7, shared)
    u_ND, chosen_NK, gates_NK = random_rows(4, 10, torch.float64)
    found_ND = mixture_reference(u_ND, chosen_NK, gates_NK, experts)

    def expert(x_D: Tensor, weights: Expert) -> Tensor:
        gate, up, down = (dense(weight, torch.float64) for weight in weights)
        gated_F = gate @ x_D
        return down @ (gated_F * gated_F.sigmoid() * (up @ x_D))

    for n, u_D in enumerate(u_ND):
        chosen = zip(chosen_NK[n].tolist(), gates_NK[n], strict=True)
        rows = [expert(u_D, experts.routed[e]) * gate for e, gate in chosen]
        rows += [expert(u_D, weights) for weights in experts.shared]
        torch.testing.assert_close(found_ND[n], torch.stack(rows).sum(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12)
@given(
    st.integers(1, 13),
    st.sampled_from([2, 10, 32, 34, 64, 70]),
    st.sampled_from([2, 12, 32, 46, 96]),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
def test_compiled(
    library: Library, form: str, dtype: torch.dtype, N: int, D: int, F: int, shared: int, seed: int
) -> None:
    torch.manual_seed(seed)
    experts = random_experts(form, D, F, shared, seed)
    u_ND, chosen_NK, gates_NK = random_rows(N, D, dtype)
    found_ND = mixture_compiled(library, u_ND, chosen_NK, gates_NK, experts)
    expected_ND = mixture_reference(u_ND, chosen_NK, gates_NK, experts)
    # Two rows that differ by a rounding differ by some more behind the next product.
    assert_near(found_ND, expected_ND, dtype, roundings=3)
    for n in range(N):
        own = (x[n : n + 1] for x in (u_ND, chosen_NK, gates_NK))
        assert torch.equal(mixture_compiled(library, *own, experts)[0], found_ND[n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_one_expert(library: Library, dtype: torch.dtype) -> None:
    """A token's row is the same beside 40 of the same expert, in any order of the tokens."""
    experts = random_experts("int4", 64, 32, 1)
    u_ND, chosen_NK, gates_NK = random_rows(40, 64, dtype)
    chosen_NK[:, 0], chosen_NK[:, 1:] = 2, torch.tensor([4, 5])
    found_ND = mixture_compiled(library, u_ND, chosen_NK, gates_NK, experts)
    order_N = torch.randperm(40)
    turned = (x[order_N] for x in (u_ND, chosen_NK, gates_NK))
    assert torch.equal(mixture_compiled(library, *turned, experts), found_ND[order_N])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_show(library: Library, threads: int) -> None:
    experts = random_experts("bfloat16", 70, 46, 1)
    rows = random_rows(9, 70, torch.bfloat16)
    expected_ND = mixture_compiled(library, *rows, experts)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(mixture_compiled(library, *rows, experts), expected_ND)
    finally:
        torch.set_num_threads(before)


def test_gradients_are_refused(library: Library) -> None:
    experts = random_experts("float32", 8, 4, 1)
    u_ND, chosen_NK, gates_NK = random_rows(2, 8, torch.float32)
    with pytest.raises(RuntimeError, match="no backward"):
        mixture_compiled(library, u_ND.requires_grad_(), chosen_NK, gates_NK, experts)
