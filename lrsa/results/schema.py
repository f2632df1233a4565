"""What a record holds, and a check that names the field that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERSION = 1
STATUSES = ("running", "finished", "failed")

Number = (int, float)
Text = (str,)
MaybeNumber = (int, float, type(None))
MaybeText = (str, type(None))
MaybeList = (list, type(None))

# A tuple: the types allowed. A mapping: its fields, `name?` if it may be absent; others are allowed. A list: of such
# items. A function: of the value, what it should be.
CELL: dict[str, Any] = {
    "task": Text,
    "compression": MaybeNumber,  # 1: full cache; null: no context, the floor
    "context?": Text,  # full, none, gold (its gold documents alone); absent: full, or none where compression is null
    "n": (int,),
    "exact": Number,  # fraction of examples, token for token
    "exact_low": Number,
    "exact_high": Number,
    "nll?": MaybeNumber,  # nats an answer token; of scored references
    "exact_match?": Number,  # normalised, any reference, as SQuAD; this and what follows it of generated answers
    "exact_match_low?": Number,
    "exact_match_high?": Number,
    "f1?": Number,
    "f1_low?": Number,
    "f1_high?": Number,
    "rouge_l?": Number,
    "rouge_l_low?": Number,
    "rouge_l_high?": Number,
    "string_match?": Number,  # RULER's: share of the references found, or any of them (question answering)
    "string_match_low?": Number,
    "string_match_high?": Number,
    "max_new_tokens?": (int,),
    "prefilled_tokens?": (int,),  # of all prompts as they were read, a context that questions share once
    "generated_tokens?": Number,  # mean of an answer, the stop token included
    "hit_limit?": Number,  # fraction of answers that were cut at max_new_tokens
    "length?": MaybeNumber,  # prompt tokens
    "slots?": MaybeNumber,  # KV slots a head holds after the prompt, by the closed form
    "measured_ratio?": MaybeNumber,  # full cache / kept
    "kv_bytes_per_layer?": MaybeList,
    "kept_per_layer?": MaybeList,
    "cache_slots?": Number,  # the same after reading the prompts in fact
    "cache_ratio?": Number,
    "cache_bytes?": Number,
    "cache_buffer_bytes?": Number,  # what the cache had reserved besides
    "seconds?": MaybeNumber,
    "tokens_per_second?": MaybeNumber,
    "data_fingerprint?": MaybeText,
}

_EXACT = ("exact", "exact_low", "exact_high")
POSITIONS: dict[str, Any] = {"positions": [(int,)], "nll": Number}  # half-open; of prose, which answers nothing
POSITION_CELL = {
    **{name: spec for name, spec in CELL.items() if name not in (*_EXACT, "nll?")},
    **POSITIONS,
    "nll_low": Number,
    "nll_high": Number,
}


def cell_spec(value: Any) -> dict[str, Any]:
    """What a cell holds: of answers, or of prose by position."""
    return POSITION_CELL if isinstance(value, Mapping) and "positions" in value else CELL


RECORD: dict[str, Any] = {
    "schema": (int,),
    "id": Text,  # hash of the resolved config: the same id is the same experiment
    "status": Text,
    "attempt": (int,),  # 1, and one more each time a run was started again in this folder
    "command": Text,
    "study": Text,
    "arm": Text,
    "seed": (int,),
    "started": Text,  # UTC, ISO 8601
    "finished": MaybeText,
    "wall_s": MaybeNumber,
    "config": (dict,),
    "overrides": [Text],
    "git": {"commit": MaybeText, "dirty": (bool, type(None))},
    "versions": (dict,),
    "hardware": (dict,),
    "data": [{"name": Text, "fingerprint": Text, "n": (int,), "template": MaybeText}],
    "training": (
        dict,
        type(None),
    ),  # steps, tokens, seconds, step_ms_median, peak_memory_bytes, loss_curve {step, loss}; kl, hidden of distillation
    "metrics": (dict,),
    "protocol?": (dict, type(None)),  # how answers were made: template, stop tokens, decoding, truncation, cache
    "cells": [cell_spec],
    "error": (dict, type(None)),  # type, message, traceback
}

OUTCOME: dict[str, Any] = {
    "task": Text,
    "id": Text,
    "compression": MaybeNumber,
    "context?": Text,
    "exact": (bool,),
    "nll?": MaybeNumber,
    "tokens": (int,),  # of the reference
    "depth?": MaybeNumber,  # where the one gold passage starts, 0 to 1 of the context
    "exact_match?": (bool,),  # this and what follows it of generated answers
    "f1?": Number,
    "rouge_l?": Number,
    "string_match?": Number,
    "text?": Text,
    "generated_tokens?": (int,),
    "hit_limit?": (bool,),
}
POSITION_OUTCOME = {
    **{name: spec for name, spec in OUTCOME.items() if name not in (*_EXACT, "nll?")},
    **POSITIONS,
}


def outcome_spec(value: Any) -> dict[str, Any]:
    """What an outcome holds: of an answer, or of a stretch of prose."""
    return POSITION_OUTCOME if isinstance(value, Mapping) and "positions" in value else OUTCOME


def check(value: Any, spec: Any, field: str = "") -> None:
    """Raises ValueError, naming the field and what it holds, where `value` is not as `spec` says."""
    if callable(spec):
        spec = spec(value)
    if isinstance(spec, tuple):
        # bool is an int to Python, not to a reader of the record
        if not isinstance(value, spec) or (isinstance(value, bool) and bool not in spec):
            raise ValueError(f"field '{field}': expected {_names(spec)}, found {_shown(value)}")
    elif isinstance(spec, list):
        check(value, (list,), field)
        for index, item in enumerate(value):
            check(item, spec[0], f"{field}[{index}]")
    else:
        if not isinstance(value, Mapping):
            raise ValueError(
                f"field '{field}': expected a mapping, found {_shown(value)}"
                if field
                else f"expected a mapping, found {_shown(value)}"
            )
        for key, item_spec in spec.items():
            name = key.removesuffix("?")
            path = f"{field}.{name}" if field else name
            if name in value:
                check(value[name], item_spec, path)
            elif name == key:
                raise ValueError(f"field '{path}' is missing")


def check_record(value: Any) -> None:
    """Raises ValueError naming the field, for anything that is not a record of this version."""
    check(value, {"schema": (int,)})
    if value["schema"] != VERSION:
        raise ValueError(f"field 'schema': this version of lrsa reads {VERSION}, found {value['schema']}")
    check(value, RECORD)
    if value["status"] not in STATUSES:
        raise ValueError(f"field 'status': expected one of {', '.join(STATUSES)}, found {_shown(value['status'])}")


def _names(spec: tuple[type, ...]) -> str:
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "a mapping",
        type(None): "null",
    }
    return " or ".join(words[kind] for kind in spec if not (kind is int and float in spec))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
