"""Which examples an arm wins and loses."""

import numpy as np
import pytest

from lrsa.results import outcomes_frame
from lrsa.results.examples import compare_examples
from tests.results.conftest import MakeRun

RIGHT = np.array


def test_examples_are_won_lost_or_alike(make_run: MakeRun) -> None:
    dense = make_run(
        "dense", {("a", 1): RIGHT([1, 1, 0, 0]), ("a", 4): RIGHT([1, 0, 0, 0]), ("a", None): RIGHT([0] * 4)}
    )
    lrsa = make_run("lrsa", {("a", 1): RIGHT([1, 0, 0, 0]), ("a", 4): RIGHT([1, 1, 1, 0])})
    found = compare_examples(outcomes_frame([dense, lrsa]), "lrsa", "dense")
    assert list(found["column"].unique()) == ["full", "4x"], "the floor was asked of one arm alone"
    assert found[found["column"] == "full"]["change"].tolist() == ["both", "lost", "neither", "neither"]
    assert found[found["column"] == "4x"]["change"].tolist() == ["both", "won", "won", "neither"]
    assert found[found["column"] == "4x"]["id"].tolist() == [f"a-{i}" for i in range(4)]


def test_seeds_are_averaged_and_the_floor_is_compared_too(make_run: MakeRun) -> None:
    runs = [
        make_run("dense", {("a", None): RIGHT([1, 0])}),
        make_run("dense", {("a", None): RIGHT([0, 1])}, seed=1),
        make_run("lrsa", {("a", None): RIGHT([0, 1])}),
        make_run("lrsa", {("a", None): RIGHT([1, 1])}, seed=1),
    ]
    found = compare_examples(outcomes_frame(runs), "lrsa", "dense")
    assert found["dense"].tolist() == [0.5, 0.5] and found["lrsa"].tolist() == [0.5, 1.0]
    assert found["change"].tolist() == ["equal", "won"]


def test_what_cannot_be_compared_is_named(make_run: MakeRun) -> None:
    runs = [make_run("dense", {("a", 1): RIGHT([1])}), make_run("lrsa", {("b", 1): RIGHT([1])})]
    outcomes = outcomes_frame(runs)
    with pytest.raises(ValueError, match="no outcome of arm 'snapkv'; arms there: dense, lrsa"):
        compare_examples(outcomes, "snapkv", "dense")
    with pytest.raises(ValueError, match="hold no 'f1'"):
        compare_examples(outcomes, "lrsa", "dense", metric="f1")
    with pytest.raises(ValueError, match="no example in common"):
        compare_examples(outcomes, "lrsa", "dense")
