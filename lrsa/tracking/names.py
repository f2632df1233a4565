"""How a run is listed in W&B: flat config keys to filter and group by, its job type, its tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrsa.config import LoggerConf
from lrsa.results import Record

JOB_TYPES = {"lrsa-train": "train", "lrsa-eval": "eval", "lrsa-bench": "bench"}
_ATTENTION = ("scorer", "keep_ratio", "lag_size", "sink_size", "chunk_size", "top_k", "budget", "schedule")


def flat_config(record: Record) -> dict[str, Any]:
    """The settings that runs are told apart by, one level deep; None where a command has no such setting.

    `scorer` and its geometry are what the model was trained with in `lrsa-train`, what is applied at inference in
    `lrsa-eval`; `eval_scorer` is always the latter. `compressions` are those trained at, `eval_compressions` those
    scored at. `record_id` is the record's: the same id is the same experiment.
    """
    config = record.config
    evaluation = _group(config, "evaluation")
    applied = _group(evaluation, "attention")
    attention = _group(config, "attention") or applied
    recipe = _group(config, "recipe")
    return {
        "study": record.study,
        "arm": record.arm,
        "seed": record.seed,
        "command": record.command,
        "record_id": record.id,
        "model_name": _group(config, "model").get("name"),
        **{name: attention.get(name) for name in _ATTENTION},
        "dense_layers": _joined(attention.get("dense_layers")) or None,  # without: not there, as others
        "compressions": _joined(recipe.get("compressions")),
        "eval_scorer": applied.get("scorer"),
        "eval_compressions": _joined(evaluation.get("compressions")),
        "tasks": _joined(_group(evaluation, "tasks")),
        "length": _group(config, "data").get("length") or evaluation.get("length"),
        "git_commit": record.git.get("commit"),
    }


def listed_config(record: Record) -> dict[str, Any]:
    """`flat_config`, and the resolved config in its groups, which W&B shows as `recipe.learning_rate` and so on."""
    return {**record.config, **{name: value for name, value in flat_config(record).items() if value is not None}}


def tags(conf: LoggerConf, record: Record) -> list[str]:
    """The user's, the study and the arm, each once; W&B refuses tags that are empty or over 64 characters."""
    return list(dict.fromkeys(tag[:64] for tag in (*conf.tags, record.study, record.arm) if tag))


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return config.get(name) or {}


def _joined(values: Sequence[Any] | Mapping[str, Any] | None) -> str | None:
    """`2,4,8`: W&B filters a text, not a list."""
    if values is None:
        return None
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
