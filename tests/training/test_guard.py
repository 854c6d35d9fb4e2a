"""The guard: what it lets pass, what it stops, and that it repeats itself."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.guard import GuardConfig
from ziphius.training.guard import Guard

LOSSES = st.floats(0, 20) | st.just(math.nan) | st.just(math.inf)


def calm(losses: int = 20, **changes: float) -> Guard:
    """Return a guard that has seen losses around 5."""
    guard = Guard(GuardConfig(**changes))
    for step in range(losses):
        assert guard.judge(step, 5 + 0.01 * (step % 3), 1.0) is None
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_applied(loss: float) -> None:
    assert Guard(GuardConfig()).judge(1, loss, 1.0) == "loss not finite"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_never_applied(norm: float) -> None:
    assert Guard(GuardConfig()).judge(1, 5.0, norm) == "gradient not finite"


def test_a_spike_is_skipped_and_named() -> None:
    guard = calm()
    assert guard.judge(21, 6.5, 1.0) == "loss 1.49 nats above the median"
    assert guard.largest_spike is not None
    assert guard.largest_spike["step"] == 21
    assert guard.largest_spike["nats"] == pytest.approx(1.49)
    assert guard.skipped == 1
    assert guard.judge(22, 5.0, 1.0) is None


def test_a_rise_within_the_usual_scatter_is_no_spike() -> None:
    guard = Guard(GuardConfig(spike=20, spike_nats=1))
    for step in range(40):
        assert guard.judge(step, 5 + 0.2 * (step % 3), 1.0) is None
    assert guard.judge(41, 8.9, 1.0) is None


def test_a_fall_is_no_spike() -> None:
    assert calm().judge(21, 0.1, 1.0) is None


def test_the_first_losses_are_not_judged() -> None:
    assert calm(losses=9).judge(10, 19.0, 1.0) is None


def test_without_spikes_only_finite_counts() -> None:
    guard = calm(spike=0)
    assert guard.judge(21, 500.0, 1.0) is None
    assert guard.judge(22, math.nan, 1.0) is not None


def test_a_skipped_loss_does_not_move_the_median() -> None:
    guard = calm()
    before = list(guard.losses)
    guard.judge(21, 9.0, 1.0)
    assert guard.losses == before


def test_losses_of_another_text_start_a_new_history() -> None:
    guard = calm()
    guard.reading(0)
    assert len(guard.losses) == 20
    guard.reading(1)
    for step in range(10):
        assert guard.judge(step, 9 + 0.01 * (step % 3), 1.0) is None
    assert guard.largest_spike is not None
    assert guard.largest_spike["nats"] < 0.1
    guard.reading(1)
    assert guard.judge(11, 10.5, 1.0) is not None


def test_it_goes_back_after_skips_in_a_row_and_only_so_often() -> None:
    guard = calm(patience=3, max_rollbacks=1)
    for step in range(3):
        assert not guard.must_go_back
        guard.judge(step, math.nan, 1.0)
    assert guard.must_go_back
    assert guard.may_go_back
    guard.went_back()
    assert (guard.in_row, guard.losses, guard.rollbacks) == (0, [], 1)
    assert not guard.may_go_back


def test_skips_that_are_not_in_a_row_do_not_add_up() -> None:
    guard = calm(patience=2)
    for step in range(10):
        guard.judge(step, math.nan if step % 2 else 5.0, 1.0)
        assert not guard.must_go_back


@given(st.lists(LOSSES, max_size=60), st.integers(0, 60))
def test_a_guard_that_was_saved_judges_like_one_that_was_not(losses: list[float], at: int) -> None:
    config = GuardConfig(window=12, spike=2, spike_nats=0.5)
    whole, first, second = Guard(config), Guard(config), Guard(config)

    def judged(guard: Guard, step: int) -> str | None:
        guard.reading(step // 25)
        return guard.judge(step, losses[step], 1.0)

    at = min(at, len(losses))
    expected = [judged(whole, step) for step in range(len(losses))]
    found = [judged(first, step) for step in range(at)]
    second.load_state(json.loads(json.dumps(first.state())))
    found += [judged(second, step) for step in range(at, len(losses))]
    assert found == expected
    assert second.state() == whole.state()


def test_a_state_from_before_texts_were_counted_is_read() -> None:
    state = calm().state()
    del state["turn"]
    guard = Guard(GuardConfig())
    guard.load_state(state)
    assert guard.state() == calm().state()
