"""Rows to examples: the hub's columns from disk, one's own rows, and errors that name file, line and column."""

import json
import re

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import DataRowError, SampleSet, load_examples
from lrsa.data.sources import load
from tests.data.conftest import squad_rows, write_rows

HOTPOT = {
    "id": "h1",
    "question": "Which is older?",
    "answer": "Alpha",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": {"title": ["A", "C"], "sent_id": [0, 0]},
    "context": {"title": ["A", "B", "C"], "sentences": [["Alpha is old.", " So."], ["Beta."], ["Gamma is new."]]},
}


def own(file, **changes) -> ExamplesConf:
    return ExamplesConf(**{"source": "jsonl", "path": str(file), **changes})


def test_squad_columns(squad_folder) -> None:
    examples = load_examples(ExamplesConf(source="squad", path=str(squad_folder)))
    assert len(examples) == 60
    first = examples[0]
    assert (first.id, first.group, len(first.documents)) == ("q-0-0-0", "Title 0", 1)
    assert first.documents[0].is_supporting and first.documents[0].text.startswith("Article 0 paragraph 0.")
    assert len(first.answers) == 2


def test_gz_plain_parquet_and_file_agree(tmp_path, squad_folder) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = squad_rows()
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "train.parquet")
    write_rows(tmp_path / "j" / "train.jsonl", rows)
    paths = [squad_folder, tmp_path / "p", tmp_path / "j", tmp_path / "j" / "train.jsonl"]
    loaded = [load_examples(ExamplesConf(source="squad", path=str(path))) for path in paths]
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3]


def test_a_hub_row_without_title_is_its_own_group(tmp_path) -> None:
    row = {**squad_rows()[0]}
    del row["title"]
    example = load_examples(ExamplesConf(source="squad", path=str(write_rows(tmp_path / "x.jsonl", [row]))))[0]
    assert example.group == row["context"]


def test_hotpotqa_columns(tmp_path, bytes_tokenizer) -> None:
    other = {**HOTPOT, "id": "h2", "context": {**HOTPOT["context"], "title": ["A", "D", "C"]}}
    file = write_rows(tmp_path / "validation.jsonl", [HOTPOT, other])
    conf = ExamplesConf(source="hotpotqa", path=str(file))
    example = load_examples(conf)[0]
    assert [d.is_supporting for d in example.documents] == [True, False, True]
    assert example.documents[0].text == "Alpha is old. So."
    sample = SampleSet(conf, bytes_tokenizer, 400)[0]
    text = bytes_tokenizer.decode(sample.input_ids)
    assert sample.length == 400 and len(sample.gold_depth) == 2
    assert all(piece in text for piece in ("\n\nA\nAlpha is old. So.", "\n\nC\nGamma is new.", "\nBeta."))


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"question": 3}, "question"),
        ({"question": "  "}, "question"),
        ({"context": None}, "context"),
        ({"answers": {"text": []}}, "answers.text"),
        ({"answers": {"text": ["x", None]}}, "answers.text"),
        ({"answers": ["x"]}, "answers.text"),
        ({"id": 7}, "id"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_malformed_squad_row(tmp_path, change, column, name) -> None:
    rows = squad_rows()[:5]
    rows[2] = {**rows[2], **change}
    file = write_rows(tmp_path / name, rows)
    with pytest.raises(DataRowError, match=rf"{re.escape(str(file))}, line 3, column '{column}'"):
        load_examples(ExamplesConf(source="squad", path=str(tmp_path)))


def test_missing_column_and_broken_json(tmp_path) -> None:
    rows = squad_rows()[:3]
    del rows[1]["context"]
    with pytest.raises(DataRowError, match=r"line 2, column 'context': missing .*the row has id, title, question"):
        load_examples(ExamplesConf(source="squad", path=str(write_rows(tmp_path / "a.jsonl", rows))))
    file = write_rows(tmp_path / "b.jsonl", [json.dumps(squad_rows()[0]), "", '{"id": "x", oops}'])
    with pytest.raises(DataRowError, match=r"b\.jsonl, line 3, column 'character 13'"):
        load_examples(ExamplesConf(source="squad", path=str(file)))
    with pytest.raises(DataRowError, match=r"line 1.*expected an object, got list"):
        load_examples(ExamplesConf(source="squad", path=str(write_rows(tmp_path / "c.jsonl", ["[1]"]))))
    truncated = tmp_path / "d.jsonl.gz"
    truncated.write_bytes(write_rows(tmp_path / "e.jsonl.gz", squad_rows()).read_bytes()[:-50])
    with pytest.raises(DataRowError, match=r"d\.jsonl\.gz, line \d+"):
        load_examples(ExamplesConf(source="squad", path=str(truncated)))


def test_malformed_parquet_row(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = squad_rows()[:4]
    rows[3]["question"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(DataRowError, match=r"train\.parquet, line 4, column 'question'"):
        load_examples(ExamplesConf(source="squad", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"supporting_facts": {"title": ["Z"]}}, "supporting_facts.title"),
        ({"context": {"title": ["A"], "sentences": [["x"], ["y"]]}}, "context.sentences"),
        ({"context": {"title": ["A", "B", "C"], "sentences": ["x", "y", "z"]}}, "context.sentences"),
        ({"answer": ""}, "answer"),
    ],
    ids=str,
)
def test_malformed_hotpotqa_row(tmp_path, change, column) -> None:
    file = write_rows(tmp_path / "x.jsonl", [HOTPOT, {**HOTPOT, **change}])
    with pytest.raises(DataRowError, match=rf"line 2, column '{column}'"):
        load_examples(ExamplesConf(source="hotpotqa", path=str(file)))


def test_unknown_names_list_the_valid_ones(squad_folder, tmp_path) -> None:
    with pytest.raises(
        ValueError,
        match="unknown source 'squat'; valid: squad, hotpotqa, two_wiki, musique, narrativeqa, jsonl, cloze, "
        "continuation, prose, needles, passkey",
    ):
        load_examples(ExamplesConf(source="squat"))
    with pytest.raises(ValueError, match=r"unknown split 'test' .*it has train, validation"):
        load_examples(ExamplesConf(source="squad", path=str(squad_folder), split="test"))
    with pytest.raises(ValueError, match="it has none"):
        load_examples(ExamplesConf(source="squad", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has no args .*'title'.*valid: .*titles"):
        load_examples(ExamplesConf(source="squad", path=str(squad_folder), args={"title": True}))
    with pytest.raises(FileNotFoundError, match=r"neither a file or folder .* nor a hub id"):
        load_examples(ExamplesConf(source="squad", path="/nowhere/at/all"))
    with pytest.raises(ValueError, match="set `path`"):
        load_examples(ExamplesConf(source="jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match="unknown format"):
        load_examples(ExamplesConf(source="squad", path=str(tmp_path / "x.csv")))
    with pytest.raises(ValueError, match="has no rows"):
        load_examples(ExamplesConf(source="squad", path=str(write_rows(tmp_path / "empty.jsonl", []))))


def test_missing_hub_names_the_local_alternative(monkeypatch, words_tokenizer) -> None:
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.delenv("LRSA_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"rajpurkar/squad.*path=/folder with train\.jsonl\.gz.*LRSA_DATA"):
        load_examples(ExamplesConf(source="squad"))
    with pytest.raises(ConnectionError, match=r"filler=/folder.*filler=null"):
        SampleSet(ExamplesConf(source="needles", filler="Salesforce/wikitext:wikitext-2-raw-v1"), words_tokenizer, 700)


def test_hub_rows_pass_through_the_same_reader(monkeypatch, squad_folder) -> None:
    import datasets

    asked = {}

    def local(name, config, split, revision):
        asked.update(name=name, config=config, split=split, revision=revision)
        return datasets.Dataset.from_list(squad_rows())

    monkeypatch.delenv("LRSA_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", local)
    conf = ExamplesConf(source="squad", path="google/xquad", split="validation", args={"config": "xquad.en"})
    assert load_examples(conf) == load_examples(ExamplesConf(source="squad", path=str(squad_folder)))
    assert asked == {"name": "google/xquad", "config": "xquad.en", "split": "validation", "revision": None}


def test_stand_in_folder_is_used_and_said(monkeypatch, tmp_path, caplog) -> None:
    write_rows(tmp_path / "squad" / "test.jsonl.gz", squad_rows())
    monkeypatch.setenv("LRSA_DATA", str(tmp_path))
    loaded = load(ExamplesConf(source="squad", path="google/xquad", split="validation"))
    assert len(loaded.examples) == 60
    assert loaded.origin == "squad/test.jsonl.gz in place of google/xquad [validation]"
    assert "stands in for the hub's google/xquad" in caplog.text
    monkeypatch.setenv("LRSA_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="LRSA_DATA"):
        load(ExamplesConf(source="squad"))


def test_prose_filler(tmp_path, bytes_tokenizer) -> None:
    import gzip

    with gzip.open(tmp_path / "book.txt.gz", "wt") as out:
        out.write("\n\n".join(f"Mr. Fox went to town {k}. “What now?” he said. Nobody knew it yet." for k in range(50)))
    conf = ExamplesConf(source="passkey", filler=str(tmp_path))
    data = SampleSet(conf, bytes_tokenizer, 800)
    text = bytes_tokenizer.decode(data[0].input_ids)
    assert data[0].length == 800 and "Mr. Fox went to town" in text and "“What now?” he said." in text
    assert data[0].input_ids != data[1].input_ids
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt"):
        SampleSet(ExamplesConf(source="passkey", filler=str(tmp_path / "empty")), bytes_tokenizer, 800)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The sky is clear."},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "The grass grows."},
    {"role": "assistant", "content": "In the field."},
    {"role": "user", "content": "left out"},
]


def test_messages_learn_only_what_the_assistant_says(tmp_path, bytes_tokenizer) -> None:
    file = write_rows(tmp_path / "train.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES[1:3]}])
    data = SampleSet(own(file), bytes_tokenizer, 300)
    by_id = {sample.id: sample for sample in data}
    long, short = by_id["row-1"], by_id["row-2"]
    targets = [bytes_tokenizer.decode(long.input_ids[a:b]) for a, b in long.answer_spans]
    assert targets == ["It is.<|im_end|>", "In the field.<|im_end|>"]
    text = bytes_tokenizer.decode(long.input_ids)
    assert text == bytes_tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False).removesuffix("\n")
    assert short.length < long.length <= 300, "conversations keep their own length"
    with pytest.raises(ValueError, match=rf"row-1.*{long.length} tokens, 3 more than length={long.length - 3}"):
        list(SampleSet(own(file), bytes_tokenizer, long.length - 3))


@pytest.mark.parametrize("answer", [{"answer": "Blue."}, {"response": "Blue."}, {"answers": ["Blue.", "It is blue."]}])
def test_prompt_and_answer(tmp_path, bytes_tokenizer, answer) -> None:
    file = write_rows(tmp_path / "train.jsonl", [{"prompt": "What colour is the sky?", **answer}])
    sample = SampleSet(own(file), bytes_tokenizer, 300)[0]
    prompt = bytes_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What colour is the sky?"}], tokenize=False, add_generation_prompt=True
    )
    text = bytes_tokenizer.decode(sample.input_ids)
    assert text == prompt + "Blue.<|im_end|>"
    ((start, stop),) = sample.answer_spans
    assert sample.input_ids[:start] == bytes_tokenizer(prompt, add_special_tokens=False).input_ids
    assert stop == sample.length < 300


def test_own_documents_are_filled_to_t(tmp_path, bytes_tokenizer) -> None:
    rows = [
        {"id": "a", "question": "Who?", "answers": ["Ann"], "documents": ["Ann did it.", "Bob did not."]},
        {
            "id": "b",
            "question": "When?",
            "answer": "Today",
            "documents": [{"title": "T", "text": "It was today."}, {"text": "Or not.", "is_supporting": False}],
        },
    ]
    data = SampleSet(own(write_rows(tmp_path / "train.jsonl", rows)), bytes_tokenizer, 300)
    by_id = {sample.id: sample for sample in data}
    assert {sample.length for sample in data} == {300}
    assert len(by_id["a"].gold_depth) == 2 and len(by_id["b"].gold_depth) == 1


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"prompt": "x"}, "answer"),
        ({"prompt": 3, "answer": "x"}, "prompt"),
        ({"prompt": "x", "answers": []}, "answers"),
        ({"question": "x", "answer": "y", "documents": "z"}, "documents"),
        ({"question": "x", "answer": "y", "documents": ["z", {}]}, r"documents\[1\]"),
        ({"question": "x", "answer": "y", "documents": ["z"]}, "documents"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_malformed_own_row(tmp_path, row, column) -> None:
    file = write_rows(tmp_path / "train.jsonl", [{"prompt": "x", "answer": "y"}, row])
    with pytest.raises(DataRowError, match=rf"train\.jsonl, line 2, column '{column}'"):
        load_examples(own(file))


def test_several_questions_need_documents(tmp_path, bytes_tokenizer) -> None:
    file = write_rows(tmp_path / "train.jsonl", [{"prompt": "x", "answer": "y"}] * 3)
    with pytest.raises(ValueError, match=r"questions=2.*set questions: 1"):
        SampleSet(own(file, questions=2), bytes_tokenizer, 300)


def test_shared_squad_xquad_and_hotpotqa(shared_data, monkeypatch, bytes_tokenizer) -> None:
    monkeypatch.setenv("LRSA_DATA", str(shared_data / "data"))
    train = load_examples(ExamplesConf(source="squad"))
    xquad = load_examples(ExamplesConf(source="squad", path="google/xquad", split="validation"))
    assert (len(train), len(xquad)) == (18_434, 1_190)
    assert not {e.group for e in train} & {e.group for e in xquad}, "train and test share no article"
    hotpot = ExamplesConf(source="hotpotqa", split="validation", limit=3, filler="Salesforce/wikitext")
    data = SampleSet(hotpot, bytes_tokenizer, 9000)
    assert [sample.length for sample in data] == [9000] * 3
    assert data.describe()["filler"] == "prose in place of Salesforce/wikitext"
