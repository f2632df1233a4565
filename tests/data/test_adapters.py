"""Rows written by hand in the hub's own columns, nested as `datasets` gives them, through each adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import ContextTooLongError, DataRowError, SampleSet, load_examples
from lrsa.data.sources import SOURCES, load
from tests.data.conftest import write_rows

TWO_WIKI: dict[str, Any] = {
    "id": "8813f87c0bdd11eba7f7acde48001122",
    "question": "Who is the mother of the director of film Alpha?",
    "answer": "Mary North",
    "type": "compositional",
    "evidences": [["Alpha", "director", "Ann North"], ["Ann North", "mother", "Mary North"]],
    "supporting_facts": {"title": ["Alpha", "Ann North"], "sent_id": [0, 1]},
    "context": {
        "title": ["Beta", "Alpha", "Ann North"],
        "sentences": [["Beta is a film."], ["Alpha is by Ann North.", "It is short."], ["Ann acts.", "Mary is hers."]],
    },
}
MUSIQUE: dict[str, Any] = {
    "id": "2hop__460946_294723",
    "paragraphs": [
        {"idx": 0, "title": "Delta", "paragraph_text": "Delta is a river.", "is_supporting": False},
        {"idx": 1, "title": "Green", "paragraph_text": "Green was sung by Sue Hill. ", "is_supporting": True},
        {"idx": 2, "title": "Sue Hill", "paragraph_text": "Sue Hill married Tom Lake.", "is_supporting": True},
    ],
    "question": "Who is the spouse of the Green performer?",
    "question_decomposition": [
        {"id": 460946, "question": "Green >> performer", "answer": "Sue Hill", "paragraph_support_idx": 1},
        {"id": 294723, "question": "#1 >> spouse", "answer": "Tom Lake", "paragraph_support_idx": 2},
    ],
    "answer": "Tom Lake",
    "answer_aliases": ["Thomas Lake", "Tom Lake"],
    "answerable": True,
}
STORY = "The panda sat by the river. " * 40
NARRATIVE: dict[str, Any] = {
    "document": {
        "id": "0025577043f5090cd603c6aea60f26e236195594",
        "kind": "gutenberg",
        "url": "http://www.gutenberg.org/ebooks/1.txt.utf-8",
        "file_size": 1120,
        "word_count": 240,
        "start": "The panda",
        "end": "the river.",
        "summary": {
            "text": " A panda sits by a river.",
            "tokens": ["A", "panda", "sits", "by", "a", "river", "."],
            "url": "http://en.wikipedia.org/wiki/Panda",
            "title": "The Panda",
        },
        "text": STORY,
    },
    "question": {"text": "Where does the panda sit?", "tokens": ["Where", "does", "the", "panda", "sit", "?"]},
    "answers": [
        {"text": "By a river.", "tokens": ["By", "a", "river", "."]},
        {"text": "at the river", "tokens": ["at", "the", "river"]},
    ],
}
ROWS = {"two_wiki": TWO_WIKI, "musique": MUSIQUE, "narrativeqa": NARRATIVE}


def changed(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at `a.0.b` replaced; None: taken out."""
    copy = json.loads(json.dumps(row))
    *way, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    inner = copy
    for name in way:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


def conf(source: str, file: Path, **changes: Any) -> ExamplesConf:
    return ExamplesConf(source=source, path=str(file), **changes)


def test_two_wiki(tmp_path: Path) -> None:
    raw = {"_id": "raw", **{name: value for name, value in TWO_WIKI.items() if name != "id"}}
    first, second = load_examples(conf("two_wiki", write_rows(tmp_path / "dev.jsonl", [TWO_WIKI, raw])))
    assert (first.id, second.id) == ("8813f87c0bdd11eba7f7acde48001122", "raw")
    assert first.answers == ("Mary North",)
    assert [(d.title, d.text, d.is_supporting) for d in first.documents] == [
        ("Beta", "Beta is a film.", False),
        ("Alpha", "Alpha is by Ann North. It is short.", True),
        ("Ann North", "Ann acts. Mary is hers.", True),
    ]


def test_musique(tmp_path: Path) -> None:
    (example,) = load_examples(conf("musique", write_rows(tmp_path / "dev.jsonl", [MUSIQUE])))
    assert example.id == "2hop__460946_294723" and example.answers == ("Tom Lake", "Thomas Lake")
    assert [(d.title, d.is_supporting) for d in example.documents] == [
        ("Delta", False),
        ("Green", True),
        ("Sue Hill", True),
    ]
    assert example.documents[1].text == "Green was sung by Sue Hill."


@pytest.mark.parametrize(("text", "expected"), [("document", STORY.strip()), ("summary", "A panda sits by a river.")])
def test_narrativeqa(tmp_path: Path, text: str, expected: str) -> None:
    file = write_rows(tmp_path / "dev.jsonl", [NARRATIVE, changed(NARRATIVE, "document.summary.title", "")])
    first, second = load_examples(conf("narrativeqa", file, args={"text": text}))
    assert [d.text for d in first.documents] == [expected] and first.documents[0].is_supporting
    assert first.answers == ("By a river.", "at the river")
    assert first.id == "0025577043f5090cd603c6aea60f26e236195594-1" and second.id.endswith("-2")
    assert (first.group, second.group) == ("The Panda", expected), "another story's text may be a distractor"
    assert SOURCES["narrativeqa"].args["text"] == "document"


def test_a_story_is_never_cut(tmp_path: Path, words_tokenizer) -> None:
    file = write_rows(tmp_path / "dev.jsonl", [NARRATIVE])
    whole = SampleSet(conf("narrativeqa", file), words_tokenizer, None)[0]
    for missing in (1, 100):
        tight = SampleSet(conf("narrativeqa", file), words_tokenizer, whole.length - missing)
        with pytest.raises(
            ContextTooLongError,
            match=rf"594-1 .*take {whole.length} tokens, {missing} more than length={whole.length - missing}; nothing",
        ):
            tight.check(1)
    summary = SampleSet(conf("narrativeqa", file, args={"text": "summary"}), words_tokenizer, whole.length - 1)
    assert summary[0].length == whole.length - 1


def test_an_unknown_text_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "dev.jsonl", [NARRATIVE])
    with pytest.raises(ValueError, match=r"args.text='story' is unknown to .*'narrativeqa'; valid: document, summary"):
        load_examples(conf("narrativeqa", file, args={"text": "story"}))


@pytest.mark.parametrize("source", ROWS)
def test_datasets_and_parquet_give_the_same(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub hands them out: through Arrow, nested columns and all."""
    import datasets

    rows = datasets.Dataset.from_list([ROWS[source]] * 2)
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "validation.parquet")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: asked.append(name) or rows)
    from_disk = load_examples(conf(source, write_rows(tmp_path / "v.jsonl", [ROWS[source]] * 2)))
    assert load_examples(ExamplesConf(source=source)) == from_disk and asked == [SOURCES[source].path]
    assert load_examples(conf(source, tmp_path / "parquet", split="validation")) == from_disk
    monkeypatch.setenv("LRSA_DATA", str(tmp_path))
    write_rows(tmp_path / source / "validation.jsonl.gz", [ROWS[source]] * 2)
    assert load(ExamplesConf(source=source, split="validation")).origin.startswith(f"{source}/validation.jsonl.gz in")


@pytest.mark.parametrize("source", ROWS)
def test_every_answer_is_read_in_its_context(source: str, tmp_path: Path, bytes_tokenizer) -> None:
    data = SampleSet(conf(source, write_rows(tmp_path / "v.jsonl", [ROWS[source]])), bytes_tokenizer, 2000)
    sample, (example,) = data[0], data.examples
    text = bytes_tokenizer.decode(sample.input_ids[: sample.context_length])
    assert sample.length == 2000 and len(sample.gold_depth) == sum(d.is_supporting for d in example.documents)
    assert all(document.text in text for document in example.documents if document.is_supporting)


@pytest.mark.parametrize(
    ("source", "path", "value", "column"),
    [
        ("two_wiki", "id", None, "id"),
        ("two_wiki", "answer", "", "answer"),  # as in the test split
        ("two_wiki", "context.title", ["Beta", "Alpha"], "context.sentences"),
        ("two_wiki", "context", [["Beta", ["Beta is a film."]]], "context.title"),
        ("two_wiki", "supporting_facts.title", ["Gamma"], "supporting_facts.title"),
        ("two_wiki", "context.sentences.1", [" "], "supporting_facts.title"),
        ("musique", "answerable", False, "answerable"),
        ("musique", "paragraphs", [], "paragraphs"),
        ("musique", "paragraphs", {"title": ["Delta"]}, "paragraphs"),
        ("musique", "paragraphs.1.paragraph_text", " ", r"paragraphs\[1\].paragraph_text"),
        ("musique", "paragraphs.0.is_supporting", "no", r"paragraphs\[0\].is_supporting"),
        ("musique", "paragraphs", MUSIQUE["paragraphs"][:1], "paragraphs"),
        ("musique", "answer_aliases", ["", "x"], "answer_aliases"),
        ("narrativeqa", "document", "text", "document"),
        ("narrativeqa", "document.summary", None, "document.summary"),
        ("narrativeqa", "document.text", "", "document.text"),
        ("narrativeqa", "question.text", None, "question.text"),
        ("narrativeqa", "answers", [], "answers"),
        ("narrativeqa", "answers.1.text", 3, r"answers\[1\].text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_rows_name_file_line_and_column(
    source: str, path: str, value: Any, column: str, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "train.jsonl", [ROWS[source], changed(ROWS[source], path, value)])
    with pytest.raises(DataRowError, match=rf"train\.jsonl, line 2, column '{column}':"):
        load_examples(conf(source, file))


OWN = {"question": "x", "answers": ["y", "z"], "documents": [{"title": "T", "text": "y"}, "other"]}


def test_own_documents_are_supporting_unless_they_say_not(tmp_path: Path) -> None:
    rows = [OWN, {**OWN, "documents": [{"text": "y", "is_supporting": True}, {"text": "n", "is_supporting": False}]}]
    first, second = load_examples(conf("jsonl", write_rows(tmp_path / "t.jsonl", rows)))
    assert first.answers == ("y", "z") and [d.is_supporting for d in first.documents] == [True, True]
    assert [d.is_supporting for d in second.documents] == [True, False]


@pytest.mark.parametrize(
    ("documents", "column", "problem"),
    [
        (
            [{"text": "y", "is_suporting": False}],
            r"documents\[0\]",
            "unknown is_suporting; valid: title, text, is_supp",
        ),
        (["y", {"text": "z", "is_supporting": "yes"}], r"documents\[1\]", "is_supporting true or false"),
        ([{"text": "y", "is_supporting": False}], "documents", "is_supporting is false for all"),
    ],
)
def test_malformed_own_documents(documents: Any, column: str, problem: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [OWN, {**OWN, "documents": documents}])
    with pytest.raises(DataRowError, match=rf"train\.jsonl, line 2, column '{column}': .*{problem}"):
        load_examples(conf("jsonl", file))
