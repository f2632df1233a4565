"""Arguments of lm-eval's model `lrsa` that come as text: which attention, which dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lrsa.attention import SparseAttentionConfig
from lrsa.evaluation.errors import EvaluationInputError

DTYPES = ("float32", "bfloat16", "float16")


def choose_attention(
    stored: SparseAttentionConfig | None, attention: str = "stored", compression: float | None = None, **wanted: Any
) -> SparseAttentionConfig | None:
    """`wanted` fields over `stored` ones; None, dense attention, for `attention="dense"` and compression 1.

    Another scorer than the stored one starts from its own default arguments.

    Raises:
        EvaluationInputError: an unknown `attention`, or arguments that contradict each other.
        ValueError: as `SparseAttentionConfig`.
    """
    if attention not in ("stored", "dense"):
        raise EvaluationInputError(
            f"attention={attention!r} is unknown: stored or dense; a rule is named by scorer=..."
        )
    asked = [name for name, value in (("compression", compression), *wanted.items()) if value is not None]
    if attention == "dense":
        if asked:
            raise EvaluationInputError(f"attention=dense has no {', '.join(asked)}: leave these out, or attention")
        return None
    amounts = [name for name in asked if name in ("compression", "keep_ratio", "top_k")]
    if len(amounts) > 1:
        raise EvaluationInputError(f"{' and '.join(amounts)} all say how much is kept: give one of them")
    if not asked:
        return stored
    base = stored or SparseAttentionConfig()
    if amounts:
        base = replace(base, keep_ratio=None, top_k=None)
    if wanted.get("scorer", base.scorer) != base.scorer:
        base = replace(base, scorer=wanted["scorer"], scorer_args={})
    if "dense_layers" in wanted:
        wanted["dense_layers"] = _numbers(wanted["dense_layers"])
    chosen = replace(base, **wanted)
    return chosen if compression is None else chosen.with_compression(compression)


def _numbers(value: Any) -> tuple[int, ...]:
    """`0:-1` of an argument string, a number, or a sequence of numbers."""
    try:
        return tuple(int(item) for item in (str(value).split(":") if isinstance(value, str | int) else value))
    except ValueError as error:
        raise EvaluationInputError(
            f"dense_layers={value!r}: layer numbers with a colon between, such as 0:-1"
        ) from error


def choose_dtype(value: str | torch.dtype) -> torch.dtype:
    """A dtype by name, `float32`, or as it is. EvaluationInputError for others than `DTYPES`."""
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise EvaluationInputError(f"dtype={name!r} is unknown; choose one of {', '.join(DTYPES)}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
