"""Gradients in float64 against finite differences, and under activation checkpointing."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lrsa.attention import SparseAttentionConfig, checkpoint_contexts, kept_tokens, sparse_attention
from lrsa.attention.scorers import SCORERS, Partitions, Scorer
from tests.attention.tensors import COMPARABLE, LOCAL, packed_ids, random_inputs

ONCE = {"schedule": "prefill_once"}


@pytest.fixture
def counting_scorer(monkeypatch):
    """Every registered scorer, counting how often it is asked."""
    calls: list[int] = []

    def counted(original):
        def call(self: Scorer, partitions: Partitions):
            calls.append(partitions.layer_idx)
            return original(self, partitions)

        return call

    for scorer in SCORERS.values():
        monkeypatch.setattr(scorer, "__call__", counted(scorer.__call__))
    return calls


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("ids", [None, packed_ids([(-1, 1), (0, 13), (1, 6)])], ids=["one-document", "packed"])
@pytest.mark.parametrize("chunk", [2, 3, 5])
def test_gradcheck_in_float64(chunk, ids, backend):
    config = SparseAttentionConfig(sink_size=1, lag_size=3, top_k=2, chunk_size=chunk)
    inputs = [x.requires_grad_() for x in random_inputs(1, 2, 1, 20, 2, dtype=torch.float64)]
    kept = kept_tokens(inputs[1], inputs[2], config, document_ids=ids)
    assert not kept.all()
    # The selection is piecewise constant: between ties a finite difference does not move it. Assert that it is so here.
    for sign in (1, -1):
        moved = [x.detach() + sign * 1e-5 * torch.randn_like(x) for x in inputs]
        assert torch.equal(kept_tokens(*moved[1:], config, document_ids=ids), kept)
    function = functools.partial(sparse_attention, config=config, backend=backend, document_ids=ids)
    assert torch.autograd.gradcheck(lambda q, k, v: function(q, k, v), inputs, atol=1e-6, fast_mode=False)


@pytest.mark.parametrize(
    ("scorer", "options", "backend"),
    [(scorer, options, backend) for scorer in LOCAL for options in ({}, ONCE) for backend in ("reference", "gather")]
    + [(scorer, {"budget": "adaptive"}, "reference") for scorer in COMPARABLE if scorer in LOCAL],
    ids=lambda x: "".join(x.values()) or "chunked" if isinstance(x, dict) else x,
)
def test_checkpointing_keeps_the_selection_and_the_gradients(scorer, options, backend, counting_scorer):
    config = SparseAttentionConfig(scorer=scorer, sink_size=1, lag_size=8, top_k=2, **options)
    told = {"prompt_lengths": 60} if config.reads_prompt_lengths else {}
    weight = torch.eye(16) + 0.1

    def block(q, k, v):
        return sparse_attention(q @ weight, k @ weight, v @ weight, config, backend=backend, **told).tanh()

    def gradients(run):
        leaves = [x.requires_grad_() for x in random_inputs(1, 4, 2, 80, 16)]
        out = run(*leaves)
        counted = len(counting_scorer)
        return counted, [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    before, plain = gradients(block)
    assert before == len(counting_scorer) == 1
    counting_scorer.clear()
    before, saved = gradients(lambda *x: checkpoint(block, *x, use_reentrant=False, context_fn=checkpoint_contexts))
    assert before == 1
    assert len(counting_scorer) == 1, "the backward pass selected again"
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_plain_checkpointing_selects_twice_so_the_count_above_means_something(counting_scorer):
    config = SparseAttentionConfig(sink_size=1, lag_size=8, top_k=2)
    leaves = [x.requires_grad_() for x in random_inputs(1, 4, 2, 80, 16)]
    out = checkpoint(lambda *x: sparse_attention(*x, config, backend="gather"), *leaves, use_reentrant=False)
    out.sum().backward()
    assert len(counting_scorer) == 2


def test_checkpointing_of_packed_rows(counting_scorer):
    config = SparseAttentionConfig(sink_size=1, lag_size=8, top_k=2)
    ids = packed_ids([(0, 50), (1, 30)])
    run = functools.partial(sparse_attention, config=config, document_ids=ids, backend="gather")

    def gradients(**options):
        counting_scorer.clear()
        leaves = [x.requires_grad_() for x in random_inputs(1, 4, 2, 80, 16)]
        out = checkpoint(lambda q, k, v: run(q, k, v), *leaves, use_reentrant=False, **options)
        return torch.autograd.grad(out.square().sum(), leaves), len(counting_scorer)

    saved, selections = gradients(context_fn=checkpoint_contexts)
    plain, _ = gradients()
    assert selections == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_backward_twice_through_a_kept_graph_gives_the_same():
    config = SparseAttentionConfig(sink_size=1, lag_size=8, top_k=2)
    leaves = [x.requires_grad_() for x in random_inputs(1, 4, 2, 80, 16)]
    out = sparse_attention(*leaves, config, backend="gather").square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, leaves), strict=True))


def test_second_derivatives_are_refused_not_wrong():
    config = SparseAttentionConfig(sink_size=1, lag_size=8, top_k=2)
    leaves = [x.requires_grad_() for x in random_inputs(1, 2, 1, 60, 8)]
    out = sparse_attention(*leaves, config, backend="gather").square().sum()
    (grad, *_) = torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
