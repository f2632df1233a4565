"""Worked by hand from RULER's definition, and through generated answers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import SampleSet
from lrsa.evaluation import generate
from lrsa.evaluation.generate import LISTED, MARGIN, generate_answers, token_limit
from lrsa.evaluation.string_match import string_match, string_match_all, string_match_part
from tests.data.conftest import byte_level


@pytest.mark.parametrize(
    ("prediction", "references", "share", "best"),
    [
        ("The numbers are 12, 34 and 56.", ["12", "34", "56", "78"], 3 / 4, 1.0),
        ("It was PARIS, of course", ["paris"], 1.0, 1.0),
        ("Paris", ["Rome", "paris"], 1 / 2, 1.0),
        ("a\x00b", ["a\nb", "ab"], 1 / 2, 1.0),  # control characters become line breaks
        ("a\tb", ["a b"], 0.0, 0.0),
        ("1234567", ["345"], 1.0, 1.0),  # anywhere, also inside a word
        ("  \n yes \x1f", ["yes"], 1.0, 1.0),
        ("", ["yes", "no"], 0.0, 0.0),
        ("12", ["123", "12 "], 0.0, 0.0),  # references are taken as they are
        ("one two", ["two", "one", "two"], 1.0, 1.0),  # order does not matter
    ],
)
def test_string_match(prediction: str, references: list[str], share: float, best: float) -> None:
    assert string_match_all(prediction, references) == string_match(prediction, references, True) == share
    assert string_match_part(prediction, references) == string_match(prediction, references, False) == best


@pytest.mark.parametrize("metric", [string_match_all, string_match_part])
def test_references_are_a_list_without_blanks(metric: Any) -> None:
    for references in ([], (), "Paris"):
        with pytest.raises(ValueError, match="give a list of at least one text"):
            metric("Paris", references)
    with pytest.raises(ValueError, match="a blank one stands in every answer"):
        metric("Paris", ["Paris", " "])


VALUES = {"keys": 3, "values": 2, "queries": 2, "key_type": "words", "value_type": "words"}


@pytest.mark.parametrize(
    ("says", "string_match", "f1", "exact"),
    [("all", 1.0, 1.0, True), ("half", 1 / 2, 2 / 3, False), ("other order", 1.0, 1.0, False), ("no", 0.0, 0.0, False)],
)
def test_answers_of_several_parts(says: str, string_match: float, f1: float, exact: bool, model, monkeypatch) -> None:
    """The four values of two keys are asked for; what the model would say is put in its mouth."""
    tokenizer = byte_level()
    data = SampleSet(ExamplesConf(source="niah", limit=3, args=VALUES), tokenizer, 600)
    samples = list(data)
    assert all(sample.all_answers and len(sample.answers[0]) == 4 for sample in samples)
    assert token_limit(tokenizer, samples) - MARGIN - 4 * LISTED == max(
        stop - start for sample in samples for start, stop in sample.answer_spans
    )
    written = {}
    for sample in samples:
        parts = sample.answers[0]
        texts = {"all": parts, "half": parts[:2], "other order": parts[::-1], "no": ()}
        said = " " + ", ".join(texts[says])  # after the answer prefix
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        start, stop = sample.answer_spans[0]
        if says == "all":
            assert [*ids, tokenizer.eos_token_id] == sample.input_ids[start:stop], "the target is all of them"
        written[tuple(sample.input_ids[:start])] = [*ids, tokenizer.eos_token_id]

    monkeypatch.setattr(generate, "_read", lambda _, prompts, *rest: SimpleNamespace(cache=None, prompts=prompts))
    monkeypatch.setattr(generate, "count_cache", lambda cache, lengths: None)
    monkeypatch.setattr(generate, "MeasuredCache", lambda: SimpleNamespace(add=lambda counts: None, facts=dict))
    monkeypatch.setattr(generate, "_write", lambda _, prompt, *rest: [written[tuple(ids)] for ids in prompt.prompts])
    options = {"tokenizer": tokenizer, "stop_ids": [tokenizer.eos_token_id], "batch_size": 2}
    for answer in generate_answers(model, samples, None, **options).outcomes:
        assert (answer.string_match, answer.f1) == (string_match, pytest.approx(f1))
        assert answer.exact == exact and answer.exact_match == exact
    one_will_do = [replace(sample, all_answers=False) for sample in samples]
    for answer in generate_answers(model, one_will_do, None, **options).outcomes:
        assert answer.string_match == float(says != "no")
