"""Intervals against hand calculations, published values and simulation."""

import math

import numpy as np
import pytest

from lrsa.results.statistics import Interval, bootstrap_mean, mean_over_seeds, paired_difference, retention, wilson

from .conftest import share


def by_id(values: np.ndarray, prefix: str = "q") -> dict[str, float]:
    return {f"{prefix}{i}": float(value) for i, value in enumerate(values)}


def test_mean_and_width_agree_with_the_normal_approximation() -> None:
    interval = bootstrap_mean(share(240, 400))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert interval.mean == pytest.approx(0.6)
    assert (interval.n, interval.method) == (400, "bootstrap")
    assert interval.low == pytest.approx(0.6 - half, abs=0.004)
    assert interval.high == pytest.approx(0.6 + half, abs=0.004)


def test_real_values_resample_examples() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=300)  # more distinct values than the counting path takes
    interval = bootstrap_mean(values, 4000)
    half = 1.96 * values.std() / math.sqrt(300)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_same_seed_same_interval_other_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=200)
    assert bootstrap_mean(values, 500, seed=3) == bootstrap_mean(values, 500, seed=3)
    assert bootstrap_mean(values, 500, seed=3) != bootstrap_mean(values, 500, seed=4)


@pytest.mark.parametrize("right", [0, 100])
def test_all_wrong_or_all_right_has_a_width(right: int) -> None:
    interval = bootstrap_mean(share(right))
    assert interval.method == "wilson"
    # z² / (n + z²), the bound that Wilson's formula reduces to at the boundary
    bound = 1.959964**2 / (100 + 1.959964**2)
    expected = (0.0, bound) if right == 0 else (1 - bound, 1.0)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)


def test_wilson_matches_a_published_value() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81/263 and 15/148
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_identical_arms_differ_by_zero_but_not_with_certainty() -> None:
    values = by_id(share(60))
    interval = paired_difference(values, dict(values))
    assert interval.mean == 0
    assert interval.low < 0 < interval.high
    assert interval.low == pytest.approx(-interval.high)
    # Bonett & Price with no discordant pair: half width z sqrt(2 / (n + 2)) / sqrt(n + 2)
    assert interval.high == pytest.approx(1.959964 * math.sqrt(2) / 102, abs=1e-6)


def test_paired_difference_by_hand() -> None:
    n, gained, lost = 200, 50, 10
    a = np.concatenate([np.ones(gained), np.zeros(lost), np.ones(n - gained - lost)])
    b = np.concatenate([np.zeros(gained), np.ones(lost), np.ones(n - gained - lost)])
    interval = paired_difference(by_id(a), by_id(b))
    difference = (gained - lost) / n
    half = 1.96 * math.sqrt(((gained + lost) / n - difference**2) / n)
    assert interval.mean == pytest.approx(difference)
    assert interval.low == pytest.approx(difference - half, abs=0.006)
    assert interval.high == pytest.approx(difference + half, abs=0.006)
    assert interval.excludes_zero and interval.difference


def test_pairing_is_by_id_not_by_order() -> None:
    a = by_id(share(50))
    assert paired_difference(a, dict(reversed(a.items()))).mean == 0
    assert paired_difference(a, dict(reversed(a.items()))).high < 0.03


def test_pairing_is_tighter_than_two_separate_samples() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)
    a, b = by_id(hard + rng.normal(scale=0.1, size=300) + 0.1), by_id(hard + rng.normal(scale=0.1, size=300))
    interval = paired_difference(a, b, 2000)
    alone = bootstrap_mean(list(a.values()), 2000)
    assert interval.excludes_zero
    assert interval.high - interval.low < 0.3 * (alone.high - alone.low)


def test_a_handful_of_discordant_pairs_excludes_nothing() -> None:
    a, b = by_id(share(54)), by_id(share(50))  # 4 to 0: a sign test says p = 0.125
    assert not paired_difference(a, b).excludes_zero


def test_swapped_arms_mirror() -> None:
    rng = np.random.default_rng(5)
    a, b = by_id(rng.random(150) < 0.6), by_id(rng.random(150) < 0.5)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high, abs=0.01)


def test_other_examples_are_an_error_that_names_some() -> None:
    a, b = by_id(share(3, 5)), by_id(share(3, 4)) | {"x9": 1.0}
    with pytest.raises(ValueError, match=r"different examples \(5 and 5\).*LRSA lacks 1: q4.*dense lacks 1: x9"):
        paired_difference(a, b, names=("dense", "LRSA"))


def test_no_or_broken_values_are_errors() -> None:
    with pytest.raises(ValueError, match="no examples"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        bootstrap_mean([0.0, float("nan")])
    with pytest.raises(ValueError, match="no runs"):
        mean_over_seeds([])


def test_an_interval_needs_its_n_and_prints_it() -> None:
    with pytest.raises(ValueError, match="n=0"):
        Interval(0.1, 0.0, 0.2, 0, difference=True)
    interval = Interval(0.104, 0.05, 0.15, 160, difference=True)
    assert str(interval) == "+0.104 [+0.050, +0.150] n=160"
    assert interval.text(100, 1) == "+10.4 [+5.0, +15.0] n=160"
    with pytest.raises(ValueError, match="with its n"):
        interval.text(with_n=False)
    assert Interval(0.5, 0.4, 0.6, 160, seeds=3).text(100, 1) == "50.0 [40.0, 60.0] n=160 × 3 seeds"
    assert Interval(-1e-9, -0.1, 0.1, 9, difference=True).text(100, 1) == "0.0 [-10.0, +10.0] n=9"


@pytest.mark.parametrize(("n", "p"), [(60, 0.5), (60, 0.9), (160, 0.03), (160, 0.99)])
def test_intervals_cover_about_as_often_as_they_say(n: int, p: float) -> None:
    rng = np.random.default_rng(7)
    hits = [bool(i.low <= p <= i.high) for i in (bootstrap_mean(rng.random(n) < p, 500, s) for s in range(400))]
    assert 0.91 <= np.mean(hits) <= 1.0


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.05, 0.0), (0.2, 0.1)])
def test_paired_intervals_cover_about_as_often_as_they_say(gain: float, loss: float) -> None:
    rng = np.random.default_rng(11)
    hits = []
    for seed in range(300):
        draw = rng.random(120)
        a, b = (draw < gain) | (draw > 0.7), ((draw >= gain) & (draw < gain + loss)) | (draw > 0.7)
        interval = paired_difference(by_id(a), by_id(b), 500, seed)
        hits.append(interval.low <= gain - loss <= interval.high)
    assert 0.91 <= np.mean(hits) <= 1.0


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = mean_over_seeds([by_id(share(50))] * 3)
    spread = mean_over_seeds([by_id(share(right)) for right in (30, 50, 70)])
    assert agree.mean == spread.mean == 0.5
    assert (agree.seeds, agree.n) == (3, 100)
    assert spread.high - spread.low > 1.5 * (agree.high - agree.low)
    single = bootstrap_mean(share(50))
    # the same seed three times is no new information about the examples
    assert agree.high - agree.low == pytest.approx(single.high - single.low, abs=0.03)


def test_seeds_of_an_arm_must_hold_the_same_examples() -> None:
    with pytest.raises(ValueError, match="one seed of runs and another"):
        mean_over_seeds([by_id(share(1, 3)), by_id(share(1, 2))])


def test_arms_may_have_other_numbers_of_seeds() -> None:
    a = [by_id(share(right)) for right in (68, 70, 72)]
    interval = paired_difference(a, by_id(share(40)))
    assert interval.mean == pytest.approx(0.3)
    assert interval.seeds == 3 and interval.excludes_zero


def test_retention_by_hand() -> None:
    """Nested answers: 40 right at the floor, 280 of 400 in full, 160 under compression: half of what was gained."""
    found = retention(by_id(share(160, 400)), by_id(share(40, 400)), by_id(share(280, 400)))
    assert found.share is not None and found.whole.mean == pytest.approx(0.6) and found.whole.difference
    assert found.share.mean == pytest.approx(0.5)
    assert (found.share.n, found.share.seeds, found.share.method) == (400, 1, "bootstrap")
    # of the 240 that were gained, 120 are kept: the ratio is a binomial share of them
    half = 1.96 * math.sqrt(0.5 * 0.5 / 240)
    assert (found.share.low, found.share.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.008)


def test_retention_of_what_is_better_when_lower() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(scale=0.3, size=200)
    floor, full, score = by_id(5 + noise), by_id(1 + noise), by_id(2 + noise)
    found = retention(score, floor, full, higher_is_better=False, n_resamples=1000)
    assert found.share is not None and found.share.mean == pytest.approx(0.75) and found.whole.mean == pytest.approx(-4)
    assert retention(score, floor, full, n_resamples=1000).share is None, "the full cache is worse than the floor"


@pytest.mark.parametrize(("floor", "full"), [(50, 50), (50, 53), (53, 40)])
def test_nothing_is_retained_of_a_gain_that_may_be_none(floor: int, full: int) -> None:
    found = retention(by_id(share(51)), by_id(share(floor)), by_id(share(full)), n_resamples=500)
    assert found.share is None
    assert found.whole.mean == pytest.approx((full - floor) / 100) and found.whole.n == 100


def test_retention_of_everything_or_nothing_has_a_width() -> None:
    full, floor = by_id(share(90)), by_id(share(0))
    everything, nothing = retention(full, floor, full).share, retention(floor, floor, full).share
    assert everything is not None and nothing is not None
    assert everything.mean == 1 and everything.low < 0.98 < 1.02 < everything.high
    assert nothing.mean == 0 and nothing.low < -0.02 < 0.02 < nothing.high
    assert everything.method == nothing.method == "bonett-price"


def test_seeds_of_one_model_are_resampled_together() -> None:
    """Seeds that gain more keep more: the share is the same in each, unless the full score is of another model."""
    full = [by_id(share(right)) for right in (40, 60, 80)]
    floor, half = [by_id(share(0))] * 3, [by_id(share(right)) for right in (20, 30, 40)]
    own, other = retention(half, floor, full).share, retention(half, floor, full, floor).share
    assert own is not None and other is not None and own.seeds == 3
    assert own.mean == other.mean == pytest.approx(0.5)
    assert other.high - other.low > 1.2 * (own.high - own.low)
    one = retention(half[1], floor[0], full, floor).share
    assert one is not None and one.seeds == 1 and one.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="a score has 3 seeds and its floor 2"):
        retention(half, floor[:2], full)
    with pytest.raises(ValueError, match="different examples"):
        retention(half, floor, [by_id(share(4, 9))] * 3)


def test_retention_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = []
    for seed in range(300):
        draw = rng.random(150)
        runs = [by_id(draw < edge) for edge in (0.35, 0.1, 0.6)]
        interval = retention(*runs, n_resamples=500, seed=seed).share
        hits.append(interval is not None and interval.low <= 0.5 <= interval.high)
    assert 0.91 <= np.mean(hits) <= 0.99
