"""Prompts of a committed record, put together again."""

import copy
from pathlib import Path

import pytest

from lrsa.evaluation.examples import find_example
from lrsa.models import load_tokenizer
from lrsa.results import Record


@pytest.fixture(scope="module")
def record(repository: Path) -> Record:
    return Record.load(repository / "experiments" / "demo" / "records" / "lrsa-seed0")


def fingerprint(record: Record) -> str:
    return str(next(cell["data_fingerprint"] for cell in record.cells if cell["compression"] == 4))


def test_an_example_of_the_demo_is_what_its_record_scored(record: Record) -> None:
    tokenizer = load_tokenizer("recall-tiny")
    found = find_example(record.config, tokenizer, "recall", "needles-00017-0", fingerprint(record))
    asked = found.prompt.rpartition("recall the code of ")[2].strip()
    value = found.prompt.partition(f"the code of {asked} is ")[2].partition(" .")[0]
    assert found.answer == value and found.reference == f"{value} <end>", "the answer stands in the context"
    outcome = next(row for row in record.outcomes() if row["id"] == "needles-00017-0")
    assert len(tokenizer(found.reference)["input_ids"]) == outcome["tokens"]


def test_what_is_not_there_or_has_changed_is_named(record: Record) -> None:
    tokenizer = load_tokenizer("recall-tiny")
    with pytest.raises(ValueError, match="no task 'squad'; its tasks: recall"):
        find_example(record.config, tokenizer, "squad", "x")
    with pytest.raises(ValueError, match="no example 'needles-99999-0'"):
        find_example(record.config, tokenizer, "recall", "needles-99999-0")
    changed = copy.deepcopy(record.config)
    changed["evaluation"]["tasks"]["recall"]["seed"] = 7
    with pytest.raises(ValueError, match="no longer those of the record"):
        find_example(changed, tokenizer, "recall", "needles-00017-0", fingerprint(record))
