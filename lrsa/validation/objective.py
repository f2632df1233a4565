"""What a recipe's objective and schedule rule out, alone and beside the attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lrsa.attention.config import ONCE
from lrsa.attention.straight_through import DIFFERENTIABLE
from lrsa.config import AttentionConf, DistillationConf, RecipeConf
from lrsa.training.distillation import SELF
from lrsa.training.schedule import ANNEALED, SCHEDULES


def problems_of(conf: RecipeConf, attention: AttentionConf) -> Iterator[str]:
    """Of `recipe.schedule`, `recipe.score_noise`, `recipe.random_share` and `recipe.distillation`."""
    dense = _never_compresses(conf, attention)
    yield from _schedule(conf)
    yield from _noise(conf, attention, dense)
    yield from _straight_through(conf, attention, dense)
    yield from _distillation(conf.distillation, dense)


def _never_compresses(conf: RecipeConf, attention: AttentionConf) -> str | None:
    """The settings under which every step attends densely; None where some step compresses."""
    if attention.scorer == "dense":
        return "attention.scorer=dense"
    if conf.compressions and all(factor == 1 for factor in conf.compressions):
        return f"recipe.compressions={list(conf.compressions)}"
    return None


def _schedule(conf: RecipeConf) -> Iterator[str]:
    count = len(conf.compressions)
    if conf.schedule not in SCHEDULES:
        yield f"recipe.schedule={conf.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
    elif conf.schedule == ANNEALED and count < 2:
        yield (
            f"recipe.schedule={ANNEALED} goes from one compression to the next, but recipe.compressions="
            f"{list(conf.compressions)}: give two or more in their order, such as [1,2,4,8], or recipe.schedule=drawn"
        )
    elif conf.schedule == ANNEALED and count > conf.steps:
        yield (
            f"recipe.schedule={ANNEALED} shares recipe.steps={conf.steps} out to {count} recipe.compressions: a step "
            "each at least; raise the steps, or give fewer compressions"
        )


def _noise(conf: RecipeConf, attention: AttentionConf, dense: str | None) -> Iterator[str]:
    if not 0 <= conf.score_noise < math.inf:
        yield (
            f"recipe.score_noise={conf.score_noise}: a scale of at least 0 (no noise), 1 to keep tokens in proportion "
            "to their scores; to keep them at random, recipe.random_share=1"
        )
    if not 0 <= conf.random_share <= 1:
        yield f"recipe.random_share={conf.random_share}: a share of the steps, 0 to 1"
    elif conf.random_share == 1 and conf.score_noise > 0:
        yield f"recipe.score_noise={conf.score_noise} is never used with recipe.random_share=1: leave one of them 0"
    for name in ("score_noise", "random_share"):
        value = getattr(conf, name)
        if value > 0 and dense:
            yield (
                f"recipe.{name}={value} acts on what a selection keeps, but {dense} keeps everything: choose a sparse "
                f"attention and a compression above 1, or recipe.{name}=0"
            )
        elif value > 0 and attention.top_k == 0 and not conf.compressions:
            yield (
                f"recipe.{name}={value} acts on what a selection keeps, but attention.top_k=0 keeps nothing of a "
                f"partition: raise it, or recipe.{name}=0"
            )


def _straight_through(conf: RecipeConf, attention: AttentionConf, dense: str | None) -> Iterator[str]:
    if not conf.straight_through:
        return
    where = "recipe.straight_through=true gives the scores of kept tokens a gradient"
    if dense:
        yield f"{where}, but {dense} keeps everything: choose a sparse attention that compresses, or set it false"
    elif attention.scorer not in DIFFERENTIABLE:
        yield (
            f"{where}, and those of attention.scorer={attention.scorer} have none: choose one of "
            f"{', '.join(DIFFERENTIABLE)}, or set it false"
        )
    if attention.budget == "adaptive" or attention.schedule == ONCE:
        yield (
            f"{where} in gather and flex alone, not with attention.budget={attention.budget} and attention.schedule="
            f"{attention.schedule}: choose budget=uniform and schedule=chunked, or set it false"
        )
    if conf.random_share == 1:
        yield f"{where}, which no step asks for with recipe.random_share=1: set one of them to its default"


def _distillation(conf: DistillationConf, dense: str | None) -> Iterator[str]:
    where = "recipe.distillation"
    if not 0 <= conf.weight <= 1:
        yield f"{where}.weight={conf.weight}: the KL's share of the loss, 0 (none) to 1 (no cross-entropy)"
    if not 0 <= conf.hidden < math.inf:
        yield f"{where}.hidden={conf.hidden}: a weight of at least 0 (hidden states are not compared)"
    if not 0 < conf.temperature < math.inf:
        yield f"{where}.temperature={conf.temperature}: above 0, 1 for the distributions as they are"
    if not conf.teacher:
        yield f"{where}.teacher='': {SELF}, a folder with a model, or a hub id"
    taught = conf.weight > 0 or conf.hidden > 0
    if taught and conf.teacher == SELF and dense:
        yield (
            f"{where}.teacher={SELF} teaches what full attention sees, but {dense} trains with full attention already: "
            f"choose a sparse attention and a compression above 1, another teacher, or {where}.weight=0"
        )
    if not taught and conf.teacher != SELF:
        yield (
            f"{where}.teacher={conf.teacher} is never asked: set {where}.weight or {where}.hidden above 0, or "
            f"{where}.teacher={SELF}"
        )
