"""What a benchmark compares with dense attention: scorers x lags x compressions."""

from __future__ import annotations

from itertools import product

from lrsa.attention import SparseAttentionConfig
from lrsa.config import BenchConf


def cases(conf: BenchConf) -> list[tuple[SparseAttentionConfig, float]]:
    """Each config with its nominal compression.

    Raises:
        ValueError: a scorer, lag or compression that cannot be, or a scorer that has no fast form to be timed.
    """
    found = [
        (SparseAttentionConfig(scorer=scorer, sink_size=conf.sink_size, lag_size=lag, keep_ratio=1 / factor), factor)
        for scorer, lag, factor in product(conf.scorers, conf.lags, conf.compressions)
    ]
    for reason in {config.mask_form_only for config, _ in found} - {None}:
        raise ValueError(f"lrsa-bench times the fast forms, of which this has none: {reason}; choose another scorer")
    return found
