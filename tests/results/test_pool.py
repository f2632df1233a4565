"""One resampling for a whole table gives the intervals that drawing anew gives, up to what chance leaves."""

import numpy as np
import pytest

from lrsa.results.pool import Pool
from lrsa.results.statistics import mean_over_seeds, paired_difference, retention

Run = dict[str, float]


def runs(seeds: int, shift: float, binary: bool, n: int = 150, start: int = 0) -> list[Run]:
    rng = np.random.default_rng(start)
    values = rng.random((seeds, n)) < 0.4 + shift if binary else rng.normal(shift, 1, (seeds, n))
    return [{f"e{i}": float(value) for i, value in enumerate(row)} for row in values]


def near(one, other, tolerance: float) -> None:
    assert (one.mean, one.n, one.seeds, one.method) == (pytest.approx(other.mean), other.n, other.seeds, other.method)
    assert (one.low, one.high) == (pytest.approx(other.low, abs=tolerance), pytest.approx(other.high, abs=tolerance))


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("binary", "tolerance"), [(False, 1e-5), (True, 8e-3)], ids=["continuous", "binary"])
def test_the_same_intervals(seeds: int, binary: bool, tolerance: float) -> None:
    """Continuous values are resampled by the same draws in both: equal to single precision. Shares of 150 lie 0.0067
    apart.
    """
    high, low, floor = (runs(seeds, shift, binary, start=k) for k, shift in enumerate((0.3, 0.1, -0.3)))
    pool = Pool(10_000, 0, [*high, *low])
    near(pool.mean(high), mean_over_seeds(high), tolerance)
    near(pool.difference(high, low, ("a", "b")), paired_difference(high, low), tolerance)
    near(pool.difference(high, low[:1], ("a", "b")), paired_difference(high, low[:1]), tolerance)
    for full_floor in (None, floor[::-1]):
        kept = pool.retention(low, floor, high, full_floor, higher_is_better=True)
        alone = retention(low, floor, high, full_floor)
        assert kept.share is not None and alone.share is not None
        near(kept.share, alone.share, 10 * tolerance)
        near(kept.whole, alone.whole, tolerance)


def test_few_events_get_the_closed_form_here_too() -> None:
    sure = [{f"e{i}": 1.0 for i in range(40)}]
    pool = Pool(500, 0)
    assert pool.mean(sure) == mean_over_seeds(sure, 500) and pool.mean(sure).method == "wilson"
    almost = [{**sure[0], "e3": 0.0}]
    found = pool.difference(sure, almost, ("a", "b"))
    assert found == paired_difference(sure, almost, 500) and found.method == "bonett-price"


def test_other_examples_are_refused_and_order_is_no_matter() -> None:
    a, b = runs(1, 0.2, True), runs(1, 0.1, True, n=149)
    with pytest.raises(ValueError, match=r"lrsa and dense were scored on different examples \(150 and 149\)"):
        Pool(100, 0).difference(a, b, ("lrsa", "dense"))
    turned = [dict(reversed(a[0].items()))]
    assert Pool(100, 0).difference(a, turned, ("a", "b")).mean == 0.0
    assert Pool(100, 0).difference(a, turned, ("a", "b")).low <= 0
