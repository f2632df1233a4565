"""The gradient of the selection: nothing of the output changes, and scores get what the gate says they should."""

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, flex, kept_tokens, sparse_attention
from lrsa.attention.api import attend_selected
from lrsa.attention.huggingface import set_straight_through
from lrsa.attention.noise import logits, noisy_selection
from lrsa.attention.selection import partition, select
from lrsa.attention.straight_through import DIFFERENTIABLE
from tests.architectures import model_of, tokens
from tests.attention.tensors import LOCAL, random_inputs

TOKENS, SCALE = 50, 0.25


def config_of(scorer: str = "lag_relative", **options) -> SparseAttentionConfig:
    return SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3, **options)


def leaves(seed: int = 0) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in random_inputs(2, 4, 2, TOKENS, 16, seed=seed)]


@pytest.mark.parametrize("scorer", LOCAL)
def test_the_output_is_the_same_and_the_gradient_is_the_scores(scorer):
    """By hand: the gradient of a factor on each kept value, handed on to the logarithm of its score."""
    config, direction = config_of(scorer), torch.randn(2, 4, TOKENS, 16)
    plain = leaves()
    expected = sparse_attention(*plain, config, backend="gather")
    if scorer not in DIFFERENTIABLE:
        with pytest.raises(ValueError, match=f"scorer='{scorer}' carry none: choose one of lag_relative"):
            sparse_attention(*leaves(), config, backend="gather", straight_through=True)
        return
    with_gate = leaves()
    out = sparse_attention(*with_gate, config, backend="gather", straight_through=True)
    assert torch.equal(out, expected)
    before, after = (torch.autograd.grad(x, inputs, direction) for x, inputs in ((expected, plain), (out, with_gate)))

    query, key, value = leaves()
    partitions = config.geometry.selected_partitions(TOKENS)
    index = select(key, value, config, partitions, query=query)
    gate = torch.ones(index.shape, requires_grad=True)
    attended = attend_selected(
        *(x.detach() for x in (query, key, value)), index, config.geometry, SCALE, "gather", gate
    )
    (of_gate,) = torch.autograd.grad(attended, gate, direction)
    rule = config.build_scorer()
    parts = partition(key, value, query if rule.reads_query else None, config.geometry, partitions, 0, SCALE)
    kept = logits(rule(parts), rule).flatten(-2).gather(-1, index - config.sink_size)
    handed_on = torch.autograd.grad(kept, (query, key, value), of_gate, allow_unused=True)
    assert any(more is not None and more.abs().max() > 1e-3 for more in handed_on)
    for with_more, without, more in zip(after, before, handed_on, strict=True):
        torch.testing.assert_close(with_more, without + (0 if more is None else more), atol=1e-5, rtol=1e-4)


def test_the_gate_is_a_factor_of_kept_values_where_they_are_compressed():
    """In float64, against finite differences; a token that is kept is also seen raw by the queries just after it."""
    query, key, value = random_inputs(1, 2, 1, TOKENS, 2, dtype=torch.float64)
    config = config_of()
    index = select(key, value, config, config.geometry.selected_partitions(TOKENS))

    def attend(gate):
        return attend_selected(query, key, value, index, config.geometry, SCALE, "gather", gate)

    ones = torch.ones(index.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, ones)
    first_seen_compressed = config.geometry.first_chunk
    changed = (attend(ones * 2) - attend(ones)).abs().amax((0, 1, 3))
    assert (changed[:first_seen_compressed] == 0).all() and (changed[first_seen_compressed:] > 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_the_same_gate(monkeypatch):
    """Eagerly, which on a CPU is forward alone: what is compiled on a GPU, as it stands."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex._fused)
    query, key, value = random_inputs(1, 2, 1, 300, 16)
    config = SparseAttentionConfig(sink_size=4, lag_size=32, top_k=8)
    index = select(key, value, config, config.geometry.selected_partitions(300))
    gate = torch.rand(index.shape)
    by_gather, by_flex = (
        attend_selected(query, key, value, index, config.geometry, SCALE, backend, gate)
        for backend in ("gather", "flex")
    )
    torch.testing.assert_close(by_flex, by_gather, atol=1e-5, rtol=1e-4)


def test_a_model_trains_through_it_recomputed_or_not_with_noise_and_channels_that_do_not_vary():
    gradients = []
    for checkpointing, on in ((False, True), (True, True), (False, False)):
        model = model_of("llama", config_of(), gradient_checkpointing=checkpointing).train()
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[0] = 0  # a value channel without range
        set_straight_through(model, on)
        ids = tokens(2, 90)
        with noisy_selection(0.02, 1), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert "straight" not in str(model.config.to_dict())
    kept, recomputed, without = gradients
    assert all(gradient.isfinite().all() for gradient in kept)
    for one, other in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(other, one)
    assert any((one - other).abs().max() > 1e-6 for one, other in zip(kept, without, strict=True))


def test_what_has_no_gate_is_refused():
    query, key, value = random_inputs(1, 2, 1, TOKENS, 16)
    with pytest.raises(ValueError, match="backend='reference' has no straight_through: use 'gather'"):
        sparse_attention(query, key, value, config_of(), backend="reference", straight_through=True)
    with pytest.raises(ValueError, match="straight_through=True with kept="):
        kept = kept_tokens(key, value, config_of())
        sparse_attention(query, key, value, config_of(), kept=kept, straight_through=True)
    with pytest.raises(ValueError, match="straight_through=True with schedule='prefill_once'"):
        once = config_of(schedule="prefill_once")
        sparse_attention(query, key, value, once, prompt_lengths=40, straight_through=True)
