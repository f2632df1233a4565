"""What a config rules out, or hardly means, once the model that it names is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lrsa.attention import DENSE
from lrsa.config import AttentionConf, EvalConf, TrainConf
from lrsa.validation.problems import ConfigError, ConfigWarning


def check_context_window(model_config: Any, length: int | None) -> None:
    """Warn when samples are longer than what the loaded model's positions were made for."""
    window = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if window is not None and length is not None and length > window:
        warnings.warn(
            f"samples of {length} tokens exceed the model's max_position_embeddings={window}: shorten data.length, or "
            "extend it with model.rope_scaling={rope_type: yarn, factor: ...}",
            ConfigWarning,
            stacklevel=2,
        )


def check_ranking(conf: TrainConf | EvalConf, model_config: Any) -> None:
    """Of layers that are spared because another model needs them: `model.ranked_on` says which they were ranked on.

    Raises:
        ConfigError: `model.retrieval_layers` share out a budget on a model that differs in a field of `ranked_on`.
    """
    used = [where for where, one in _compressing(conf).items() if _spares(one, conf.model.retrieval_layers)]
    config, ranked_on = model_config.get_text_config(), conf.model.ranked_on or {}
    has = {field: getattr(config, field, None) for field in ranked_on}
    if used and has != ranked_on:
        instead = "recipe=lrsa_uniform" if "attention" in used else "evaluation.attention.budget=uniform"
        raise ConfigError(
            f"{' and '.join(f'{where}.dense_layers' for where in used)} are model.retrieval_layers="
            f"{list(conf.model.retrieval_layers)}, ranked on a model of {_fields(ranked_on)}, but model.name="
            f"{conf.model.name} has {_fields(has)}: rank its own layers (lrsa-eval mode=layers "
            f"model.name={conf.model.name} ...) and pass 'model.retrieval_layers=[...]' model.ranked_on=null, "
            f"or take {instead}"
        )


def warn_unlike_saved(conf: EvalConf, saved: Mapping[str, Any] | None, depth: int) -> None:
    """Warn when a model is compressed by another budget, or with other layers dense, than it says it was trained with.

    saved: the checkpoint's attention as `SparseAttentionConfig.to_dict`; None for a model that was not trained with
    one. depth: its layers.
    """
    attention = _compressing(conf).get("evaluation.attention")
    by_a_peer = conf.mode == "generate" and conf.generate.peer is not None
    if saved is None or attention is None or attention.scorer == DENSE or conf.mode == "layers" or by_a_peer:
        return
    budget, layers = saved.get("budget", "uniform"), list(saved.get("dense_layers", ()))
    if (budget, _which(budget, layers, depth)) == (
        attention.budget,
        _which(attention.budget, attention.dense_layers, depth),
    ):
        return
    warnings.warn(
        f"model.name={conf.model.name} was saved with budget={budget}, dense_layers={layers}, and is evaluated with "
        f"evaluation.attention.budget={attention.budget}, dense_layers={list(attention.dense_layers)}; as it was "
        f"trained: evaluation.attention.budget={budget} 'evaluation.attention.dense_layers="
        f"[{','.join(map(str, layers))}]'",
        ConfigWarning,
        stacklevel=2,
    )


def _compressing(conf: TrainConf | EvalConf) -> dict[str, AttentionConf]:
    """The attentions that something is trained or evaluated with, by where they stand."""
    used = {"attention": conf.attention} if isinstance(conf, TrainConf) and conf.recipe.train else {}
    if any(factor != 1 for factor in conf.evaluation.compressions):
        used["evaluation.attention"] = conf.evaluation.attention
    return used


def _spares(attention: AttentionConf, layers: Sequence[int]) -> bool:
    return attention.budget == "concentrated" and attention.scorer != DENSE and attention.dense_layers == list(layers)


def _which(budget: str, layers: Sequence[int], depth: int) -> list[int]:
    """Counted from the first; in their order where it says which of them are dense."""
    counted = [layer % depth for layer in layers]
    return counted if budget == "concentrated" else sorted(set(counted))


def _fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
