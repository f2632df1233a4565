"""In what the configs of runs differ, and names that say it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrsa.results.keys import flat
from lrsa.results.record import NOT_IN_ID, Record
from lrsa.results.store import Setting

ABSENT = "absent"  # stands for a key that a config does not have
# names of a run, and what seeds are: arms are the same where these differ
_NOT_OF_AN_ARM = ("run.arm", "run.name", "run.seed", "run.study", *NOT_IN_ID)


def shown(value: Any) -> str:
    """A leaf as a config would write it: `null`, `0.25`, `[1, 2]`, text bare."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """The dotted keys whose values are not the same in all records' configs, each with its value in every record, as
    `shown`; `absent` where a config does not have it. Where a run was written is left out.
    """
    configs = [{key: shown(value) for key, value in flat(record.config).items()} for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    return {
        key: values
        for key in keys
        if not _below(key, NOT_IN_ID) and len(set(values := [config.get(key, ABSENT) for config in configs])) > 1
    }


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each dotted key that no other has."""
    ends = Counter(".".join(key.split(".")[-depth:]) for key in keys for depth in range(1, key.count(".") + 2))
    return {
        key: next(
            end
            for depth in range(1, key.count(".") + 2)
            if ends[end := ".".join(key.split(".")[-depth:])] == 1 or end == key
        )
        for key in keys
    }


def told_apart(records: Sequence[Record], but: Sequence[str] = ()) -> list[Record]:
    """The records, arms renamed where several experiments of one arm measured the same cell with the same seed, as a
    sweep over a knob does: `lrsa` becomes `lrsa lag_size=64`, `lrsa lag_size=128`. Other arms keep their names. What
    differs in the keys `but` stays together.
    """
    renamed: dict[int, str] = {}
    for arm in dict.fromkeys(record.arm for record in records):
        members = [index for index, record in enumerate(records) if record.arm == arm]
        if _claims_collide([records[index] for index in members]):
            for index, name in zip(members, _names([records[index] for index in members], but), strict=True):
                renamed[index] = f"{arm} {name}".strip()
    return [replace(record, arm=renamed.get(index, record.arm)) for index, record in enumerate(records)]


def _claims_collide(records: Sequence[Record]) -> bool:
    claims: dict[tuple[str, Setting, int], str] = {}
    return any(
        claims.setdefault((cell["task"], Setting.of(cell), record.seed), record.id) != record.id
        for record in records
        for cell in record.cells
    )


def knobs(records: Sequence[Record]) -> dict[str, list[str]]:
    """Of `differences`, what was turned: neither seeds nor names of runs, and of keys that move together the first."""
    kept: dict[str, list[str]] = {}
    for key, values in differences(records).items():
        if not _below(key, _NOT_OF_AN_ARM) and values not in kept.values():  # evaluation.attention follows attention
            kept[key] = values
    return kept


def _names(records: Sequence[Record], but: Sequence[str]) -> list[str]:
    """`lag_size=64 scorer=snapkv` of each record."""
    kept = {key: values for key, values in knobs(records).items() if key not in but}
    names = short_names(list(kept))
    return [" ".join(f"{names[key]}={values[index]}" for key, values in kept.items()) for index in range(len(records))]


def _below(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
