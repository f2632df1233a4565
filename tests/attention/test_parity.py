"""The gather form against the mask form: every scorer, forward and all three gradients, awkward shapes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention, visibility_mask
from tests.attention.tensors import (
    LOCAL,
    assert_no_worse,
    attend,
    forward_and_gradients,
    naive_attention,
    packed_ids,
    random_inputs,
)


@dataclass(frozen=True)
class Case:
    """B, Hq, H, T, D of the tensors; S, L, K, C of the rule; rows of (document id, length) runs, -1 a pad."""

    shape: tuple[int, int, int, int, int]
    rule: tuple[int, int, int, int]
    rows: tuple[tuple[tuple[int, int], ...], ...] | None = None

    def config(self, scorer: str) -> SparseAttentionConfig:
        sink, lag, kept, chunk = self.rule
        return SparseAttentionConfig(scorer=scorer, sink_size=sink, lag_size=lag, top_k=kept, chunk_size=chunk)

    @property
    def document_ids(self) -> Tensor | None:
        return None if self.rows is None else packed_ids(*self.rows)


CASES = {
    "T63-no-sinks": Case((1, 2, 2, 63, 16), (0, 8, 2, 8)),
    "T111-K-equals-L": Case((2, 3, 1, 111, 32), (4, 16, 16, 16)),
    "T129-9-over-3-heads-nothing-kept-C-below-L": Case((1, 9, 3, 129, 64), (16, 16, 0, 5)),
    "T200-4-over-1-heads-D128-C-below-L": Case((1, 4, 1, 200, 128), (5, 16, 8, 7)),
    "T333-D24-C-above-L": Case((2, 6, 2, 333, 24), (0, 32, 8, 96)),
    "T400-C1": Case((1, 2, 1, 400, 16), (3, 32, 8, 1)),
    "T511-one-kept-C-not-a-multiple": Case((1, 4, 1, 511, 40), (1, 64, 1, 80)),
    "T777-published-geometry": Case((1, 3, 1, 777, 64), (16, 128, 32, 128)),
    "T600-long-first-chunk": Case((1, 4, 4, 600, 16), (7, 200, 50, 200)),
    "T100-no-sinks-nothing-kept": Case((1, 2, 1, 100, 16), (0, 8, 0, 8)),
    "T90-partition-of-one-token": Case((1, 2, 1, 90, 16), (2, 1, 1, 3)),
    "T63-shorter-than-first-chunk": Case((1, 2, 1, 63, 16), (16, 32, 8, 32)),
    "T63-exactly-compressed-once": Case((1, 2, 1, 63, 16), (14, 24, 6, 24)),
    "right-pads": Case((3, 4, 1, 150, 16), (4, 16, 4, 16), (((0, 150),), ((0, 97), (-1, 53)), ((0, 20), (-1, 130)))),
    "left-pads": Case((3, 3, 1, 150, 16), (4, 16, 4, 24), (((0, 150),), ((-1, 53), (0, 97)), ((-1, 149), (7, 1)))),
    "packed": Case((2, 2, 2, 300, 32), (0, 16, 5, 16), (((0, 130), (1, 70), (2, 100)), ((5, 1), (3, 298), (0, 1)))),
    "packed-between-pads-C-below-L": Case(
        (2, 4, 1, 160, 16), (2, 16, 0, 5), (((-1, 9), (0, 60), (-1, 11), (1, 80)), ((0, 80), (1, 70), (-1, 10)))
    ),
    "a-row-of-pads": Case((3, 2, 1, 90, 16), (2, 8, 2, 8), (((0, 90),), ((-1, 90),), ((0, 50), (-1, 40)))),
}  # fmt: skip


def both(case: Case, config: SparseAttentionConfig, inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gather and reference on ``inputs``, and float64 with the selection that ``inputs`` lead to."""
    query, key, value = inputs
    options = {"document_ids": case.document_ids}
    kept = kept_tokens(key, value, config, query=query, **options)
    exact = forward_and_gradients(attend(config, "reference", kept=kept, **options), *(x.double() for x in inputs))
    plain = forward_and_gradients(attend(config, "reference", **options), *inputs)
    fast = forward_and_gradients(attend(config, "gather", **options), *inputs)
    return fast, plain, exact


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scorer", LOCAL)
def test_gather_equals_reference_forward_and_gradients(scorer, name):
    case = CASES[name]
    inputs = random_inputs(*case.shape)
    config = case.config(scorer)
    assert_no_worse(*both(case, config, inputs))
    visible = visibility_mask(
        kept_tokens(inputs[1], inputs[2], config, query=inputs[0], document_ids=case.document_ids),
        config,
        document_ids=case.document_ids,
    )
    if case.rule[2] < case.rule[1] and "shorter" not in name:
        causal = visibility_mask(torch.ones_like(visible[..., 0]), config, document_ids=case.document_ids)
        assert visible.sum() < causal.sum(), "the case compresses nothing"


@pytest.mark.parametrize("scorer", LOCAL)
@pytest.mark.parametrize("name", ["T129-9-over-3-heads-nothing-kept-C-below-L", "T777-published-geometry"])
def test_bfloat16_is_as_good_as_naive_bfloat16(scorer, name):
    case = CASES[name]
    inputs = random_inputs(*case.shape, dtype=torch.bfloat16)
    config = case.config(scorer)
    fast, plain, exact = both(case, config, inputs)
    mask = visibility_mask(kept_tokens(inputs[1], inputs[2], config, query=inputs[0]), config)
    naive = forward_and_gradients(lambda q, k, v: naive_attention(q, k, v, mask), *inputs)
    assert_no_worse(fast, naive, exact)
    assert_no_worse(plain, naive, exact)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_kept_in_hand_equals_selecting(backend):
    for case in (CASES["packed-between-pads-C-below-L"], CASES["packed"], CASES["T777-published-geometry"]):
        config, ids = case.config("lag_relative"), case.document_ids
        inputs = random_inputs(*case.shape)
        kept = kept_tokens(*inputs[1:], config, document_ids=ids)
        selecting = forward_and_gradients(attend(config, backend, document_ids=ids), *inputs)
        given = forward_and_gradients(attend(config, backend, document_ids=ids, kept=kept), *inputs)
        assert all(torch.equal(a, b) for a, b in zip(selecting, given, strict=True))


def test_kept_of_another_rule_changes_the_output():
    case = CASES["T333-D24-C-above-L"]
    inputs = random_inputs(*case.shape)
    kept = kept_tokens(*inputs[1:], case.config("random"))
    config = case.config("lag_relative")
    reference, gather = (sparse_attention(*inputs, config, kept=kept, backend=b) for b in ("reference", "gather"))
    torch.testing.assert_close(gather, reference)
    assert not torch.allclose(gather, sparse_attention(*inputs, config, backend="gather"))


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("rows", [None, (((0, 40), (1, 60)),)], ids=["one-document", "packed"])
def test_kept_with_a_wrong_count_is_refused(backend, rows):
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=3)
    query, key, value = random_inputs(1, 2, 1, 100, 16)
    ids = None if rows is None else packed_ids(*rows)
    kept = kept_tokens(key, value, config, document_ids=ids)
    kept[0, 0, 2 + 8 : 2 + 16] = True  # the second partition of the first document
    with pytest.raises(ValueError, match=r"between 3 and 8 tokens a partition, the config keeps 3 of 8"):
        sparse_attention(query, key, value, config, kept=kept, document_ids=ids, backend=backend)


def test_auto_on_the_cpu_is_gather():
    inputs = random_inputs(1, 2, 1, 100, 16)
    config = SparseAttentionConfig(sink_size=2, lag_size=8)
    assert torch.equal(sparse_attention(*inputs, config), sparse_attention(*inputs, config, backend="gather"))


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_scale_reaches_logits_and_query_reading_scorers(backend):
    config = SparseAttentionConfig(scorer="tova", sink_size=0, lag_size=8, top_k=2)
    query, key, value = random_inputs(1, 4, 2, 90, 16)
    scaled = sparse_attention(query, key, value, config, scale=1.0, backend=backend)
    torch.testing.assert_close(
        scaled, sparse_attention(query * 4, key, value, config, backend=backend), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(scaled, sparse_attention(query, key, value, config, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_views_and_expanded_gradients_are_as_good_as_contiguous_ones(backend):
    """transformers hands over transposed views, and a sum's gradient has stride 0."""
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=3)
    inputs = random_inputs(2, 6, 2, 77, 16)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    outs = []
    for leaves in (views, plain):
        out = sparse_attention(*leaves, config, backend=backend)
        out.sum().backward()
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1])
    for view, contiguous in zip(views, plain, strict=True):
        torch.testing.assert_close(view.grad, contiguous.grad)


def test_gradient_of_one_input_alone():
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=3)
    inputs = random_inputs(1, 2, 1, 77, 16)
    every = forward_and_gradients(attend(config, "gather"), *inputs)
    for which in range(3):
        leaves = [x.clone().requires_grad_(i == which) for i, x in enumerate(inputs)]
        direction = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
        sparse_attention(*leaves, config, backend="gather").backward(direction)
        torch.testing.assert_close(leaves[which].grad, every[1 + which])
        assert all(x.grad is None for i, x in enumerate(leaves) if i != which)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)],
                         ids=["float32", "rotary-left-float32"])  # fmt: skip
@pytest.mark.parametrize("document_ids", [None, packed_ids([(0, 60), (1, 40)])], ids=["one-document", "packed"])
def test_autocast_runs_forward_and_backward(dtypes, document_ids):
    """transformers' rotary embedding gives float32 queries and keys beside bfloat16 values under autocast."""
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=3)
    inputs = [x.to(d) for x, d in zip(random_inputs(1, 4, 2, 100, 16), dtypes, strict=True)]
    exact = forward_and_gradients(attend(config, "reference", document_ids=document_ids),
                                  *(x.float() for x in inputs))  # fmt: skip

    def run(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return sparse_attention(q, k, v, config, document_ids=document_ids, backend="gather")

    for fast, plain in zip(forward_and_gradients(run, *inputs), exact, strict=True):
        torch.testing.assert_close(fast.float(), plain, rtol=0.05, atol=0.05)
