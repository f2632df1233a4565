"""What a config of `lrsa-eval mode=layers` rules out."""

from __future__ import annotations

from collections.abc import Iterator

from lrsa.attention import DENSE, from_conf
from lrsa.attention.config import ONCE
from lrsa.config import AttentionConf, EvaluationConf, LayersConf
from lrsa.validation import attention
from lrsa.validation.problems import raised


def problems_of(conf: LayersConf, evaluation: EvaluationConf) -> Iterator[str]:
    """Of its own settings, and of an attention whose layers cannot be made dense one by one, or lose nothing.

    `evaluation.compressions`, `floor` and `ceiling` are not read: the attention is compressed as it is set.
    """
    used = evaluation.attention
    if conf.count < 1:
        yield f"layers.count={conf.count}: layers to rank, at least 1 and at most the model's"
    if not evaluation.tasks:
        yield "evaluation.tasks is empty: mode=layers scores their references; name some, e.g. 'task=[needles]'"
    if used.scorer == DENSE:
        yield (
            f"evaluation.attention.scorer={DENSE}: every layer is dense, and mode=layers asks which need to be; choose "
            "a sparse attention@evaluation.attention, e.g. lag_relative"
        )
        return
    if used.budget != "uniform":
        yield (
            f"evaluation.attention.budget={used.budget} does not work with mode=layers, which asks what a dense "
            "layer is worth among layers and heads that all keep alike; use budget=uniform"
        )
    if used.equal_bytes_at is not None:
        yield (
            f"evaluation.attention.equal_bytes_at={used.equal_bytes_at} widens the window by evaluation.compressions, "
            "which mode=layers does not read; set equal_bytes_at=null, and the window as evaluation.attention.lag_size"
        )
    if used.schedule == ONCE:
        yield (
            f"evaluation.attention.schedule={ONCE} does not work with mode=layers, which ranks layers of the chunked "
            "rule; use schedule=chunked"
        )
    elif not raised("", lambda: from_conf(used)) and _kept(used) == used.lag_size:
        yield (
            f"evaluation.attention.keep_ratio={used.keep_ratio}, top_k={used.top_k} keeps all {used.lag_size} tokens "
            "of a partition: no layer loses anything to make good; lower it, e.g. keep_ratio=0.25"
        )


def warn_if_dense(evaluation: EvaluationConf) -> None:
    """Of samples that are too short to be compressed."""
    used, length = evaluation.attention, evaluation.length or 0
    factor = used.lag_size / max(_kept(used), 1)  # nominal
    attention.warn_if_dense("evaluation.attention", used, "evaluation.length", length, [factor])


def _kept(conf: AttentionConf) -> int:
    """Tokens of a compressed partition that stay."""
    config = from_conf(conf)
    assert config is not None
    return config.geometry.kept
