"""Intervals: of a mean, of the paired difference between two arms on the same examples, and of the share retained.

Method. The percentile bootstrap (Efron & Tibshirani 1993, ch. 13) over examples, 95%. Not BCa: its acceleration is
undefined for the constant samples that recall tasks produce, and on the means of 0/1 outcomes the two agree wherever
the bootstrap is sound at all. It is not sound with few events: 160 of 160 correct would give an interval of no width,
and 4 discordant pairs, all one way, would "exclude 0" though a sign test says p = 0.125. So 0/1 outcomes with fewer
than `FEW_EVENTS` successes, failures or discordant pairs get a closed form made for them: Wilson's score interval
(Wilson 1927) for a mean, Bonett & Price's adjusted interval (2012, J. Educ. Behav. Stat. 37:479) for a paired
difference.

Several seeds. Every seed is scored on the same examples, so seeds and examples are crossed: both are resampled,
independently (the pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1:386). Resampling S seeds understates their
variance by (S - 1)/S, which is put right by stretching their weights. Even so, three seeds say little about the spread
between seeds.

Retention. A ratio of two differences, numerator and denominator from the same resampled examples (and seeds, where they
are of the same runs). A ratio whose denominator may be 0 has no bounded interval (Fieller 1954, J. R. Stat. Soc. B
16:175): then there is none, rather than a wild one. Where few examples tell the numerator from 0, or from the
denominator, Bonett & Price's interval of that difference, over the denominator, bounds the ratio's from within.

What no interval here knows: examples that share a paragraph are treated as independent, and many comparisons in one
table are not corrected for each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrsa.results.resampling import Array, column_means, over_seeds, seed_weights

CONFIDENCE = 0.95
Z = 1.959963984540054  # 97.5% point of the standard normal
FEW_EVENTS = 10
RESAMPLES = 10_000

Runs = Mapping[str, float] | Sequence[Mapping[str, float]]  # example id -> value; one mapping a seed


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, in the unit of the values (exact match: a fraction), from n examples a seed.

    Raises ValueError without a positive `n` or with `low` above `high`: a number nobody can weigh is not printed.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int = 1
    method: str = "bootstrap"
    difference: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.n, int | np.integer) or self.n < 1 or self.seeds < 1:
            raise ValueError(
                f"an interval needs the number of examples and seeds behind it, got n={self.n}, seeds={self.seeds}"
            )
        if not self.low <= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def size(self) -> str:
        """`160`, or `160 × 3 seeds`."""
        return f"{self.n}" if self.seeds == 1 else f"{self.n} × {self.seeds} seeds"

    def number(self, value: float, scale: float = 1.0, digits: int = 3) -> str:
        """`value` as this interval prints it: a sign on differences, no minus zero."""
        text = f"{value * scale:{'+' if self.difference else ''}.{digits}f}"
        return text.lstrip("+-") if float(text) == 0 else text

    def text(self, scale: float = 1.0, digits: int = 3, with_n: bool = True) -> str:
        """`75.3 [68.1, 81.2] n=160`. A difference is never printed without its n (ValueError)."""
        if self.difference and not with_n:
            raise ValueError("a difference is printed with its n")
        mean, low, high = (self.number(value, scale, digits) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" + (f" n={self.size}" if with_n else "")

    def __str__(self) -> str:
        return self.text()


def bootstrap_mean(values: Sequence[float] | Array, n_resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of `values` [n] with its interval. Raises ValueError for no values or values that are not finite."""
    return _mean(_checked(np.asarray(values, dtype=np.float64)[None, :], "values"), n_resamples, seed)


def mean_over_seeds(runs: Runs, n_resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over seeds and examples. All seeds must hold the same example ids (ValueError, naming some)."""
    matrices, _ = aligned({"runs": runs})
    return _mean(matrices[0], n_resamples, seed)


def paired_difference(
    a: Runs, b: Runs, n_resamples: int = RESAMPLES, seed: int = 0, names: tuple[str, str] = ("a", "b")
) -> Interval:
    """Mean of a minus mean of b, paired by example id; seeds of the two arms are resampled independently.

    Raises ValueError when the example ids differ, naming some of them and the arm (`names`) that lacks them.
    """
    if names[0] == names[1]:
        raise ValueError(f"a difference is between two arms, got {names[0]!r} twice")
    (left, right), _ = aligned({names[0]: a, names[1]: b})
    draws, rng = column_means(np.concatenate([left, right]), n_resamples, seed)  # [R, Sa + Sb]
    split = left.shape[0]
    return interval_of_difference(left, right, over_seeds(draws[:, :split], rng) - over_seeds(draws[:, split:], rng))


def interval_of_difference(left: Array, right: Array, sampled: Array) -> Interval:
    """That of mean(left) - mean(right), [seeds, n] each, the same examples; `sampled`: its resampled values."""
    stacked, n = np.concatenate([left, right]), left.shape[1]
    each = left.mean(0) - right.mean(0)
    mean, seeds = float(each.mean()), max(left.shape[0], right.shape[0])
    low, high, method = *_percentiles(sampled), "bootstrap"
    if _is_binary(stacked):
        up, down = float(np.clip(each, 0, None).sum()), float(np.clip(-each, 0, None).sum())
        if up + down < FEW_EVENTS:
            low, high, method = _widen(_bonett_price(up, down, n), (low, high), stacked.shape[0] > 2, "bonett-price")
        low, high = max(-1.0, low), min(1.0, high)
    return Interval(mean, min(low, mean), max(high, mean), n, seeds, method, difference=True)


@dataclass(frozen=True)
class Retention:
    """`share`: (score - floor) / (full - floor), 1 where everything is retained; None where `whole`, full - floor, is
    not clear of 0, so that there is nothing to retain a share of.
    """

    share: Interval | None
    whole: Interval


def retention(
    score: Runs,
    floor: Runs,
    full: Runs,
    full_floor: Runs | None = None,
    *,
    higher_is_better: bool = True,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Retention:
    """The share of full - full_floor that is left as score - floor, paired by example id.

    full_floor: of the model that `full` is of, whose seeds are resampled independently; None: the same model, so that
    all three hold the same seeds in the same order, resampled together. The seeds of the share are those of `score`.

    Raises ValueError when the example ids differ, or for runs of one model that are not as many.
    """
    names = {"score": score, "floor": floor, "full": full, "floor of full": floor if full_floor is None else full_floor}
    (kept, base, top, ground), _ = aligned(names)
    for pair in ((kept, base), (top, ground)):
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"a score has {len(pair[0])} seeds and its floor {len(pair[1])}: give both of each run")
    sign = 1.0 if higher_is_better else -1.0
    whole = paired_difference(full, names["floor of full"], n_resamples, seed, ("full", "floor"))
    means, rng = column_means(np.concatenate([kept, base, top, ground]), n_resamples, seed)
    draws = np.split(means, np.cumsum([len(kept), len(base), len(top)]), axis=1)
    weights = seed_weights(n_resamples, len(kept), rng)
    others = weights if full_floor is None else seed_weights(n_resamples, len(top), rng)
    gains = sign * ((draws[0] - draws[1]) * weights).sum(-1)
    wholes = sign * ((draws[2] - draws[3]) * others).sum(-1)
    return share_retained(kept, base, top, ground, gains, wholes, whole, sign)


def share_retained(
    kept: Array, base: Array, top: Array, ground: Array, gains: Array, wholes: Array, whole: Interval, sign: float
) -> Retention:
    """mean(kept - base) / mean(top - ground), [seeds, n] each, whose resampled numerators and denominators are `gains`
    and `wholes`; `whole`: the interval of the denominator. `sign` -1 where less is better.
    """
    stacked, n = np.concatenate([kept, base, top, ground]), kept.shape[1]
    gain, total = sign * float((kept - base).mean()), sign * float((top - ground).mean())
    with np.errstate(all="ignore"):  # a draw without a positive denominator bounds the ratio on neither side
        low = _percentiles(np.where(wholes > 0, gains / wholes, -np.inf))[0]
        high = _percentiles(np.where(wholes > 0, gains / wholes, np.inf))[1]
    if not (whole.excludes_zero and total > 0 and np.isfinite([low, high]).all()):
        return Retention(None, whole)
    method = "bootstrap"
    if _is_binary(stacked):
        each, lost = sign * (kept - base).mean(0), sign * ((kept - base).mean(0) - (top - ground).mean(0))
        for shift, part in ((0.0, each), (1.0, lost)):
            up, down = float(np.clip(part, 0, None).sum()), float(np.clip(-part, 0, None).sum())
            if up + down < FEW_EVENTS:
                under, over = (shift + bound / total for bound in _bonett_price(up, down, n))
                low, high, method = min(low, under), max(high, over), "bonett-price"
    mean = gain / total
    return Retention(Interval(mean, min(low, mean), max(high, mean), n, len(kept), method), whole)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    share, square = successes / n, Z * Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z / (1 + square / n) * float(np.sqrt(share * (1 - share) / n + square / (4 * n * n)))
    # the bounds touch 0 and 1 exactly; rounding would miss them
    return (0.0 if successes <= 0 else max(0.0, centre - half)), (1.0 if successes >= n else min(1.0, centre + half))


def _bonett_price(up: float, down: float, n: int) -> tuple[float, float]:
    """95% interval of a difference of paired proportions: one pair is added to each kind of discordant pair."""
    p, q = (up + 1) / (n + 2), (down + 1) / (n + 2)
    half = Z * float(np.sqrt((p + q - (p - q) ** 2) / (n + 2)))
    return p - q - half, p - q + half


def _mean(matrix: Array, n_resamples: int, seed: int) -> Interval:
    """Interval of the mean of `matrix` [seeds, n]."""
    draws, rng = column_means(matrix, n_resamples, seed)
    return interval_of_mean(matrix, over_seeds(draws, rng))


def interval_of_mean(matrix: Array, sampled: Array) -> Interval:
    """That of the mean of `matrix` [seeds, n], whose resampled values are `sampled`."""
    seeds, n = matrix.shape
    low, high = _percentiles(sampled)
    mean, method = float(matrix.mean()), "bootstrap"
    if _is_binary(matrix):
        successes = float(matrix.mean(0).sum())
        if min(successes, n - successes) < FEW_EVENTS:
            low, high, method = _widen(wilson(successes, n), (low, high), seeds > 1, "wilson")
        low, high = max(0.0, low), min(1.0, high)
    return Interval(mean, min(low, mean), max(high, mean), n, seeds, method)


def _widen(
    closed: tuple[float, float], sampled: tuple[float, float], several: bool, name: str
) -> tuple[float, float, str]:
    """The closed form knows nothing of seeds: with several, never narrower than the bootstrap over them."""
    if not several:
        return *closed, name
    return min(closed[0], sampled[0]), max(closed[1], sampled[1]), name


def _percentiles(sampled: Array) -> tuple[float, float]:
    """Those that leave half of 1 - CONFIDENCE at each end: numpy's linear ones, without what it takes to get ready."""
    places = [(len(sampled) - 1) * share for share in (0.5 * (1 - CONFIDENCE), 0.5 * (1 + CONFIDENCE))]
    below = [math.floor(place) for place in places]
    above = [min(index + 1, len(sampled) - 1) for index in below]
    ranked = np.partition(sampled, [*below, *above])
    low, high = (
        float(ranked[i] + (ranked[j] - ranked[i]) * (place - i))
        for i, j, place in zip(below, above, places, strict=True)
    )
    return low, high


def _is_binary(matrix: Array) -> bool:
    return bool(np.isin(matrix, (0.0, 1.0)).all())


def _checked(matrix: Array, name: str) -> Array:
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name}: no examples to average")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: {int((~np.isfinite(matrix)).sum())} of {matrix.size} values are not finite")
    return matrix


def aligned(arms: Mapping[str, Runs]) -> tuple[list[Array], int]:
    """One matrix [seeds, n] an arm, columns in the order of sorted example ids."""
    seeds = {name: [runs] if isinstance(runs, Mapping) else list(runs) for name, runs in arms.items()}
    for name, runs in seeds.items():
        if not runs:
            raise ValueError(f"{name}: no runs to average")
    labelled = [(name, run) for name, runs in seeds.items() for run in runs]
    first_name, first = labelled[0]
    for name, run in labelled[1:]:
        if run.keys() != first.keys():
            raise ValueError(_difference_of_ids(first_name, first, name, run))
    order = sorted(first)
    matrices = [
        _checked(np.array([[float(run[i]) for i in order] for run in runs]).reshape(len(runs), -1), name)
        for name, runs in seeds.items()
    ]
    return matrices, len(order)


def _difference_of_ids(a_name: str, a: Mapping[str, float], b_name: str, b: Mapping[str, float]) -> str:
    if a_name == b_name:
        a_name, b_name = f"one seed of {a_name}", "another"
    parts = [
        f"{a_name} and {b_name} were scored on different examples ({len(a)} and {len(b)}), so they cannot be paired"
    ]
    for name, missing in ((b_name, sorted(a.keys() - b.keys())), (a_name, sorted(b.keys() - a.keys()))):
        if missing:
            parts.append(f"{name} lacks {len(missing)}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}")
    return "; ".join(parts)
