"""What a journal gives back, and to which column."""

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lrsa.evaluation.cells import Column
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.journal import JOURNAL_FILE, Finished, Journal, differences, weights_fingerprint
from lrsa.evaluation.progress import CellProgress


@dataclass(frozen=True)
class Key:
    key: tuple[Any, ...]


def test_what_was_added_is_given_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"outcomes": [{"nll": 0.1 + 0.2, "text": "naïve \ud83d\n\u2028", "none": None, "nan": float("nan")}]}
    first, other = Key(("needles", 4.0)), Key(("needles", None))
    with Journal(tmp_path, {"a": {"b": 1}}) as journal:
        column = journal.column(first)
        assert column.get([3, 1]) is None and column.add([3, 1], **values) == values
        lines = (tmp_path / JOURNAL_FILE).read_text().splitlines()
        assert len(lines) == 2 and json.loads(lines[0]) == {"identity": {"a": {"b": 1}}}, "on disk at once"
    (tmp_path / "new").mkdir()
    with Journal(tmp_path / "new", {"a": {"b": 1}}, resume=tmp_path) as again:
        column = again.column(first)
        assert (again.batches, column.rows) == (1, 2) and column.seconds >= 0
        found = column.get([3, 1])
        assert found is not None and math.isnan(found["outcomes"][0].pop("nan"))
        assert found["outcomes"][0] == {k: v for k, v in values["outcomes"][0].items() if k != "nan"}
        assert column.get([1, 3]) is None and again.column(other).get([3, 1]) is None
        again.column(other).add([0])
    with Journal(tmp_path / "new", {"a": {"b": 1}}, resume=tmp_path / "new") as third:
        assert third.batches == 2
        third.remove()
    assert list((tmp_path / "new").iterdir()) == [] and (tmp_path / JOURNAL_FILE).exists()


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with Journal(tmp_path, {}) as journal:
            assert journal.batches == 0
            journal.column(Key(("a",))).add([0])
    with pytest.raises(EvaluationInputError, match="a was None, is 1; repeat that run's command"):
        Journal(tmp_path, {"a": 1}, resume=tmp_path)


def test_every_difference_is_named() -> None:
    before = {"a": {"b": [1, 2], "c": "x"}, "d": 1, "e": None}
    assert list(differences(before, {"a": {"b": [1, 3], "c": "x"}, "e": 2, "f": 0})) == [
        "a.b was [1, 2], is [1, 3]",
        "d was 1, is None",
        "e was None, is 2",
        "f was None, is 0",
    ]
    assert list(differences(before, copy.deepcopy(before))) == []


def test_a_column_is_told_by_task_and_compression() -> None:
    column = Column("needles", [], None, 4.0)
    keys = {column.key, replace(column, task="squad").key, replace(column, compression=None).key}
    assert len(keys) == 3 and replace(column, samples=[]).key == column.key


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    before = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == before
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(9.0, dtype=dtype))
    assert weights_fingerprint(model) != before, "by the last bit of one weight"


def test_the_bar_goes_on_where_it_was() -> None:
    with CellProgress("scoring", False) as bar:
        bar.start("needles", 10, Finished(lines=[{"batch": [0, 1, 2], "seconds": 1.0}]).rows)
        bar.advance(2, 100)
        assert bar._bar.tasks[0].completed == 5 and bar._bar.tasks[0].total == 10
