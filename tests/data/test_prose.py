"""Running text: whole books are held out, windows follow on each other, and targets are each token once an epoch."""

from pathlib import Path

import numpy as np
import pytest

from lrsa.config import DataConf, ExamplesConf, PerplexityConf, RecipeConf
from lrsa.data import LRSADataModule, SampleSet
from lrsa.data.books import HELD_OUT, read_texts
from lrsa.data.prose import ProseSet
from lrsa.data.sources import load
from lrsa.data.wordlists import HAYSTACK
from lrsa.evaluation.perplexity import read_windows


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    """Three books to train on and two that are held out; every sentence says its book and number."""
    folder = tmp_path_factory.mktemp("books")
    for name in ("amber", "birch", "clay", "validation-dune", HELD_OUT[1]):
        said = [f"{HAYSTACK[k % 40][:-1]} in {name} {k}. It was line {k} of {name}." for k in range(60)]
        (folder / f"{name}.txt").write_text("Heading\n\n" + "\n\n".join(said))
    return folder


def prose(
    folder: Path, length: int, tokenizer, stream: str = "train/prose/0", targets: int = 40, **changes
) -> ProseSet:
    conf = ExamplesConf(**{"source": "prose", "path": str(folder), "args": {"targets": targets}, **changes})
    return ProseSet(conf, tokenizer, length, stream=stream)


def targets_of(sample) -> list[tuple[str, int]]:
    """Book and position of each target token."""
    book, _, start = sample.id.rpartition("-")
    (first, stop), *_ = sample.answer_spans
    return [(book, int(start) + position) for position in range(first, stop)]


@pytest.mark.parametrize(("length", "targets"), [(200, 40), (257, 256), (131, 7)])
def test_a_sample_is_running_text_with_targets_at_its_end(books, bytes_tokenizer, length, targets) -> None:
    data = prose(books, length, bytes_tokenizer, targets=targets)
    for index in range(20):
        sample = data.sample(index)
        assert sample.length == len(sample.input_ids) == length
        assert sample.answer_spans == [(length - targets, length)] and sample.context_length == length - targets
        book, _, start = sample.id.rpartition("-")
        assert sample.input_ids == data.books[book][int(start) : int(start) + length].tolist(), "of one book, in order"
        assert "Heading" not in bytes_tokenizer.decode(sample.input_ids)


def test_every_target_comes_once_an_epoch_and_the_next_cuts_elsewhere(books, bytes_tokenizer) -> None:
    data = prose(books, 200, bytes_tokenizer)
    first, second = ([t for i in range(len(data)) for t in targets_of(data.sample(i + e * len(data)))] for e in (0, 1))
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
    possible = sum(len(ids) - 200 for ids in data.books.values())
    assert len(first) > 0.9 * possible, "nearly all that has enough text before it"
    assert set(first) != set(second)
    starts = [{data.sample(i + e * len(data)).id for i in range(len(data))} for e in (0, 1)]
    assert not starts[0] & starts[1]


def test_seeds_and_streams_differ_and_fingerprints_tell(books, bytes_tokenizer) -> None:
    base, same = prose(books, 200, bytes_tokenizer), prose(books, 200, bytes_tokenizer)
    assert base.fingerprint == same.fingerprint and base[3].input_ids == same[3].input_ids
    others = [
        prose(books, 200, bytes_tokenizer, stream="train/a/1"),
        prose(books, 200, bytes_tokenizer, seed=1),
        prose(books, 200, bytes_tokenizer, targets=41),
        prose(books, 201, bytes_tokenizer),
        prose(books, 200, bytes_tokenizer, split="validation"),
    ]
    assert len({base.fingerprint, *(data.fingerprint for data in others)}) == 6
    for data in others[:2]:
        assert [data[i].id for i in range(9)] != [base[i].id for i in range(9)]
    with pytest.raises(IndexError):
        base[len(base)]


RUN = 48  # tokens: more than a sentence takes, so each run names its book


def _runs(rows) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + RUN]) for row in rows for i in range(len(row) - RUN + 1)}


def test_training_and_perplexity_share_no_window(books, bytes_tokenizer) -> None:
    """No 48 tokens in a row of the held-out windows are in a training sample of the prose, nor in its filler."""
    held = read_windows(bytes_tokenizer, PerplexityConf(text=f"{books}@validation", windows=1000), 100)
    everything = read_windows(bytes_tokenizer, PerplexityConf(text=str(books), windows=1000), 100)
    data = prose(books, 100, bytes_tokenizer)
    needles = SampleSet(ExamplesConf(source="passkey", filler=f"{books}@train"), bytes_tokenizer, 700)
    trained = _runs(data[i].input_ids for i in range(len(data)))
    filled = _runs(needles.sample(i).input_ids for i in range(40))
    evaluated = _runs(held.ids.tolist())
    assert held.origin == f"{books.name} [validation]" and len(evaluated) > 1000
    assert not evaluated & trained and not evaluated & filled
    assert _runs(everything.ids.tolist()) & trained, "without the part they do overlap"


def test_parts_of_a_folder_are_books(books) -> None:
    titles = {part: [title for title, _ in read_texts(f"{books}{part}")[0]] for part in ("", "@train", "@validation")}
    assert titles["@train"] == ["amber", "birch", "clay"]
    assert titles["@validation"] == [HELD_OUT[1], "validation-dune"]
    assert sorted(titles[""]) == sorted(titles["@train"] + titles["@validation"])


def test_hub_parts_are_splits(monkeypatch) -> None:
    asked = []

    class Rows(dict):
        column_names = ("text",)

    def rows(hub, split, config, revision):
        asked.append((hub, split, config))
        return Rows(text=["a", "b"])

    monkeypatch.setattr("lrsa.data.books.hub_rows", rows)
    assert read_texts("own/books:plain@validation") == ([("own/books", "a\n\nb")], "own/books:plain@validation")
    read_texts("own/books")
    assert asked == [("own/books", "validation", "plain"), ("own/books", "train", None)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("@test", "has no part 'test'; valid: train, validation"), ("/amber.txt@train", "nothing for 'train'")],
)
def test_parts_that_are_not_there(books, name, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts(f"{books}{name}")


def test_a_folder_without_held_out_books_has_no_validation(tmp_path) -> None:
    (tmp_path / "own.txt").write_text("text")
    assert len(read_texts(f"{tmp_path}@train")[0]) == 1
    with pytest.raises(ValueError, match=r"nothing for 'validation'.*there is own\.txt"):
        read_texts(f"{tmp_path}@validation")


@pytest.mark.parametrize(
    ("length", "changes", "message"),
    [
        (40, {}, "args.targets=40 must be below length=40"),
        (9000, {}, "its longest book has .* tokens, a sample takes length=9,000"),
        (200, {"questions": 2}, "questions=2, filler=None: source 'prose' is running text alone"),
        (200, {"filler": "repeat"}, "filler='repeat': source 'prose' is running text alone"),
        (200, {"args": {"targets": 0}}, "args.targets=0 must be a whole number"),
        (200, {"args": {"target": 9}}, r"has no args \['target'\]; valid: targets"),
    ],
)
def test_bad_settings(books, bytes_tokenizer, length, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        prose(books, length, bytes_tokenizer, **changes)
    with pytest.raises(ValueError, match="has no examples"):
        load(ExamplesConf(source="prose", path=str(books)))


def test_a_mixture_of_prose_and_questions(books, bytes_tokenizer) -> None:
    parts = {
        "prose": ExamplesConf(source="prose", path=str(books), args={"targets": 40}, weight=0.5),
        "needles": ExamplesConf(source="passkey", weight=0.5, filler=f"{books}@train"),
    }
    data = DataConf(length=400, parts=parts)
    module = LRSADataModule(data, bytes_tokenizer, RecipeConf(steps=10, batch_size=4), seed=0)
    module.setup()
    described = {part["name"]: part for part in module.describe()}
    assert described["prose"]["books"] == ["amber", "birch", "clay"] and described["prose"]["targets"] == 40
    assert described["prose"]["drawn"] + described["needles"]["drawn"] == 40
    masks = np.concatenate([batch["answer_mask"].sum(1).numpy() for batch in module.train_dataloader()])
    assert (masks == 40).sum() == described["prose"]["drawn"] > 10
    data.parts["prose"].args["targets"] = 400
    with pytest.raises(ValueError, match=r"args\.targets=400") as error:
        LRSADataModule(data, bytes_tokenizer, RecipeConf(), seed=0).setup()
    assert error.value.__notes__ == ["in data.parts.prose"]


def test_the_shared_books(shared_data, monkeypatch) -> None:
    monkeypatch.setenv("LRSA_DATA", str(shared_data / "data"))
    held, origin = read_texts("Salesforce/wikitext:wikitext-2-raw-v1@validation")
    assert sorted(title for title, _ in held) == sorted(HELD_OUT) and origin.startswith("prose [validation] in place")
    assert len(read_texts("Salesforce/wikitext@train")[0]) == 6
