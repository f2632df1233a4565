"""Examples and seeds drawn with replacement: the random part of `statistics`, and the means that come of it.

R resamples of n columns (examples); rows are runs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 4_000_000  # drawn columns held in memory at once
_FEW_PATTERNS = 64  # distinct columns up to which drawing their counts beats drawing examples

Array = NDArray[np.float64]


def column_means(matrix: Array, n_resamples: int, seed: int) -> tuple[Array, np.random.Generator]:
    """Row means [R, rows] of `matrix` [rows, n] under resampled columns, and the generator after it; one draw of
    columns serves all rows.
    """
    n = matrix.shape[1]
    patterns, counts = np.unique(matrix, axis=1, return_counts=True)
    if patterns.shape[1] <= _FEW_PATTERNS:  # same distribution: how often each distinct column is drawn
        rng = np.random.default_rng(seed)
        return rng.multinomial(n, counts / n, size=n_resamples) @ patterns.T / n, rng
    return resampled_means(matrix, n_resamples, seed).T, _after_columns(n, n_resamples, seed)


def resampled_means(matrix: Array, n_resamples: int, seed: int) -> Array:
    """Row means [rows, R] of `matrix` [rows, n] under the columns that `seed` draws for n."""
    return resampled_sums(matrix, n_resamples, seed).astype(np.float64) / matrix.shape[1]


def resampled_sums(matrix: Array, n_resamples: int, seed: int) -> NDArray[Any]:
    """n times `resampled_means`, of 0 and 1 in single precision, where such sums are exact."""
    n = matrix.shape[1]
    counts, _ = _drawn_counts(n, n_resamples, seed)
    kind = np.float32 if n < 2**24 and bool(((matrix == 0) | (matrix == 1)).all()) else np.float64
    rows, width = matrix.astype(kind), max(1, _BLOCK // n)
    sums = np.empty((len(rows), n_resamples), dtype=kind)
    for start in range(0, n_resamples, width):
        sums[:, start : start + width] = rows @ counts[start : start + width].T.astype(kind, order="K")
    return sums


@functools.lru_cache(maxsize=4)
def _drawn_counts(n: int, n_resamples: int, seed: int) -> tuple[NDArray[np.uint16], Any]:
    """How often each of n columns is drawn [R, n], and the generator's state after that."""
    rng = np.random.default_rng(seed)
    counts = np.empty((n_resamples, n), dtype=np.uint16)
    block = max(1, _BLOCK // n)
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        places = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n)
    return counts, rng.bit_generator.state


def _after_columns(n: int, n_resamples: int, seed: int) -> np.random.Generator:
    rng = np.random.default_rng()
    rng.bit_generator.state = _drawn_counts(n, n_resamples, seed)[1]
    return rng


@functools.lru_cache(maxsize=16)
def drawn_seeds(n: int, n_resamples: int, seed: int, sizes: tuple[int, ...]) -> list[Array]:
    """Weights [seeds, R] of resampled seeds, for groups of `sizes` seeds, drawn after n columns."""
    rng = _after_columns(n, n_resamples, seed)
    return [np.ascontiguousarray(seed_weights(n_resamples, size, rng).T) for size in sizes]


def over_seeds(draws: Array, rng: np.random.Generator) -> Array:
    """Mean [R] over resampled seeds of `draws` [R, seeds]."""
    n_resamples, seeds = draws.shape
    return np.asarray((draws * seed_weights(n_resamples, seeds, rng)).sum(-1))


def seed_weights(n_resamples: int, seeds: int, rng: np.random.Generator) -> Array:
    """Weights [R, seeds] of resampled seeds, stretched; a row adds up to 1."""
    if seeds == 1:
        return np.ones((n_resamples, 1))
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=n_resamples) / seeds
    return np.asarray(1 / seeds + (weights - 1 / seeds) * np.sqrt(seeds / (seeds - 1)))
