"""The intervals of `statistics` from one resampling of examples for a whole table: many cells in the time of a few.

There, every interval has draws of its own, of 0/1 outcomes how often each pattern of outcomes comes up. Here examples
are drawn once for each number of examples, and all runs' resampled means are one matrix product. The same estimator, by
other random numbers: the bounds of 0/1 outcomes differ by what 10,000 resamples leave to chance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lrsa.results.resampling import Array, drawn_seeds, resampled_sums
from lrsa.results.statistics import (
    Interval,
    Retention,
    Runs,
    aligned,
    interval_of_difference,
    interval_of_mean,
    share_retained,
)

_Run = dict[str, float]  # example -> value
_Runs = Sequence[_Run]  # one a seed


class Pool:
    """Statistics over the `runs` of many cells; a run is known by its identity, so it must not change."""

    def __init__(self, n_resamples: int, seed: int, runs: Iterable[_Run] = ()) -> None:
        self.n_resamples = n_resamples
        self.seed = seed
        # Of a run: itself, so that its identity is not given to another; values [n]; resampled sums [R].
        self._rows: dict[int, tuple[_Run, Array, NDArray[np.float32]]] = {}
        self._add(runs)

    def _add(self, runs: Iterable[_Run]) -> None:
        """Resample runs together; those over the same examples are one product."""
        alike: dict[tuple[str, ...], list[_Run]] = {}
        for run in runs:
            if id(run) not in self._rows:
                alike.setdefault(tuple(run), []).append(run)
        for ids, same in alike.items():
            matrix = np.array([list(run.values()) for run in same])[:, np.argsort(np.array(ids, dtype=object))]
            if not np.isfinite(matrix).all():
                aligned({"runs": same})  # says of how many
            sums = resampled_sums(matrix, self.n_resamples, self.seed).astype(np.float32, copy=False)
            self._rows |= {id(run): (run, *both) for run, *both in zip(same, matrix, sums, strict=True)}

    def mean(self, runs: _Runs) -> Interval:
        """As `statistics.mean_over_seeds`."""
        ((values, sums),), (weights,) = self._stacked(runs=runs)
        return interval_of_mean(values, _weighted(sums, weights))

    def difference(self, a: _Runs, b: _Runs, names: tuple[str, str]) -> Interval:
        """As `statistics.paired_difference`."""
        ((left, of_left), (right, of_right)), weights = self._stacked(**{names[0]: a, names[1]: b})
        return interval_of_difference(left, right, _weighted(of_left, weights[0]) - _weighted(of_right, weights[1]))

    def retention(
        self, score: _Runs, floor: _Runs, full: _Runs, full_floor: _Runs | None, higher_is_better: bool
    ) -> Retention:
        """As `statistics.retention`."""
        ground = floor if full_floor is None else full_floor
        groups, _ = self._stacked(score=score, floor=floor, full=full, **{"floor of full": ground})
        (kept, kept_sums), (base, base_sums), (top, top_sums), (below, below_sums) = groups
        weights = self._weights(kept, (len(score),) if full_floor is None else (len(score), len(full)))
        sign = 1.0 if higher_is_better else -1.0
        gains = sign * _weighted(kept_sums - base_sums, weights[0])
        wholes = sign * _weighted(top_sums - below_sums, weights[-1])
        whole = self.difference(full, ground, ("full", "floor"))
        return share_retained(kept, base, top, below, gains, wholes, whole, sign)

    def _stacked(self, **groups: _Runs) -> tuple[list[tuple[Array, NDArray[np.float32]]], list[Array]]:
        """Of each group: values [seeds, n] and resampled sums [seeds, R]; and the weights of its seeds [seeds, R]."""
        runs = [run for some in groups.values() for run in some]
        self._add(runs)
        if any(run.keys() != runs[0].keys() for run in runs[1:]):
            checked: dict[str, Runs] = dict(groups)
            aligned(checked)  # says which examples are whose
        stacked = []
        for some in groups.values():
            _, values, sums = zip(*(self._rows[id(run)] for run in some), strict=True)
            stacked.append((np.stack(values), np.stack(sums)))
        return stacked, self._weights(stacked[0][0], tuple(len(some) for some in groups.values()))

    def _weights(self, values: Array, sizes: tuple[int, ...]) -> list[Array]:
        """Of resampled seeds, over the number of examples."""
        return _over_examples(values.shape[1], self.n_resamples, self.seed, sizes)


def _weighted(sums: NDArray[np.float32], weights: Array) -> Array:
    return np.asarray(sums[0] * weights[0] if len(sums) == 1 else (sums * weights).sum(0))


@functools.lru_cache(maxsize=16)
def _over_examples(n: int, n_resamples: int, seed: int, sizes: tuple[int, ...]) -> list[Array]:
    return [(weights / n).astype(np.float32) for weights in drawn_seeds(n, n_resamples, seed, sizes)]
