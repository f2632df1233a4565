"""What a config of `lrsa-eval mode=selection` rules out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lrsa.attention import from_conf
from lrsa.attention.config import ONCE
from lrsa.attention.scorers import SCORERS
from lrsa.config import EvaluationConf, SelectionConf
from lrsa.validation.problems import raised


def problems_of(conf: SelectionConf, evaluation: EvaluationConf) -> Iterator[str]:
    """Of its own settings, and of an attention or compressions that leave nothing to look at."""
    factors = [factor for factor in evaluation.compressions if factor > 1]
    if not factors:
        yield (
            f"evaluation.compressions={list(evaluation.compressions)} compresses nothing, and mode=selection looks at "
            "what is kept: add one above 1"
        )
    if not evaluation.tasks:
        yield "evaluation.tasks is empty: mode=selection looks for their answers; name some, e.g. 'task=[needles]'"
    unknown = [name for name in conf.scorers if name not in SCORERS]
    if unknown:
        yield f"selection.scorers={list(conf.scorers)}: {unknown} unknown; choose of {', '.join(sorted(SCORERS))}"
    if len(set(conf.scorers)) != len(conf.scorers):
        yield f"selection.scorers={list(conf.scorers)} repeats a value"
    if conf.scorer_samples < 1:
        yield f"selection.scorer_samples={conf.scorer_samples}: samples, at least 1 (or selection.scorers=[])"
    if conf.against is not None and conf.against.endswith(".gguf") and not Path(conf.against).expanduser().is_file():
        yield f"selection.against={conf.against} is not a file: name a model's folder, a hub id, or a .gguf file"
    if evaluation.attention.schedule == ONCE:
        yield (
            f"evaluation.attention.schedule={ONCE} does not work with mode=selection, which looks at what the chunked "
            "rule dropped before the answer begins; use schedule=chunked"
        )
    elif not raised("", lambda: from_conf(evaluation.attention)):
        yield from _keep_nothing(evaluation, factors)


def _keep_nothing(evaluation: EvaluationConf, factors: list[float]) -> Iterator[str]:
    attention = from_conf(evaluation.attention)
    for factor in factors if attention is not None else ():
        assert attention is not None
        used = replace(attention, budget="uniform", dense_layers=()).with_compression(factor)
        if used is not None and used.geometry.kept == 0:
            yield (
                f"evaluation.compressions={factor:g} keeps none of a partition's {used.lag_size} tokens "
                "(evaluation.attention.lag_size, top_k): there is no selection to look at"
            )
