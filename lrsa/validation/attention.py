"""What a config of an attention rules out: by its schedule, by its scorer, by the forms that compute it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lrsa.attention import from_conf
from lrsa.attention.config import ONCE
from lrsa.attention.scorers import SCORERS
from lrsa.config import AttentionConf, EvalConf, EvaluationConf, ExamplesConf, ModelConf, TrainConf
from lrsa.validation.problems import ConfigWarning, raised


def problems_of(where: str, conf: AttentionConf) -> list[str]:
    return raised(where, lambda: from_conf(conf))


def of_training(conf: TrainConf) -> list[str]:
    """Of both attentions of `lrsa-train`, with the recipe to take where the budget of recipe=lrsa is the cause."""
    both = {"attention": conf.attention, "evaluation.attention": conf.evaluation.attention}
    lacking = [where for where, one in both.items() if one.budget == "concentrated" and not one.dense_layers]
    if lacking and not conf.model.retrieval_layers:
        instead = "recipe=lrsa_uniform" if "attention" in lacking else f"{lacking[0]}.budget=uniform"
        return [
            f"{' and '.join(f'{where}.budget=concentrated' for where in lacking)} leave model.retrieval_layers their "
            f"whole cache, and model.name={conf.model.name} has none: take {instead}, or name them, the neediest "
            "first, as `lrsa-eval mode=layers` ranks them: 'model.retrieval_layers=[...]'"
        ]
    return [problem for where, one in both.items() for problem in _with_recipe(where, one)]


def _with_recipe(where: str, conf: AttentionConf) -> Iterator[str]:
    of_budget = conf.budget == "concentrated" and not problems_of(where, replace(conf, budget="uniform"))
    for problem in problems_of(where, conf):
        yield f"{problem} (recipe=lrsa sets that budget, recipe=lrsa_uniform does not)" if of_budget else problem


def one_question(
    where: str, conf: AttentionConf, used: bool, parts: str, examples: Mapping[str, ExamplesConf]
) -> Iterator[str]:
    """A row that is compressed once, at the end of its prompt, has one answer. (Conversations are found when read.)"""
    for name, part in examples.items():
        if used and conf.schedule == ONCE and part.questions > 1 and not part.apart:
            yield (
                f"{where}.schedule={ONCE} compresses at the end of the prompt, and a row of {parts}.{name}.questions="
                f"{part.questions} has no one end: set {parts}.{name}.questions=1, or {where}.schedule=chunked"
            )


def scored_once(conf: EvaluationConf) -> Iterator[str]:
    compressed = any(factor != 1 for factor in conf.compressions)
    yield from one_question("evaluation.attention", conf.attention, compressed, "evaluation.tasks", conf.tasks)


def lm_eval_once(conf: EvaluationConf) -> Iterator[str]:
    if conf.attention.schedule == ONCE:
        yield (
            f"evaluation.attention.schedule={ONCE} does not work with mode=lm_eval, whose likelihood requests do not "
            "say where a prompt ends: use mode=generate or mode=score, or schedule=chunked"
        )


def looks_ahead(conf: AttentionConf) -> Iterator[str]:
    if conf.scorer in SCORERS and SCORERS[conf.scorer].reads_future:
        yield (
            f"attention.scorer={conf.scorer} looks ahead in the prompt, which no cache can: what was trained with it "
            f"would rely on that. Train with another, evaluate with it: attention@evaluation.attention={conf.scorer}"
        )


def _mask_form_only(conf: AttentionConf) -> str | None:
    """The reason where it is so. What is wrong with the attention otherwise is `problems_of`'s to report."""
    with contextlib.suppress(ValueError):
        config = from_conf(conf)
        return None if config is None else config.mask_form_only
    return None


def backend(model: ModelConf, where: str, conf: AttentionConf) -> Iterator[str]:
    reason = _mask_form_only(conf)
    if reason and model.attention_backend not in ("auto", "reference"):
        yield f"model.attention_backend={model.attention_backend} cannot compute {where}: {reason}; set it to auto"


def needs_a_cache(conf: EvalConf) -> Iterator[str]:
    reason, by_a_peer = _mask_form_only(conf.evaluation.attention), conf.mode == "generate" and conf.generate.peer
    if reason and not by_a_peer and any(factor != 1 for factor in conf.evaluation.compressions):
        yield f"mode={conf.mode} needs a cache, which cannot hold evaluation.attention: {reason}; use mode=score"


def warn_if_tested_unlike(conf: TrainConf) -> None:
    """Of a model that is trained with its tokens shared out one way over the layers, and tested with another."""
    trained, tested = conf.attention, conf.evaluation.attention
    compressions = conf.recipe.compressions, conf.evaluation.compressions
    compressed = all(any(factor != 1 for factor in factors) for factors in compressions)
    if not conf.recipe.train or not compressed or None in (from_conf(trained), from_conf(tested)):
        return
    if (trained.budget, list(trained.dense_layers)) != (tested.budget, list(tested.dense_layers)):
        warnings.warn(
            f"attention.budget={trained.budget} with dense_layers={list(trained.dense_layers)} in training, but "
            f"evaluation.attention.budget={tested.budget} with dense_layers={list(tested.dense_layers)} when tested: "
            "set both alike, or mean it (recipe=lrsa sets both, recipe=lrsa_uniform neither)",
            ConfigWarning,
            stacklevel=3,
        )


def warn_evaluation(conf: EvaluationConf, length: int | None) -> None:
    warn_if_dense(
        "evaluation.attention", conf.attention, "evaluation.length", conf.length or length or 0, conf.compressions
    )


def warn_if_dense(where: str, conf: AttentionConf, name: str, length: int, factors: Sequence[float]) -> None:
    if from_conf(conf) is None or all(factor == 1 for factor in factors):
        return
    lags = 1 if conf.schedule == ONCE else 2
    first = conf.sink_size + lags * conf.lag_size
    if length <= first:
        warnings.warn(
            f"{name}={length} never compresses: {where} keeps the first sink_size + {lags} * lag_size = "
            f"{conf.sink_size} + {lags} * {conf.lag_size} = {first} tokens, so everything is dense; lengthen the "
            "samples or lower lag_size",
            ConfigWarning,
            stacklevel=4,
        )
    empty = [factor for factor in factors if factor > conf.lag_size and conf.schedule != ONCE]
    if empty:
        warnings.warn(
            f"compressions {empty} keep nothing of a partition of {where}.lag_size={conf.lag_size} tokens",
            ConfigWarning,
            stacklevel=4,
        )
