from collections import Counter

import pytest

from lrsa.training.schedule import (
    annealed_compression,
    draw_compression,
    hashed_integer,
    is_random,
    learning_rate_factor,
)


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


def test_annealed_gives_each_compression_an_equal_share_in_order() -> None:
    factors = [annealed_compression([1, 2, 4, 8], step, steps=400) for step in range(400)]
    assert factors == [1.0] * 100 + [2.0] * 100 + [4.0] * 100 + [8.0] * 100
    uneven = Counter(annealed_compression([8, 2, 4], step, steps=10) for step in range(10))
    assert list(uneven) == [8.0, 2.0, 4.0] and sorted(uneven.values()) == [3, 3, 4]
    assert annealed_compression([2, 4], step=10, steps=10) == 4.0, "asked for after the last step"


def test_random_steps_are_a_share_of_all_drawn_by_seed_and_step() -> None:
    drawn = [is_random(0.3, seed=1, step=step) for step in range(3000)]
    assert drawn == [is_random(0.3, seed=1, step=step) for step in range(3000)]
    assert drawn != [is_random(0.3, seed=2, step=step) for step in range(3000)]
    assert 800 < sum(drawn) < 1000
    assert not any(is_random(0, 0, step) for step in range(300)) and all(is_random(1, 0, step) for step in range(300))
