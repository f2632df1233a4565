"""Cases whose right answer is known without the rule's details: dense limits, causality, ties, degenerate inputs."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from tests.attention.tensors import FORMS, LOCAL, assert_no_worse, attend, forward_and_gradients, prompt, random_inputs

backends = pytest.mark.parametrize("backend", ["reference", "gather"])
forms = pytest.mark.parametrize(("scorer", "backend"), FORMS)
local_forms = pytest.mark.parametrize(("scorer", "backend"), [form for form in FORMS if form[0] in LOCAL])


def dense(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def assert_dense(config, inputs, backend, **options):
    fast = forward_and_gradients(attend(config, backend, **options), *inputs)
    plain = forward_and_gradients(dense, *inputs)
    exact = forward_and_gradients(dense, *(x.double() for x in inputs))
    assert_no_worse(fast, plain, exact)


@forms
def test_keeping_all_is_dense_attention(scorer, backend):
    for sink, lag, chunk in ((0, 8, 8), (5, 16, 3), (3, 16, 40)):
        config = SparseAttentionConfig(scorer=scorer, sink_size=sink, lag_size=lag, top_k=lag, chunk_size=chunk)
        assert_dense(config, random_inputs(2, 4, 2, 111, 16), backend, **prompt(scorer, 90))
    config = SparseAttentionConfig(scorer=scorer, sink_size=4, lag_size=16, keep_ratio=1.0)
    assert_dense(config, random_inputs(1, 3, 1, 130, 32), backend, **prompt(scorer, 90))


@forms
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 47])
def test_shorter_than_the_first_chunk_is_dense_attention(tokens, scorer, backend):
    config = SparseAttentionConfig(scorer=scorer, sink_size=16, lag_size=16, top_k=0)
    inputs = random_inputs(2, 4, 2, tokens, 16)
    assert_dense(config, inputs, backend)
    assert kept_tokens(inputs[1], inputs[2], config, query=inputs[0]).all()


@backends
def test_the_first_token_after_the_first_chunk_is_the_first_to_lose_keys(backend):
    config = SparseAttentionConfig(scorer="recency", sink_size=4, lag_size=8, top_k=0)
    inputs = random_inputs(1, 2, 1, 21, 16)
    difference = (sparse_attention(*inputs, config, backend=backend) - dense(*inputs)).abs().amax((0, 1, 3))
    assert difference[:20].max() < 1e-5
    assert difference[20] > 1e-3


@backends
def test_a_dense_layer_is_dense(backend):
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=1, dense_layers=(0, 3))
    inputs = random_inputs(1, 4, 2, 90, 16)
    assert_dense(config, inputs, backend, layer_idx=3)
    assert kept_tokens(inputs[1], inputs[2], config, layer_idx=3).all()
    assert not torch.allclose(sparse_attention(*inputs, config, layer_idx=1, backend=backend), dense(*inputs))


@local_forms
@pytest.mark.parametrize("chunk", [1, 8, 20])
def test_the_future_never_reaches_the_past(chunk, scorer, backend):
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3, chunk_size=chunk)
    inputs = random_inputs(2, 4, 2, 120, 16)
    before = sparse_attention(*inputs, config, backend=backend)
    other = random_inputs(2, 4, 2, 120, 16, seed=9)
    for cut in (1, 2, 3, 18, 19, 26, 27, 28, 64, 67, 118):
        changed = [torch.cat([x[:, :, :cut], 30 * y[:, :, cut:]], 2) for x, y in zip(inputs, other, strict=True)]
        after = sparse_attention(*changed, config, backend=backend)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut]), f"tokens from {cut} on reached earlier output"
        assert ((after - before)[:, :, cut:].abs().amax((1, 3)) > 1e-3).all(), "the change did not act"


@local_forms
def test_a_longer_row_continues_a_shorter_one(scorer, backend):
    """The function of the prefix alone: where the row ends changes nothing (to rounding: kernels see other shapes)."""
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3, chunk_size=11)
    inputs = random_inputs(1, 4, 2, 120, 16)
    whole = sparse_attention(*inputs, config, backend=backend)
    for stop in (1, 19, 30, 31, 63, 119):
        part = sparse_attention(*(x[:, :, :stop] for x in inputs), config, backend=backend)
        torch.testing.assert_close(part, whole[:, :, :stop], rtol=1e-5, atol=1e-5)


@forms
def test_rows_of_a_batch_do_not_meet(scorer, backend):
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3)
    inputs = random_inputs(4, 4, 2, 90, 16)
    lengths = torch.tensor([80, 61, 90, 40])

    def attend_rows(rows):
        options = prompt(scorer, lengths[rows])
        return sparse_attention(*(x[rows] for x in inputs), config, backend=backend, **options)

    order = torch.tensor([2, 0, 3, 1])
    whole = attend_rows(torch.arange(4))
    torch.testing.assert_close(attend_rows(order), whole[order], rtol=1e-5, atol=1e-6)
    alone = torch.cat([attend_rows(torch.tensor([i])) for i in range(4)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)


@forms
def test_query_heads_see_the_keys_of_their_own_group(scorer, backend):
    """Heads h*G .. h*G+G-1 share KV head h, as transformers' repeat_kv lays them out."""
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3)
    query, key, value = random_inputs(1, 6, 2, 90, 16)
    options = {"backend": backend, **prompt(scorer, 80)}
    before = sparse_attention(query, key, value, config, **options)
    after = sparse_attention(query, key, torch.cat([value[:, :1], -value[:, 1:]], 1), config, **options)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


@forms
@pytest.mark.parametrize("what", ["zero", "one-token-repeated", "constant-channels", "huge", "tiny"])
def test_degenerate_channels_give_no_nan(what, scorer, backend):
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3)
    inputs = random_inputs(1, 4, 2, 90, 16)
    if what == "zero":
        inputs = tuple(torch.zeros_like(x) for x in inputs)
    elif what == "one-token-repeated":
        inputs = tuple(x[:, :, :1].expand_as(x) for x in inputs)
    elif what == "constant-channels":
        inputs = tuple(torch.cat([x[..., :9], torch.full_like(x[..., 9:], 2.5)], -1) for x in inputs)
    elif what == "huge":
        inputs = (inputs[0] * 1e-15, inputs[1] * 1e18, inputs[2] * 1e18)
    else:
        inputs = (inputs[0], inputs[1] * 1e-30, inputs[2] * 1e-30)
    found = forward_and_gradients(attend(config, backend, **prompt(scorer, 80)), *inputs)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
def test_ties_keep_the_earlier_positions(scorer):
    for lag in (8, 33, 700):  # sorting algorithms change with the length
        config = SparseAttentionConfig(scorer=scorer, sink_size=2, lag_size=lag, top_k=lag // 3)
        inputs = [torch.ones(1, 2, 2 + 4 * lag, 4) for _ in range(3)]
        kept = kept_tokens(inputs[1], inputs[2], config, query=inputs[0])
        expected = torch.ones_like(kept)
        expected[..., 2 : 2 + 3 * lag] = (torch.arange(lag) < lag // 3).repeat(3)
        assert torch.equal(kept, expected)


def test_a_tie_at_the_border_keeps_the_earlier_of_two():
    config = SparseAttentionConfig(sink_size=0, lag_size=8, top_k=2)
    key = random_inputs(1, 1, 1, 16, 8)[1]
    far = torch.tensor([50.0, -50.0] * 4)
    for high, expected in (((1, 4, 6), [1, 4]), ((0, 6, 7), [0, 6]), ((5, 6, 7), [5, 6])):
        outlier = key.clone()
        outlier[:, :, list(high)] = far
        kept = kept_tokens(outlier, outlier, config)
        assert kept[0, 0, :8].nonzero()[:, 0].tolist() == expected


@forms
def test_selection_carries_no_gradient_and_kept_values_do(scorer, backend):
    config, options = SparseAttentionConfig(scorer=scorer, sink_size=2, lag_size=8, top_k=2), prompt(scorer, 55)
    query, key, value = random_inputs(1, 2, 1, 60, 16)
    kept = kept_tokens(key, value, config, query=query, **options)
    assert not kept_tokens(key.requires_grad_(), value, config, query=query, **options).requires_grad
    value.requires_grad_()
    out = sparse_attention(query, key, value, config, backend=backend, **options)
    (grad,) = torch.autograd.grad(out[:, :, -1].sum(), value)
    assert torch.equal(grad.abs().sum(-1) > 0, kept), "the last query reaches what is kept, and nothing else"


@backends
def test_no_gradient_is_no_graph(backend):
    config = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=2)
    inputs = random_inputs(1, 2, 1, 60, 16)
    expected = sparse_attention(*inputs, config, backend=backend)
    with torch.inference_mode():
        assert torch.equal(sparse_attention(*inputs, config, backend=backend), expected)
    with torch.no_grad():
        assert not sparse_attention(*(x.requires_grad_() for x in inputs), config, backend=backend).requires_grad
