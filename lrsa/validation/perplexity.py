"""What a config of `lrsa-eval mode=perplexity` rules out."""

from __future__ import annotations

from collections.abc import Iterator

from lrsa.attention.config import ONCE
from lrsa.attention.scorers import SCORERS
from lrsa.config import EvaluationConf, PerplexityConf


def problems_of(conf: PerplexityConf, evaluation: EvaluationConf) -> Iterator[str]:
    """Of its own settings, and of an attention that needs to know where a prompt ends."""
    if conf.windows < 2:
        yield f"perplexity.windows={conf.windows}: at least 2, which an interval is over"
    if conf.buckets < 1:
        yield f"perplexity.buckets={conf.buckets}: stretches of a window, at least 1"
    elif evaluation.length is not None and evaluation.length < 2 * conf.buckets:
        yield (
            f"perplexity.buckets={conf.buckets} of evaluation.length={evaluation.length} tokens are shorter than 2: "
            "lower the one or raise the other"
        )
    if not any(factor != 1 for factor in evaluation.compressions):
        return
    if evaluation.attention.schedule == ONCE:
        yield (
            f"evaluation.attention.schedule={ONCE} does not work with mode=perplexity: prose has no prompt whose end "
            "it could compress at; use schedule=chunked"
        )
    scorer = evaluation.attention.scorer
    if scorer in SCORERS and SCORERS[scorer].reads_future:
        yield (
            f"evaluation.attention.scorer={scorer} looks ahead, so that what it keeps tells of the tokens to predict: "
            "no likelihood comes of it; choose another for mode=perplexity"
        )
