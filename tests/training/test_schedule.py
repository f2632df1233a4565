from collections import Counter

import pytest

from lrsa.training.schedule import draw_compression, hashed_integer, learning_rate_factor


def test_hashed_integers_are_pinned() -> None:
    """Resuming on another machine or Python must draw the same."""
    assert hashed_integer("compression", 0, 0) == 5440098395909497667


def test_draws_depend_on_seed_and_step_alone_and_are_uniform() -> None:
    draws = [draw_compression([2, 4, 8], seed=1, step=step) for step in range(3000)]
    assert draws == [draw_compression([2, 4, 8], seed=1, step=step) for step in range(3000)]
    assert draws != [draw_compression([2, 4, 8], seed=2, step=step) for step in range(3000)]
    counts = Counter(draws)
    assert set(counts) == {2.0, 4.0, 8.0}
    assert all(900 < count < 1100 for count in counts.values())


def test_nothing_to_draw_from() -> None:
    assert draw_compression([], seed=0, step=3) is None
    assert draw_compression([4], seed=0, step=3) == 4.0


def test_learning_rate_warms_up_then_falls_to_the_floor() -> None:
    factors = [learning_rate_factor(step, steps=100, warmup_steps=10, floor=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rate_is_never_zero_on_the_first_step(warmup: int) -> None:
    assert learning_rate_factor(0, steps=5, warmup_steps=warmup, floor=0.0) > 0
