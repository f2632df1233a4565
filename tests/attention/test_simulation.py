"""Parallel and mask form against caches fed token by token (`simulation`), over random geometries."""

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrsa.attention import SparseAttentionConfig, kept_tokens, slots, sparse_attention, visibility_mask
from lrsa.attention.scorers import Partitions, build_scorer
from tests.attention import simulation
from tests.attention.tensors import LOCAL, random_inputs

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32 against float64, logits of a few units


@st.composite
def problems(draw):
    lag = draw(st.integers(1, 9), "lag")
    rule = simulation.Rule(
        sink=draw(st.integers(0, 5), "sink"),
        lag=lag,
        kept=draw(st.integers(0, lag), "kept"),
        chunk=draw(st.sampled_from([1, max(1, lag - 1), lag, lag + 1, 2 * lag, 2 * lag + 3]), "chunk"),
    )
    first = rule.sink + 2 * rule.lag
    long = st.integers(first, first + 5 * lag + 3)
    tokens = draw(st.one_of(long, long, long, st.integers(1, first)), "tokens")
    heads = draw(st.integers(1, 2), "heads")
    group = draw(st.sampled_from([1, 2, 3]), "group")
    dim = draw(st.sampled_from([2, 3, 8, 16]), "dim")
    inputs = random_inputs(1, heads * group, heads, tokens, dim, seed=draw(st.integers(0, 2**16), "seed"))
    return rule, inputs, draw(st.integers(0, 3), "layer")


def _configure(scorer: str, rule: simulation.Rule, **scorer_args) -> SparseAttentionConfig:
    return SparseAttentionConfig(
        scorer=scorer, scorer_args=scorer_args, sink_size=rule.sink, lag_size=rule.lag, top_k=rule.kept,
        chunk_size=rule.chunk,
    )  # fmt: skip


def _scorer_of_one_partition(name: str, query, key, value, layer: int, kept: int):
    """Any scorer, asked about one partition of one head at a time, with nothing else in its sight."""
    scorer = build_scorer(name, {})
    group = query.shape[1] // key.shape[1]

    def scores(head: int, members, lag):
        queries = query[:, head * group : (head + 1) * group, None]  # [1, G, 1, T, D]
        # The other heads are NaN: a score may depend on the head's index, never on another head's keys.
        k, v = (torch.full_like(x, torch.nan) for x in (key, value))
        k[:, head], v[:, head] = key[:, head], value[:, head]
        q = torch.full((1, key.shape[1], *queries.shape[1:]), torch.nan)
        q[:, head] = queries[0]
        partitions = Partitions(
            key=k[:, :, None, members], value=v[:, :, None, members],
            lag_key=k[:, :, None, lag], lag_value=v[:, :, None, lag],
            lag_query=q[..., lag, :] if scorer.reads_query else None,
            positions=torch.tensor([members]), layer_idx=layer, scale=query.shape[-1] ** -0.5, kept=kept,
        )  # fmt: skip
        return scorer(partitions)[0, head, 0].tolist()

    return scores


def _assert_equal_to_simulation(config, rule, inputs, layer, scores) -> None:
    query, key, value = inputs
    heads, tokens = key.shape[1:3]
    q, k, v = (x[0].double().numpy() for x in inputs)
    simulated = simulation.simulate(q, k, v, rule, scores)
    assume(not simulated.near_tie)

    for t in {tokens, max(1, tokens - rule.lag)}:
        kept = kept_tokens(key[:, :, :t], value[:, :, :t], config, query=query[:, :, :t], layer_idx=layer)
        for head in range(heads):
            assert kept[0, head].nonzero()[:, 0].tolist() == simulated.held[head][t]
            assert len(simulated.held[head][t]) == slots(config, t)

    kept = kept_tokens(key, value, config, query=query, layer_idx=layer)
    visible = visibility_mask(kept, config)
    for head in range(heads):
        for i in range(tokens):
            assert visible[0, head, i].nonzero()[:, 0].tolist() == simulated.attended[head][i]
    assert config.geometry.pairs(tokens) == visible[0, 0].sum()

    for backend in ("reference", "gather"):
        out = sparse_attention(query, key, value, config, layer_idx=layer, backend=backend)
        np.testing.assert_allclose(out[0].numpy(), simulated.output, **TOLERANCE, err_msg=backend)


@settings(deadline=None, max_examples=600, derandomize=True)
@given(problems(), st.sampled_from([0.0, 0.5, 1.0]))
def test_lag_relative_in_plain_loops(problem, weight):
    rule, inputs, layer = problem
    _, k, v = (x[0].double().numpy() for x in inputs)
    scores = simulation.lag_relative_scores(k, v, weight)
    _assert_equal_to_simulation(_configure("lag_relative", rule, value_weight=weight), rule, inputs, layer, scores)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(problems())
def test_tova_in_plain_loops(problem):
    rule, inputs, layer = problem
    q, k, _ = (x[0].double().numpy() for x in inputs)
    _assert_equal_to_simulation(_configure("tova", rule), rule, inputs, layer, simulation.tova_scores(q, k))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(problems())
def test_recency_in_plain_loops(problem):
    rule, inputs, layer = problem
    _assert_equal_to_simulation(_configure("recency", rule), rule, inputs, layer, simulation.recency_scores)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(problems(), st.sampled_from(LOCAL))
def test_every_scorer_reads_a_partition_and_its_lag_alone(problem, name):
    rule, inputs, layer = problem
    scores = _scorer_of_one_partition(name, *inputs, layer, rule.kept)
    _assert_equal_to_simulation(_configure(name, rule), rule, inputs, layer, scores)


def test_the_simulation_compresses_and_forgets():
    """The oracle itself, on a case small enough to write down: S 1, L 2, K 1, C 2, the newer of two is kept."""
    rule = simulation.Rule(sink=1, lag=2, kept=1, chunk=2)
    x = np.ones((1, 9, 2))
    simulated = simulation.simulate(x, x, x, rule, simulation.recency_scores)
    assert simulated.attended[0][4] == [0, 1, 2, 3, 4]
    assert simulated.attended[0][5] == [0, 2, 3, 4, 5]
    assert simulated.attended[0][6] == [0, 2, 3, 4, 5, 6]
    assert simulated.attended[0][7] == [0, 2, 4, 5, 6, 7]
    assert simulated.held[0][9] == [0, 2, 4, 6, 7, 8]
