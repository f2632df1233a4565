"""Worked by hand from the definition of SQuAD v1.1's evaluation."""

import pytest

from lrsa.evaluation.answers import exact_match, f1, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat sat on a mat.", "cat sat on mat"),
        ("  an   apple\tand\nTHE pear ", "apple and pear"),
        ("Theatre, another, banana", "theatre another banana"),  # articles are whole words
        ("10-20%", "1020"),  # punctuation goes without leaving a space
        ("the-end a.m.", "theend am"),  # and before the articles
        ("U.S.A", "usa"),
        ("a", ""),
        ("...", ""),
        ("", ""),
        ("“Zürich” — naïve", "“zürich” — naïve"),  # only ASCII punctuation
        ("it's", "its"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], True),
        ("Eiffel Tower", ["Louvre", "the Eiffel tower"], True),
        ("Tower Eiffel", ["Eiffel Tower"], False),
        ("", ["a", "b"], True),  # `a` is empty once normalised
        ("the", ["Paris"], False),
        ("", ["Paris"], False),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: bool) -> None:
    assert exact_match(prediction, references) is expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the red house", ["red house"], 1.0),
        ("red house by lake", ["red house"], 2 / 3),  # P 2/4, R 2/2
        ("red", ["red house by lake"], 2 / 5),  # P 1/1, R 1/4
        ("red red house", ["red house house"], 2 / 3),  # repeated words count as often as both have them
        ("b b b b", ["b"], 2 / 5),  # P 1/4, R 1
        ("green", ["red house", "deep green sea"], 1 / 2),  # the best reference
        ("blue", ["red house"], 0.0),
        ("", ["red"], 0.0),
        ("red", ["the"], 0.0),
        ("the", ["a"], 0.0),  # both empty: an exact match in v1.1, and no shared word
    ],
)
def test_f1(prediction: str, references: list[str], expected: float) -> None:
    assert f1(prediction, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [exact_match, f1])
@pytest.mark.parametrize("references", [[], (), "Paris"])
def test_references_are_a_list(metric, references) -> None:
    with pytest.raises(ValueError, match="give a list of at least one text"):
        metric("Paris", references)
