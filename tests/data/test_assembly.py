"""Samples: exact length, spans, depths, distractors, determinism."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import ContextTooLongError, SampleSet
from lrsa.data.placement import place, shuffled
from lrsa.data.sources import SYNTHETIC_SAMPLES
from tests.data.conftest import squad_rows, write_rows


def squad(folder, **changes) -> ExamplesConf:
    return ExamplesConf(**{"source": "squad", "path": str(folder), **changes})


def short_needles(**changes) -> ExamplesConf:
    args = {
        "needles": 6,
        "value_digits": 3,
        "key_words": 1,
        "statement": "The code of {key} is {value}.",
        "instruction": "",
    }
    args |= {"question": "What is the code of {key}?"}
    return ExamplesConf(**{"source": "needles", "questions": 3, "args": args, **changes})


@pytest.mark.parametrize("length", [601, 777, 1024, 1500, 2047])
@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize("seed", [0, 7])
def test_squad_has_exactly_t_tokens(squad_folder, bytes_tokenizer, length, questions, seed) -> None:
    data = SampleSet(squad(squad_folder, questions=questions, seed=seed, limit=6), bytes_tokenizer, length)
    for sample in data:
        assert len(sample.input_ids) == sample.length == length
        assert sample.answer_spans[-1][1] == length, "nothing follows the last answer"


@pytest.mark.parametrize("length", [200, 255, 256, 511, 512, 513])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_needles_have_exactly_t_tokens(words_tokenizer, length, seed) -> None:
    data = SampleSet(short_needles(seed=seed, limit=5), words_tokenizer, length)
    assert [len(sample.input_ids) for sample in data] == [length] * 5
    assert all(words_tokenizer.unk_token_id not in sample.input_ids for sample in data), (
        "the vocabulary covers the task"
    )


def test_default_needles_and_passkey_are_in_the_small_vocabulary(words_tokenizer) -> None:
    for source in ("needles", "passkey"):
        sample = SampleSet(ExamplesConf(source=source), words_tokenizer, 700)[0]
        assert words_tokenizer.unk_token_id not in sample.input_ids


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_spans_decode_to_the_answers_with_end_of_turn(squad_folder, bytes_tokenizer, prompt) -> None:
    data = SampleSet(squad(squad_folder, questions=4, prompt=prompt), bytes_tokenizer, 1600)
    rows = {row["id"]: row for row in squad_rows()}
    for sample in data:
        assert len(sample.answer_spans) == len(sample.question_ids) == len(sample.answers)
        for (start, stop), name, answers in zip(sample.answer_spans, sample.question_ids, sample.answers, strict=True):
            text = bytes_tokenizer.decode(sample.input_ids[start:stop])
            assert text.strip() == rows[name]["answers"]["text"][0] + "<|im_end|>"
            assert answers == tuple(rows[name]["answers"]["text"])
            before = bytes_tokenizer.decode(sample.input_ids[:start])
            assert before.endswith("assistant\n" if prompt == "chat" else "Answer:")
            assert rows[name]["question"] in before[-200:]


def test_gold_passage_is_in_the_context_at_the_recorded_depth(squad_folder, bytes_tokenizer) -> None:
    rows = {row["id"]: row for row in squad_rows()}
    data = SampleSet(squad(squad_folder), bytes_tokenizer, 1500)
    depths = []
    for sample in data:
        row = rows[sample.question_ids[0]]
        text = bytes_tokenizer.decode(sample.input_ids)
        assert text.count(row["context"]) == 1, "whole, and once"
        opening = text[: text.index("in a few words.") + len("in a few words.")]
        start = len(bytes_tokenizer(opening, add_special_tokens=False).input_ids)
        # the context ends where the question begins
        question = bytes_tokenizer("\n\n" + row["question"], add_special_tokens=False).input_ids
        tail = bytes_tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
        size = sample.answer_spans[0][0] - len(question) - len(tail) - start
        gold = start + round(sample.gold_depth[0] * size)
        assert bytes_tokenizer.decode(sample.input_ids[gold:]).startswith("\n\n" + row["context"])
        depths += sample.gold_depth
    assert min(depths) < 0.1 and max(depths) > 0.75, "depths are spread"
    assert 0.3 < sum(depths) / len(depths) < 0.6


def test_depth_grid_is_followed(squad_folder, bytes_tokenizer) -> None:
    data = SampleSet(squad(squad_folder, args={"depths": [0.0, 0.5, 1.0]}), bytes_tokenizer, 1600)
    first, middle, last = (data[i].gold_depth[0] for i in range(3))
    assert first == 0.0 and 0.35 < middle < 0.6 and last > 0.8


@pytest.mark.parametrize("questions", [1, 4])
def test_distractors_come_from_other_articles(squad_folder, bytes_tokenizer, questions) -> None:
    rows = {row["id"]: row for row in squad_rows()}
    data = SampleSet(squad(squad_folder, questions=questions), bytes_tokenizer, 1500)
    for sample in data:
        text = bytes_tokenizer.decode(sample.input_ids[: sample.answer_spans[0][0]])
        gold = {rows[name]["context"] for name in sample.question_ids}
        articles = {rows[name]["title"] for name in sample.question_ids}
        found = set(re.findall(r"Article \d+ paragraph \d+\.", text))
        for row in rows.values():
            mark = re.match(r"Article \d+ paragraph \d+\.", row["context"])[0]
            if row["context"] in gold:
                assert mark in found
            elif row["title"] in articles:
                assert mark not in found
        if questions == 1:
            assert len(found) > 3, "paragraphs first, filler for the rest"


def test_max_distractors(squad_folder, bytes_tokenizer) -> None:
    sample = SampleSet(squad(squad_folder, args={"max_distractors": 0}), bytes_tokenizer, 1024)[0]
    assert len(re.findall(r"Article \d+ paragraph \d+\.", bytes_tokenizer.decode(sample.input_ids))) == 1


def test_every_question_is_asked_once_an_epoch(squad_folder, bytes_tokenizer) -> None:
    data = SampleSet(squad(squad_folder, questions=7), bytes_tokenizer, 3000)
    everything = sorted(row["id"] for row in squad_rows())
    first = [e.id for i in range(len(data)) for e in data.examples_of(i)]
    second = [e.id for i in range(len(data), 2 * len(data)) for e in data.examples_of(i)]
    assert sorted(first) == sorted(second) == everything
    assert first != second, "the next epoch has its own order"


def test_seed_and_stream_decide_the_sample(squad_folder, bytes_tokenizer, words_tokenizer) -> None:
    for conf, tokenizer, length in (
        (squad(squad_folder), bytes_tokenizer, 900),
        (short_needles(), words_tokenizer, 300),
    ):
        one = SampleSet(conf, tokenizer, length)
        again = SampleSet(conf, tokenizer, length)
        assert [one[i] for i in (3, 0, 2)] == [again[i] for i in (3, 0, 2)], "in any order"
        assert one.fingerprint == again.fingerprint
        conf.seed = 1
        other = SampleSet(conf, tokenizer, length)
        conf.seed = 0
        stream = SampleSet(conf, tokenizer, length, stream="train/x/0")
        assert len({one[0].input_ids.__repr__(), other[0].input_ids.__repr__(), stream[0].input_ids.__repr__()}) == 3
        assert len({one.fingerprint, other.fingerprint, stream.fingerprint}) == 3


def test_training_and_evaluation_needles_are_disjoint(words_tokenizer) -> None:
    def values(stream):
        data = SampleSet(ExamplesConf(source="needles"), words_tokenizer, 700, stream=stream)
        return {document.text for index in range(50) for document in data.examples_of(index)[0].documents}

    assert not values("evaluation") & values("train/needles/0")


PROGRAM = """
import sys, json, hashlib
from lrsa.config import ExamplesConf
from lrsa.data import SampleSet
from lrsa.data.vocabulary import build_tokenizer
tokenizer = build_tokenizer(["article", "paragraph", "prize"])
squad = SampleSet(ExamplesConf(source="squad", path=sys.argv[1], questions=3), tokenizer, 700)
needles = SampleSet(ExamplesConf(source="needles"), tokenizer, 700)
text = json.dumps([s.sample(i).input_ids for s in (squad, needles) for i in (5, 1, 40)])
digest = hashlib.sha256(text.encode()).hexdigest()
print(json.dumps([[hash("lrsa"), digest], squad.fingerprint, needles.fingerprint]))
"""


def test_same_samples_in_another_process_with_another_hash_seed(squad_folder, repository, capsys, monkeypatch) -> None:
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(squad_folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there, *fingerprints = json.loads(done.stdout)
    monkeypatch.setattr(sys, "argv", ["", str(squad_folder)])
    exec(PROGRAM, {})
    hash_there, *_ = there
    here = json.loads(capsys.readouterr().out)
    assert here[0][1:] == there[1:] and here[1:] == fingerprints
    assert here[0][0] != hash_there, "the two processes did hash differently"


def test_fingerprint_follows_rows_not_paths(squad_folder, bytes_tokenizer, tmp_path) -> None:
    rows = squad_rows()
    copy = write_rows(tmp_path / "elsewhere" / "other.jsonl", rows)
    rows[3]["question"] = "Changed?"
    changed = write_rows(tmp_path / "changed" / "train.jsonl", rows)
    base = SampleSet(squad(squad_folder), bytes_tokenizer, 900)
    assert SampleSet(squad(copy), bytes_tokenizer, 900).fingerprint == base.fingerprint
    assert SampleSet(squad(changed), bytes_tokenizer, 900).fingerprint != base.fingerprint
    assert SampleSet(squad(squad_folder), bytes_tokenizer, 901).fingerprint != base.fingerprint
    described = base.describe()
    assert described["n"] == len(rows) and described["origin"].endswith("train.jsonl.gz")
    assert "{question}" in described["template"] and described["truncation"] == "none"


def test_too_long_says_by_how_much_and_names_the_example(squad_folder, bytes_tokenizer) -> None:
    natural = SampleSet(squad(squad_folder), bytes_tokenizer, 2000)
    name = natural[0].question_ids[0]
    gold_only = SampleSet(squad(squad_folder), bytes_tokenizer, None)[0].length
    exact = SampleSet(squad(squad_folder), bytes_tokenizer, gold_only)
    assert exact[0].length == gold_only, "it fits to the token"
    with pytest.raises(ContextTooLongError, match=rf"{name}.*{gold_only} tokens, 5 more than length={gold_only - 5}"):
        SampleSet(squad(squad_folder), bytes_tokenizer, gold_only - 5)[0]
    with pytest.raises(ContextTooLongError):
        SampleSet(squad(squad_folder, questions=8), bytes_tokenizer, 700).check(3)
    SampleSet(squad(squad_folder, questions=2), bytes_tokenizer, 1200).check(10)


def test_needles_that_do_not_fit(words_tokenizer) -> None:
    with pytest.raises(ContextTooLongError, match="more than length=60"):
        SampleSet(short_needles(), words_tokenizer, 60)[0]


def test_no_context_is_the_question_alone_under_the_same_id(squad_folder, bytes_tokenizer) -> None:
    whole = SampleSet(squad(squad_folder), bytes_tokenizer, 900)
    floor = SampleSet(squad(squad_folder), bytes_tokenizer, 900, context=False)
    rows = {row["id"]: row for row in squad_rows()}
    for a, b in zip(whole, floor, strict=True):
        assert (a.id, a.question_ids, a.answers) == (b.id, b.question_ids, b.answers)
        question = rows[b.id]["question"]
        prompt = bytes_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        start, stop = b.answer_spans[0]
        assert b.input_ids[:start] == bytes_tokenizer(prompt, add_special_tokens=False).input_ids
        assert stop == b.length and b.gold_depth == ()


def test_gold_alone_is_the_supporting_documents_under_the_same_id(tmp_path, bytes_tokenizer) -> None:
    documents = [{"text": f"Document {k} of row {{row}}.", "is_supporting": k in (1, 3)} for k in range(5)]
    rows = [
        {"id": f"r{row}", "question": "Which?", "answers": ["two"]}
        | {"documents": [one | {"text": one["text"].format(row=row)} for one in documents]}
        for row in range(4)
    ]
    conf = ExamplesConf(source="jsonl", path=str(write_rows(tmp_path / "rows.jsonl", rows)))
    whole = SampleSet(conf, bytes_tokenizer, 900)
    gold = SampleSet(conf, bytes_tokenizer, 900, gold_only=True)
    assert gold.fingerprint != whole.fingerprint and gold.describe()["gold_only"]
    for a, b in zip(whole, gold, strict=True):
        assert (a.id, a.question_ids, a.answers, len(b.gold_depth)) == (b.id, b.question_ids, b.answers, 2)
        found = re.findall(r"Document (\d) of row (\d)", bytes_tokenizer.decode(b.input_ids))
        assert sorted(found) == [("1", b.id[1]), ("3", b.id[1])]
        assert b.length < 150 < a.length and "Read the documents" in bytes_tokenizer.decode(b.input_ids)


@pytest.mark.parametrize("questions", [1, 3])
def test_gold_alone_of_synthetic_contexts(words_tokenizer, questions) -> None:
    conf = short_needles(questions=questions, limit=5)
    whole, gold = SampleSet(conf, words_tokenizer, 400), SampleSet(conf, words_tokenizer, None, gold_only=True)
    for index, (a, b) in enumerate(zip(whole, gold, strict=True)):
        assert (a.id, a.question_ids, a.answers) == (b.id, b.question_ids, b.answers)
        text = words_tokenizer.decode(b.input_ids)
        asked = [d.text for e in gold.examples_of(index) for d in e.documents if d.is_supporting]
        held = [
            words_tokenizer.decode(words_tokenizer(statement, add_special_tokens=False).input_ids)
            for statement in asked
        ]
        assert len(re.findall(r"(?<!is )the code of", text)) == len(b.gold_depth) == questions
        assert all(statement in text for statement in held)
    passkey = SampleSet(ExamplesConf(source="passkey", limit=2), words_tokenizer, None, gold_only=True)[0]
    start, stop = passkey.answer_spans[0]
    digits = [str(token) for token in passkey.input_ids[start : stop - 1]]
    assert " ".join(digits) in " ".join(map(str, passkey.input_ids[:start]))


def test_needles_of_a_sample_are_all_in_its_context(words_tokenizer) -> None:
    data = SampleSet(short_needles(limit=5), words_tokenizer, 400)
    for index, sample in enumerate(data):
        text = words_tokenizer.decode(sample.input_ids)
        examples = data.examples_of(index)
        assert len({example.question for example in examples}) == 3
        for document in examples[0].documents:
            assert words_tokenizer.decode(words_tokenizer(document.text).input_ids) in text
        assert len(sample.gold_depth) == 3 and all(0 <= depth <= 1 for depth in sample.gold_depth)
        assert [a[0] for a in sample.answers] == [e.answers[0] for e in examples]


def test_length_of_sets(squad_folder, bytes_tokenizer, words_tokenizer) -> None:
    assert len(SampleSet(squad(squad_folder, limit=7), bytes_tokenizer, 900)) == 7
    assert len(SampleSet(squad(squad_folder, limit=10_000), bytes_tokenizer, 900)) == 60
    endless = SampleSet(ExamplesConf(source="needles"), words_tokenizer, 700)
    assert len(endless) == SYNTHETIC_SAMPLES and endless.sample(12_345).length == 700
    with pytest.raises(IndexError):
        endless[SYNTHETIC_SAMPLES]


def test_place_puts_gold_into_the_nearest_gap() -> None:
    import numpy as np

    background = [np.full(10, k, dtype=np.int32) for k in range(10)]
    gold = [np.full(4, 100 + k, dtype=np.int32) for k in range(3)]
    blocks, fell = place(background, gold, [1.0, 0.0, 0.52])
    flat = np.concatenate(blocks).tolist()
    assert len(flat) == 112 and flat[:4] == [101] * 4 and flat[-4:] == [100] * 4
    for k, depth in enumerate(fell):
        assert flat.index(100 + k) == round(depth * 112)
    assert [v for v in flat if v < 100] == [k for k in range(10) for _ in range(10)], "the background keeps its order"


def test_shuffled_is_a_permutation() -> None:
    import random

    assert sorted(shuffled(50, random.Random(0))) == list(range(50))
    assert list(shuffled(50, random.Random(1))) != list(shuffled(50, random.Random(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"needls": 3}}, "needls.*valid: .*needles"),
        ({"args": {"needles": 4}, "questions": 5}, "questions=5 exceeds args.needles=4"),
        ({"args": {"needles": 20, "value_digits": 1}}, "args.needles=20 .*args.value_digits=1"),
        ({"args": {"key_words": 3}}, "key_words=3"),
        ({"args": {"values": "roman"}}, "valid: digits, words"),
        ({"args": {"depths": [0.5, 2]}}, "depths"),
        ({"path": "somewhere"}, "synthetic and reads no path"),
        ({"questions": 0}, "questions=0"),
        ({"limit": 0}, "limit=0"),
        ({"prompt": "cht"}, "valid: chat, plain"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings(words_tokenizer, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSet(ExamplesConf(**{"source": "needles", **changes}), words_tokenizer, 700)[0]


def test_values_from_words(words_tokenizer) -> None:
    data = SampleSet(ExamplesConf(source="needles", args={"values": "words", "value_digits": 2}), words_tokenizer, 700)
    assert len(data[0].answers[0][0].split()) == 2
    start, stop = data[0].answer_spans[0]
    assert words_tokenizer.decode(data[0].input_ids[start:stop]) == data[0].answers[0][0] + " <end>"


def test_questions_apart_share_their_context(squad_folder, bytes_tokenizer) -> None:
    """Each is the first one after the same tokens; ids, references and depths are its own; the floor has them too."""
    conf = squad(squad_folder, questions=3, limit=2, apart=True)
    data, turns = (SampleSet(replace(conf, apart=apart), bytes_tokenizer, 1400) for apart in (True, False))
    floor = SampleSet(conf, bytes_tokenizer, None, context=False)
    assert (
        data.fingerprint
        != turns.fingerprint
        == SampleSet(squad(squad_folder, questions=3, limit=2), bytes_tokenizer, 1400).fingerprint
    )
    assert turns.asked(0) == [turns[0]]
    assert data.template.count("{question}") == 1 < turns.template.count("{question}")
    for index in range(2):
        whole, samples = turns[index], data.asked(index)
        assert [one.id for one in samples] == [one.id for one in floor.asked(index)] == list(whole.question_ids)
        context = whole.input_ids[: whole.context_length]
        assert len(context) > 700
        first, *_ = samples
        assert first.input_ids == whole.input_ids[: first.length]
        for number, (one, bare) in enumerate(zip(samples, floor.asked(index), strict=True)):
            assert one.input_ids[: one.context_length] == context and one.length == len(one.input_ids) < 1400
            assert (one.answers, len(one.answer_spans)) == ((whole.answers[number],), 1)
            (start, stop), (old, end) = one.answer_spans[0], whole.answer_spans[number]
            assert stop == one.length and one.input_ids[start:stop] == whole.input_ids[old:end]
            assert len(one.gold_depth) == 1 and one.gold_depth[0] in whole.gold_depth and bare.gold_depth == ()
            assert bare.context_length == 0 and bytes_tokenizer.decode(bare.input_ids).count(
                data.examples_of(index)[number].question
            )
