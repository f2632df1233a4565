"""Questions made from passages: each has its answer in the context, once, and none comes twice."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lrsa.config import DataConf, ExamplesConf
from lrsa.data import SampleSet
from lrsa.data.cloze import GAP
from lrsa.data.examples import Document
from lrsa.data.passages import GRAM, grams_once
from lrsa.data.sources import load, source_args
from lrsa.data.spans import count_words, sentences, spans
from lrsa.data.wordlists import ADJECTIVES, NOUNS
from tests.data.conftest import write_rows

CONF = Path(__file__).resolve().parents[2] / "conf"
KINDS = ("cloze", "continuation")


def paragraph(rng: random.Random, article: int) -> str:
    """Sentences with a name, a year, a quotation, or nothing but rare words; the last one is in every paragraph."""

    def word() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    said = [
        f"In {rng.randrange(1000, 2000)} the {word()} was given by Ann {rng.choice(NOUNS).title()} to the town.",
        f"Nobody in the village of Brook {rng.choice(NOUNS).title()} had seen the {word()} before or the {word()}.",
        f"They called the {word()} of article {article} “{word()}” for years, as did all of the others.",
        f"Then there was the {word()}, and it was not the {word()} that they had been told of.",
    ]
    rng.shuffle(said)
    return " ".join([*said, "The town keeps it behind a door of glass in Old Street."])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    rng = random.Random(0)
    rows = [
        {
            "id": f"{article}-{number}",
            "title": f"Article {article}",
            "context": paragraph(rng, article),
            "question": "Who?",
            "answers": {"text": ["Ann"]},
        }
        for article in range(8)
        for number in range(6)
    ]
    found = tmp_path_factory.mktemp("passages")
    write_rows(found / "train.jsonl.gz", rows)
    return found


def conf_of(source: str, folder: Path, **changes) -> ExamplesConf:
    return ExamplesConf(**{"source": source, "path": str(folder), "questions": 3, **changes})


def copied(source: str, question: str, args: dict, context: str) -> str:
    """What a reader finds who looks for the question's own words in the context: they must stand there once."""
    if source == "cloze":
        for phrasing in args["phrasings"]:
            head, _, tail = phrasing.partition("{sentence}")
            if question.startswith(head) and question.endswith(tail):
                before, gap, after = question[len(head) : len(question) - len(tail)].partition(GAP)
                said = [line[a:b] for line in context.split("\n") for a, b in sentences(line)]
                size = len(before) + len(after)
                found = [one for one in said if len(one) > size and one.startswith(before) and one.endswith(after)]
                assert gap and len(found) == 1, (question, found)
                return found[0][len(before) : len(found[0]) - len(after)]
    said = question[question.index('"') + 1 : question.rindex('"')]
    count = int(next(word for word in question.replace(said, "").split() if word.isdigit()))
    assert context.count(said) == 1
    return " ".join(context[context.index(said) + len(said) :].split()[:count])


@pytest.mark.parametrize("source", KINDS)
def test_a_copying_reader_scores_100(source, folder, bytes_tokenizer) -> None:
    conf = conf_of(source, folder)
    data = SampleSet(conf, bytes_tokenizer, 2048)
    args = source_args(conf)
    for index in range(30):
        sample = data.sample(index)
        assert sample.length == len(sample.input_ids) == 2048
        context = bytes_tokenizer.decode(sample.input_ids[: sample.context_length])
        whole = bytes_tokenizer.decode(sample.input_ids)
        for example, (start, stop) in zip(data.examples_of(index), sample.answer_spans, strict=True):
            assert example.question in whole
            assert copied(source, example.question, args, context) == example.answers[0]
            written = bytes_tokenizer.decode(sample.input_ids[start:stop])
            assert written == example.answers[0] + "<|im_end|>"


@pytest.mark.parametrize("source", KINDS)
def test_nothing_comes_twice_in_an_epoch(source, folder, bytes_tokenizer) -> None:
    data = SampleSet(conf_of(source, folder), bytes_tokenizer, 2048)
    asked = [e for index in range(data.epoch) for e in data.examples_of(index)]
    assert len(asked) == len(data.examples) > 100
    assert len({e.id for e in asked}) == len(asked), "each place once"
    places = {(e.documents[0].text, e.answers, e.question.rpartition("? ")[2]) for e in asked}
    assert len(places) == len(asked)
    again = [e.id for index in range(data.epoch, 2 * data.epoch) for e in data.examples_of(index)]
    assert sorted(again) == sorted(e.id for e in asked) and again != [e.id for e in asked]


@pytest.mark.parametrize("source", KINDS)
def test_streams_and_seeds_differ_and_fingerprints_tell(source, folder, tmp_path, bytes_tokenizer) -> None:
    def made(stream="train/a/0", folder=folder, **changes):
        return SampleSet(conf_of(source, folder, **changes), bytes_tokenizer, 2048, stream=stream)

    rows = [json.loads(line) for line in _lines(folder)]
    same = write_rows(tmp_path / "same" / "train.jsonl", rows).parent
    rows[7]["context"] = rows[7]["context"].replace("town", "city")
    other = write_rows(tmp_path / "other" / "train.jsonl", rows).parent
    base, again = made(), made(folder=same)
    assert base.fingerprint == again.fingerprint
    assert [base.sample(i).input_ids for i in range(5)] == [again.sample(i).input_ids for i in range(5)]
    changed = [made(stream="train/a/1"), made(seed=1), made(folder=other), made(args={"max_words": 80})]
    assert len({base.fingerprint, *(data.fingerprint for data in changed)}) == 5
    for data in changed[:2]:
        assert [e.id for i in range(5) for e in data.examples_of(i)] != [
            e.id for i in range(5) for e in base.examples_of(i)
        ]
    worded = {e.question.split()[0] for i in range(20) for e in base.examples_of(i)}
    assert len(worded) > 2, "several phrasings"


def _lines(folder: Path) -> list[str]:
    import gzip

    with gzip.open(folder / "train.jsonl.gz", "rt") as lines:
        return list(lines)


PROGRAM = """
import sys, json
from lrsa.config import ExamplesConf
from lrsa.data import SampleSet, content_hash
from lrsa.data.prose import ProseSet
from lrsa.data.vocabulary import build_tokenizer
tokenizer = build_tokenizer(["article", "village", "town"])
found = [hash("lrsa")]
prose = ProseSet(
    ExamplesConf(source="prose", path=sys.argv[2], args={"targets": 20}), tokenizer, 100, stream="train/prose/0"
)
found += [prose.fingerprint, content_hash([prose.sample(i) for i in (5, 1, 400)])]
for source in ("cloze", "continuation"):
    data = SampleSet(ExamplesConf(source=source, path=sys.argv[1], questions=3), tokenizer, 900)
    found += [data.fingerprint, content_hash([data.sample(i) for i in (5, 1, 40)])]
print(json.dumps(found))
"""


def test_same_samples_in_another_process_with_another_hash_seed(
    folder, tmp_path, repository, capsys, monkeypatch
) -> None:
    rng = random.Random(2)
    for name in ("amber", "birch"):
        (tmp_path / f"{name}.txt").write_text("\n".join(paragraph(rng, 0) for _ in range(20)))
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["", str(folder), str(tmp_path)])
    exec(PROGRAM, {})
    there, here = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert here[1:] == there[1:]
    assert here[0] != there[0], "the two processes did hash differently"


def test_a_repeated_or_ambiguous_sentence_is_not_asked_about(folder) -> None:
    examples = load(conf_of("cloze", folder)).examples
    assert not [e for e in examples if "The town keeps it" in e.question], "it is in every paragraph"
    rows = [
        f"The {animal} that lives in the deep wood was first seen in {year} by nobody at all."
        for animal, year in (("hare", 1901), ("fox", 1902), ("fox", 1903))
    ]
    file = [
        {"id": str(k), "title": str(k), "context": row, "question": "?", "answers": {"text": ["a"]}}
        for k, row in enumerate(rows)
    ]
    path = write_rows(folder.parent / "ambiguous.jsonl", file)
    assert [e.answers for e in load(conf_of("cloze", path)).examples] == [("1901",)]


def test_grams_tell_what_occurs_once() -> None:
    first, second = " ".join("abcdefghijkl"), " ".join("xxbcdefghixx")
    once = grams_once([Document("", first), Document("", second), Document("", "a b")])
    assert [part.tolist() for part in once[:1]] == [[True, False, True, True, True]]
    assert once[1].tolist() == [True, True, False, True, True] and len(once[2]) == 0 and GRAM == 8


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("On 12 May 1843 Sir Ann North met Mr. Fox of Old Street in Paris.", ["12 May 1843", "Sir Ann North", "Paris"]),
        ("They paid $1.5 million, or 3%, for “the blue room” on May 3, 1950.", ["$1.5 million", "3%", "the blue room"]),
        ("Ann North and Mr. and Mrs. Bell came, but However was what He said.", ["Mrs. Bell"]),
        ("In 1900 there were 12 of them, and in 1900 no more.", ["12"]),
        ("The boy looked at the glimmering vessel for a long while.", ["glimmering vessel"]),
        ("It was not there before, and it is not there now.", []),
    ],
)
def test_spans(sentence, expected) -> None:
    counts = count_words([Document("", "the boy looked for a long while " * 9 + sentence)])
    found = [sentence[a:b] for a, b in spans(sentence, counts, 3)]
    assert [name for name in expected if name not in found] == [], found
    assert all(a > 0 for a, _ in spans(sentence, counts, 3)) and (expected or not found)


def test_sentences_do_not_end_after_initials_and_titles() -> None:
    text = "J. R. Fox saw Dr. Bell at 5 p.m. in St. Ives. “Why?” he said. It was late."
    assert [text[a:b] for a, b in sentences(text)] == [
        "J. R. Fox saw Dr. Bell at 5 p.m. in St. Ives.",
        "“Why?” he said.",
        "It was late.",
    ]


def test_prose_is_asked_about_with_other_books_around(tmp_path, bytes_tokenizer) -> None:
    rng = random.Random(1)
    for number in range(4):
        text = "\n\n".join(paragraph(rng, number) for _ in range(8))
        (tmp_path / f"{'validation' if number == 3 else 'book'}-{number}.txt").write_text(text)
    conf = conf_of("cloze", tmp_path, args={"over": "prose"}, questions=1)
    data = SampleSet(conf, bytes_tokenizer, 1500)
    assert {d.title for d in data.loaded.documents} == {"book-0", "book-1", "book-2"}
    (gold,) = data.examples_of(0)[0].documents
    context = bytes_tokenizer.decode(data.sample(0).input_ids)
    own = [d for d in data.pool if d.title == gold.title and d.text in context]
    assert [d.text for d in own] == [gold.text] and sum(d.text in context for d in data.pool) > 2


def test_articles_of_a_tested_split_are_left_out(folder, tmp_path) -> None:
    rows = [json.loads(line) for line in _lines(folder)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", [row for row in rows if row["title"] in ("Article 1", "Article 5")])
    found = load(conf_of("cloze", tmp_path, args={"without": "validation"}))
    assert {d.title for d in found.documents} == {f"Article {k}" for k in (0, 2, 3, 4, 6, 7)}
    assert found.origin.endswith("train.jsonl without validation's articles")
    assert {e.documents[0].title for e in found.examples} == {d.title for d in found.documents}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"over": "prose", "without": "validation"}}, "args.without='validation' is a split of rows"),
        ({"args": {"over": "books"}}, r"args.over='books' is unknown to source 'cloze'; valid: squad, .*prose"),
        ({"args": {"over": "prose"}, "filler": "x"}, "might repeat what source 'cloze' asks about"),
        ({"args": {"phrasings": ["Fill it"]}}, r"'Fill it' lacks \{sentence\}"),
        ({"args": {"max_words": 3}}, "no passage has a sentence of 8 to 40 words"),
        ({"args": {"over": "jsonl"}, "path": None}, "args.over='jsonl' needs a path"),
        ({"source": "continuation", "args": {"shown": [4, 12]}}, r"args.shown=\[4, 12\] must be \[least, most\] words"),
        ({"source": "continuation", "args": {"answer": [3]}}, r"args.answer=\[3\]"),
        ({"source": "continuation", "args": {"every": 0}}, "args.every=0"),
        ({"source": "continuation", "args": {"phrasings": ["{words}"]}}, r"lacks \{words\} or \{count\}"),
    ],
)
def test_bad_settings(folder, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        load(conf_of(**{"source": "cloze", "folder": folder, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe_cloze", "recipe_broad"])
def test_recipes_on_the_shared_data(name, shared_data, monkeypatch, bytes_tokenizer) -> None:
    """Enough questions for 3,000 steps of 8 samples without a repeat, and each to be answered from its context."""
    monkeypatch.setenv("LRSA_DATA", str(shared_data / "data"))
    data = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(DataConf), OmegaConf.load(CONF / f"data/{name}.yaml"))
    )
    for part in (part for part in data.parts.values() if part.source in KINDS):
        made = SampleSet(part, bytes_tokenizer, 12_000, stream="train/x/0")
        assert len(made.examples) > 3000 * 8 * part.weight * part.questions
        for index in range(40):
            sample = made.sample(index)
            context = bytes_tokenizer.decode(sample.input_ids[: sample.context_length])
            for example in made.examples_of(index):
                answer = " ".join(example.answers[0].split())
                assert copied(part.source, example.question, made.args, context) == answer
