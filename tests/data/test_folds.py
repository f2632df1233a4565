"""`train[fit]` and `train[dev]`: all questions, no article on both sides, the same on every machine."""

import pytest

from lrsa.config import ExamplesConf
from lrsa.data import Document, Example, SampleSet, load_examples
from lrsa.data.folds import fold_of
from tests.data.conftest import squad_rows, write_rows


def examples(count: int) -> list[Example]:
    """Chains of three questions: each shares a distractor with the next."""
    return [
        Example(
            f"q{k}",
            "?",
            ("a",),
            tuple(
                Document(title, title * 3, gold)
                for title, gold in (
                    (f"gold {k}", True),
                    (f"chain {k // 3} {k % 3}", False),
                    (f"chain {k // 3} {max(k % 3 - 1, 0)}", False),
                )
            ),
        )
        for k in range(count)
    ]


def test_sides_are_disjoint_complete_and_do_not_cut_a_chain() -> None:
    given = examples(300)
    fit, dev = fold_of(given, "fit"), fold_of(given, "dev")
    assert sorted(e.id for e in fit + dev) == sorted(e.id for e in given)
    assert not {d.group for e in fit for d in e.documents} & {d.group for e in dev for d in e.documents}
    assert {int(e.id[1:]) // 3 for e in fit}.isdisjoint(int(e.id[1:]) // 3 for e in dev)
    assert 0.5 < len(fit) / len(given) < 0.7 and [int(e.id[1:]) for e in fit] == sorted(int(e.id[1:]) for e in fit)


def test_order_and_other_rows_do_not_move_a_group() -> None:
    given = examples(300)
    fit = {e.id for e in fold_of(given, "fit")}
    assert {e.id for e in fold_of(given[::-1], "fit")} == fit
    assert {e.id for e in fold_of(given[:150], "fit")} == {name for name in fit if int(name[1:]) < 150}


def test_split_names(tmp_path, squad_folder, bytes_tokenizer) -> None:
    def conf(split, folder=squad_folder):
        return ExamplesConf(source="squad", path=str(folder), split=split)

    sides = [load_examples(conf(f"train[{fold}]")) for fold in ("fit", "dev")]
    assert sides[0] and sides[1] and len(sides[0]) + len(sides[1]) == len(squad_rows())
    assert {e.group for e in sides[0]}.isdisjoint(e.group for e in sides[1])
    fit, dev = (SampleSet(conf(f"train[{fold}]"), bytes_tokenizer, 900) for fold in ("fit", "dev"))
    assert fit.fingerprint != dev.fingerprint and fit.describe()["origin"].endswith("train.jsonl.gz [fit]")
    assert {d.group for d in dev.pool} == {e.group for e in sides[1]}, "distractors are of the same side"
    with pytest.raises(ValueError, match=r"split='train\[test\]': unknown part 'test'; valid: fit, dev"):
        load_examples(conf("train[test]"))
    one = write_rows(tmp_path / "one" / "train.jsonl", squad_rows(articles=1)).parent
    with pytest.raises(ValueError, match="all its articles are one group"):
        [load_examples(conf(f"train[{fold}]", one)) for fold in ("fit", "dev")]


def test_the_shared_hotpotqa(shared_data, monkeypatch) -> None:
    monkeypatch.setenv("LRSA_DATA", str(shared_data / "data"))
    fit, dev = (load_examples(ExamplesConf(source="hotpotqa", split=f"train[{fold}]")) for fold in ("fit", "dev"))
    assert len(fit) + len(dev) == 500 and len(dev) > 150
    assert not {d.group for e in fit for d in e.documents} & {d.group for e in dev for d in e.documents}
