"""kvpress' presses, as they come: `lrsa-eval mode=generate generate.peer=kvpress/SnapKVPress evaluation.batch_size=1`.

A press compresses once, at the end of a prefill, by hooks on the model's own attention. As in kvpress' own pipeline the
prefill is the context; the question is read over what is left of it, and nothing is compressed after that. It counts
what is *removed*: nominal 4x is its compression_ratio 0.75. What it keeps is measured.

kvpress needs transformers < 5.3, so this runs in an environment of its own: `pip install 'lrsa[peers]'`, or what
`make test-peers` builds.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrsa.cache import prefill
from lrsa.evaluation.errors import EvaluationInputError

PREFIX = "kvpress/"


def build_press(name: str, compression: float, args: Mapping[str, Any]) -> Any:
    """The press `kvpress/<Press>` at nominal `compression`; use it as `with press(model):` around the prefill.

    Raises:
        EvaluationInputError: kvpress is not here, or has no such press or argument; says what there is.
    """
    if not name.startswith(PREFIX):
        raise EvaluationInputError(f"peer {name!r} is unknown: kvpress/<Press>, such as kvpress/SnapKVPress")
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as error:
        raise EvaluationInputError(
            f"{name} needs kvpress, which cannot be imported here ({error}). It needs transformers < 5.3: make an "
            "environment of its own, `pip install 'lrsa[peers]'` there, and run this command in it"
        ) from error
    valid = sorted(x for x in dir(kvpress) if x.endswith("Press") and x != "BasePress")
    if name.removeprefix(PREFIX) not in valid:
        raise EvaluationInputError(f"kvpress has no {name.removeprefix(PREFIX)!r}; it has {', '.join(valid)}")
    press = getattr(kvpress, name.removeprefix(PREFIX))
    known = {field.name for field in dataclasses.fields(press)}
    if "compression_ratio" not in known:
        raise EvaluationInputError(f"{name} has no compression_ratio of its own: wrap it in Python instead")
    unknown = sorted(set(args) - known)
    if unknown:
        raise EvaluationInputError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    return press(**{"compression_ratio": 1 - 1 / compression, **args})


@torch.no_grad()
def prefill_under(press: Any, model: PreTrainedModel, input_ids: Tensor, cache: Any, context: int) -> Tensor:
    """Read the first ``context`` of ``input_ids [1, T]`` under ``press``, the rest after it; logits ``[1, V]``.

    0, or a context that leaves nothing: all but the last token. Positions go on from what was read, not from what was
    kept.
    """
    tokens = input_ids.shape[1]
    context = context if 0 < context < tokens else tokens - 1
    with press(model):
        prefill(model, input_ids[:, :context], cache)
    positions = torch.arange(context, tokens, device=input_ids.device)[None]
    out = model(input_ids=input_ids[:, context:], position_ids=positions, past_key_values=cache, use_cache=True)
    logits: Tensor = out.logits[:, -1]
    return logits


def press_fields(name: str) -> set[str]:
    """Arguments that the press takes."""
    return {field.name for field in dataclasses.fields(build_press(name, 2, {}))}
