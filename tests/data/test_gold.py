"""The tokens that are called the answer's are the answer's: read back, they say it."""

import json
from pathlib import Path

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import SampleSet, build_samples
from lrsa.data.gold import KINDS, gold_questions, occurrences
from lrsa.data.vocabulary import build_tokenizer

QA = [
    {
        "id": f"q{number}",
        "question": f"Who built tower {number}?",
        "answers": [f"master river{'' if number else ' of the north'}"],
        "documents": [
            {"text": f"a tower of stone {number} . master river of the north built it , for master river was old ."},
            {"text": "rain fell on the town and people ran home .", "is_supporting": False},
        ],
    }
    for number in range(3)
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["tower stone master built rain town north"])


def questions_of(conf: ExamplesConf, tokenizer, length: int = 400):
    data = SampleSet(conf, tokenizer, length)
    samples = build_samples(data)
    return data, samples, gold_questions(data, samples)


def said(tokenizer, sample, positions) -> str:
    return tokenizer.decode([sample.input_ids[position] for position in positions])


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ("needles", {}),
        ("needles", {"questions": 3}),
        ("needles", {"questions": 3, "apart": True}),
        ("niah", {}),
        ("niah_haystack", {}),
    ],
    ids=["needles", "three", "apart", "niah", "haystack"],
)
def test_synthetic_answers_and_keys_are_found_once(source: str, more: dict, tokenizer) -> None:
    args = {"needles": 6, "value_digits": 4} if source == "needles" else {}
    conf = ExamplesConf(source=source, limit=4, args=args, **more)
    data, samples, found = questions_of(conf, tokenizer)
    assert len(found) == len(samples) and {len(of) for of in found} == {len(samples[0].answer_spans)}
    for sample, questions in zip(samples, found, strict=True):
        for question, (start, stop) in zip(questions, sample.answer_spans, strict=True):
            assert question.asked == start and set(question.found) == set(KINDS)
            (passage,) = question.found["passage"]
            assert passage[-1] < sample.context_length and passage == tuple(range(passage[0], passage[-1] + 1))
            (answer,), (key,) = question.found["answer"], question.found["key"]
            target = tokenizer.decode(sample.input_ids[start:stop], skip_special_tokens=True)
            assert said(tokenizer, sample, answer).split() == target.split()
            assert set(answer) < set(passage) and set(key) < set(passage) and not set(answer) & set(key)
            if len(questions) == 1 and source == "needles":
                assert passage[0] == round(sample.gold_depth[0] * _context(data, sample)) + _opening(data, sample)


def _opening(data: SampleSet, sample) -> int:
    return len(data.store.encode([data.prompt.head + str(data.args["instruction"])])[0])


def _context(data: SampleSet, sample) -> int:
    return sample.context_length - _opening(data, sample)


def test_answers_of_documents_are_found_as_often_as_they_stand_there(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QA))
    _, samples, found = questions_of(ExamplesConf(source="jsonl", path=str(file), split="train"), tokenizer)
    for sample, (question,) in zip(samples, found, strict=True):
        times = {said(tokenizer, sample, positions) for positions in question.found["answer"]}
        assert len(question.found["answer"]) == (1 if question.id == "q0" else 2), question
        assert times == {" ".join(sample.answers[0][0].split())} and question.found["key"] == []
        assert "stone" in said(tokenizer, sample, question.found["passage"][0])


def test_whole_words_come_first() -> None:
    assert occurrences("in 1920s it was 20 , not 120", "20") == [(16, 18)]
    assert occurrences("the 1920s", "20") == [(6, 8)] and occurrences("the 1920s", "30") == []
    assert occurrences("cost $400.", "$400") == [(5, 9)] and occurrences("text", " ") == []


def test_a_source_without_a_context_is_refused(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "bare.jsonl"
    file.write_text(json.dumps({"prompt": "a tower", "answer": "stone"}) + "\n")
    with pytest.raises(ValueError, match="has no context"):
        questions_of(ExamplesConf(source="jsonl", path=str(file), split="train"), tokenizer)
