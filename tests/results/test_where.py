"""The language of `where`: what it says, what it refuses, and that it runs nothing."""

from typing import Any

import pytest

from lrsa.results.keys import ABSENT
from lrsa.results.where import Where

from .conftest import MakeRun, share

VALUES: dict[str, Any] = {
    "attention.lag_size": 128,
    "run.seed": 2,
    "arm": "lrsa",
    "attention.top_k": None,
    "trainer.save_model": True,
    "recipe.compressions": [4],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("attention.lag_size == 128 and run.seed < 3", True),
        ("attention.lag_size == 64 or not run.seed >= 2", False),
        ("0 <= run.seed < 2", False),
        ("arm in ['dense', 'lrsa'] and run.seed not in [0, 1]", True),
        ("attention.top_k == null and attention.top_k != 3", True),
        ("attention.top_k > 3 or attention.top_k <= 3", False),  # no order with null
        ("unknown == null", True),
        ("trainer.save_model and trainer.save_model == true", True),
        ("recipe.compressions == [4]", True),
        ("run.seed > -1", True),
        ("(arm == 'dense' or arm == 'lrsa')\n  and run.seed == 2", True),
    ],
)
def test_what_it_says(text: str, expected: bool) -> None:
    assert Where.parse(text).holds(lambda key: VALUES.get(key, ABSENT)) is expected


def test_it_names_its_keys() -> None:
    assert Where.parse("a.b == 1 and (c in [1, x] or a.b == null)").keys == ["a.b", "c", "x"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "arm.__class__.__mro__[0]",
        "(lambda: 1)() == 1",
        "[x for x in [1]] == [1]",
        "arm == f'{arm}'",
        "run.seed + 1 == 2",
        "2 ** 99999999 > 1",
        "arm is null",
        "arm in 'lrsa'",
        "-arm == 1",
        "128",
        "arm == 'lrsa' and 1",
        "arm == b'lrsa'",
        "arm == ...",
        "arm = 'lrsa'",
        "arm ==",
        "x := 3",
    ],
)
def test_anything_else_is_refused_before_it_is_looked_at(text: str) -> None:
    with pytest.raises(ValueError, match=r"where=.* It knows keys, numbers"):
        Where.parse(text)


def test_no_order_between_text_and_number() -> None:
    with pytest.raises(ValueError, match="'lrsa' and 3 have no order"):
        Where.parse("arm < 3").holds(VALUES.get)


def test_records_keep_the_cells_of_which_it_holds(make_run: MakeRun) -> None:
    cells = {("needles", 1): share(9, 10), ("needles", 4): share(5, 10)}
    records = [make_run("dense", cells), make_run("lrsa", cells)]
    (found,) = Where.parse("arm == 'lrsa' and compression == 4").of(records)
    assert (found.arm, [cell["compression"] for cell in found.cells]) == ("lrsa", [4])
    assert len(records[1].cells) == 2 and len(found.outcomes()) == 20, "the record itself stays as it was"
    assert Where.parse("").of(records) == records
