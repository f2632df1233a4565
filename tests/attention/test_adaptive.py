"""An adaptive budget: the heads of a layer share what they keep, by score; in the mask form alone."""

import dataclasses

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention.scorers import SCORERS
from lrsa.attention.selection import SAFEGUARD, share_over_heads
from tests.attention.tensors import COMPARABLE, LOCAL, packed_ids, prompt, random_inputs

TOKENS, PARTITIONS = 120, 13  # S 3, L 8: 3 + 13 * 8 + 13
scorers = pytest.mark.parametrize("scorer", COMPARABLE)
local = pytest.mark.parametrize("scorer", [name for name in COMPARABLE if name in LOCAL])


def config_of(scorer: str, top_k: int = 3, **options) -> SparseAttentionConfig:
    usual = {"sink_size": 3, "lag_size": 8, "chunk_size": 11, "budget": "adaptive"}
    return SparseAttentionConfig(scorer=scorer, top_k=top_k, **(usual | options))


def uneven(seed: int = 0, batch: int = 2):
    """Inputs whose three KV heads differ in how sharply they attend."""
    query, key, value = random_inputs(batch, 6, 3, TOKENS, 16, seed)
    return query, key * torch.tensor([0.1, 1.0, 3.0])[:, None, None], value


def counts(kept: torch.Tensor) -> torch.Tensor:
    """``[B, H, P]`` of the compressed partitions."""
    return kept[..., 3 : 3 + PARTITIONS * 8].unflatten(-1, (PARTITIONS, 8)).sum(-1)


@scorers
@pytest.mark.parametrize("top_k", [0, 1, 3, 6, 8])
def test_each_partition_keeps_the_total_and_each_head_its_safeguard(scorer, top_k):
    query, key, value = uneven()
    kept = kept_tokens(key, value, config_of(scorer, top_k), query=query, **prompt(scorer, 110))
    held = counts(kept)
    assert (held.sum(1) == 3 * top_k).all()
    assert (held >= int(SAFEGUARD * top_k)).all()
    assert kept[..., :3].all() and kept[..., 3 + PARTITIONS * 8 :].all()
    if 0 < top_k < 8:
        assert (held != top_k).any(), "the heads' shares do not differ: a uniform budget would pass"


def test_a_head_that_has_the_least_to_keep_is_left_its_safeguard():
    scores = torch.rand(2, 3, 5, 40, generator=torch.Generator().manual_seed(0)) + 1
    scores[:, 1] /= 10
    held = share_over_heads(scores, 20)
    assert (held[:, 1].sum(-1) == 4).all() and (held.sum((1, 3)) == 60).all()
    best = scores[:, 1].topk(4).indices
    assert held[:, 1].gather(-1, best).all(), "the safeguard is spent on the head's best"


def test_by_hand():
    """Two heads, L 4, K 2, no safeguard (a fifth of 2 rounds to 0): the four highest of all eight scores. Then ties at
    the border, which go to the earlier position, then to the lower head."""
    scores = torch.tensor([[9.0, 1.0, 7.0, 8.0], [2.0, 3.0, 6.0, 0.0]])
    assert share_over_heads(scores[None, :, None], 2)[0, :, 0].tolist() == [[1, 0, 1, 1], [0, 0, 1, 0]]
    scores = torch.tensor([[5.0, 0.0, 5.0, 5.0], [0.0, 5.0, 5.0, 0.0]])
    assert share_over_heads(scores[None, :, None], 2)[0, :, 0].tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    scores = torch.tensor([[5.0, 0.0, 0.0, 5.0], [0.0, 5.0, 0.0, 5.0]])
    assert share_over_heads(scores[None, :, None], 1)[0, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    # K 5 of 6, a safeguard of 1: of head 1's six low scores the best, and nine of the other eleven.
    scores = torch.stack([torch.arange(6.0) + 10, torch.tensor([0.0, 0.0, 4.0, 3.0, 4.0, 1.0])])
    assert share_over_heads(scores[None, :, None], 5)[0, :, 0].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]
    scores[1] = -torch.arange(6.0)
    assert share_over_heads(scores[None, :, None], 1)[0, :, 0].sum(-1).tolist() == [2, 0]


@scorers
def test_heads_of_equal_scores_have_equal_budgets(scorer):
    """One KV head three times: the same tokens as under a uniform budget."""
    query, key, value = (x[:, : x.shape[1] // 3].repeat(1, 3, 1, 1) for x in uneven())
    options = {"query": query, **prompt(scorer, 110)}
    kept = kept_tokens(key, value, config_of(scorer), **options)
    assert torch.equal(kept, kept_tokens(key, value, config_of(scorer, budget="uniform"), **options))


@local
@pytest.mark.parametrize("chunk", [1, 8, 11])
def test_later_tokens_change_nothing(scorer, chunk):
    config, inputs, other = config_of(scorer, chunk_size=chunk), uneven(), uneven(seed=7)
    before = sparse_attention(*inputs, config)
    kept = kept_tokens(*inputs[1:], config, query=inputs[0])
    for cut in (19, 27, 64, 67, 118):
        changed = [torch.cat([x[:, :, :cut], 30 * y[:, :, cut:]], 2) for x, y in zip(inputs, other, strict=True)]
        after = sparse_attention(*changed, config)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        assert not torch.equal(after[:, :, cut:], before[:, :, cut:]), "the change did not act"
        settled = config.geometry.raw_start(config.geometry.compressed(cut))
        shorter = kept_tokens(*(x[:, :, :cut] for x in inputs[1:]), config, query=inputs[0][:, :, :cut])
        assert torch.equal(shorter[..., :settled], kept[..., :settled])


@local
@pytest.mark.parametrize(
    "runs",
    [
        [[(0, 120)], [(0, 67), (-1, 53)]],
        [[(-1, 53), (0, 67)], [(0, 120)]],
        [[(4, 60), (-1, 4), (9, 56)], [(1, 20), (0, 100)]],
    ],
    ids=["right-pads", "left-pads", "packed"],
)
def test_a_document_in_a_row_equals_the_document_alone(scorer, runs):
    config, ids, inputs = config_of(scorer), packed_ids(*runs), uneven()
    together = sparse_attention(*inputs, config, document_ids=ids)
    kept = kept_tokens(*inputs[1:], config, query=inputs[0], document_ids=ids)
    for row, spans in enumerate(runs):
        start = 0
        for document, length in spans:
            own = [x[row : row + 1, :, start : start + length] for x in inputs]
            held = slice(start, start + length)
            start += length
            if document < 0:
                assert not kept[row, :, held].any()
                continue
            assert torch.equal(kept[row : row + 1, :, held], kept_tokens(*own[1:], config, query=own[0]))
            torch.testing.assert_close(
                together[row : row + 1, :, held], sparse_attention(*own, config), rtol=1e-5, atol=2e-6
            )


@scorers
def test_a_full_budget_is_dense_attention(scorer):
    inputs = uneven()
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    found = sparse_attention(*inputs, config_of(scorer, top_k=8), **prompt(scorer, 110))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_each_head_keeps():
    config, (query, key, value) = config_of("snapkv", scorer_args={"window_size": 4}), uneven(batch=1)
    kept = kept_tokens(key, value, config, query=query)
    value.requires_grad_()
    (grad,) = torch.autograd.grad(sparse_attention(query, key, value, config)[:, :, -1].sum(), value)
    assert torch.equal(grad.abs().sum(-1) > 0, kept)


def test_kept_in_hand_is_counted_over_the_heads():
    config, inputs = config_of("h2o"), uneven(batch=1)
    kept = kept_tokens(*inputs[1:], config, query=inputs[0])
    assert torch.equal(sparse_attention(*inputs, config, kept=kept), sparse_attention(*inputs, config))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    sparse_attention(*inputs, config, kept=kept, document_ids=ids)
    moved = kept.clone()
    moved[0, 0, 3:11], moved[0, 1, 3:11] = kept[0, 1, 3:11], kept[0, 0, 3:11]  # a study that swaps two heads
    sparse_attention(*inputs, config, kept=moved)
    kept[0, 0, 3:11] = True
    for options in ({}, {"document_ids": ids}):
        with pytest.raises(ValueError, match=r"tokens a partition in 3 heads together, the config keeps 9 of 24"):
            sparse_attention(*inputs, config, kept=kept, **options)


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - set(COMPARABLE)))
def test_rules_whose_scores_are_of_one_head_are_refused(scorer):
    with pytest.raises(ValueError, match=rf"budget='adaptive' .* scorer='{scorer}' .* snapkv, tova, or budget='unif"):
        config_of(scorer)


def test_it_has_no_share_by_depth():
    config = config_of("tova", dense_layers=(1,))
    assert config.for_layer(0, 3) == config and config.for_layer(1, 3) is None
    assert dataclasses.replace(config, budget="uniform").mask_form_only is None
    assert config.mask_form_only.startswith("budget='adaptive' keeps another number of tokens in each head")
