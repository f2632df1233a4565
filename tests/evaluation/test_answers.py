"""Worked by hand from the definitions of SQuAD v1.1's evaluation and of ROUGE-L."""

import pytest

from lrsa.evaluation.answers import exact_match, f1, normalise, rouge_l


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


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # Lin 2004, section 3.1, its example: LCS 3 of 4 words, then 2 of 4, whatever ROUGE-2 says
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("the cat on a mat", ["the cat sat on the mat"], 8 / 11),  # LCS the-cat-on-mat: P 4/5, R 4/6
        ("The CAT, on a mat!", ["the cat sat on the mat."], 8 / 11),  # neither case nor punctuation counts
        ("b a", ["a b"], 1 / 2),  # the order does, where F1 is 1
        ("to be or not to be", ["to be"], 1 / 2),  # repeated words are words: P 2/6, R 2/2 (LongBench's package: 2/3)
        ("north tower", ["south gate", "the north gate tower"], 2 / 3),  # the best reference: P 2/2, R 2/4
        ("kills", ["kill"], 0.0),  # no stemming
        ("", ["red"], 0.0),
        ("...", ["..."], 0.0),  # no word on either side
    ],
)
def test_rouge_l(prediction: str, references: list[str], expected: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [exact_match, f1, rouge_l])
@pytest.mark.parametrize("references", [[], (), "Paris"])
def test_references_are_a_list(metric, references) -> None:
    with pytest.raises(ValueError, match="give a list of at least one text"):
        metric("Paris", references)
