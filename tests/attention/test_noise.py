"""Noise on the scores of a selection: what it keeps, how often, and where it does not reach."""

import math

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, sparse_attention
from lrsa.attention.noise import logits, noisy_selection
from lrsa.attention.scorers import SCORERS, build_scorer
from lrsa.attention.selection import best
from lrsa.models import get_attention
from tests.architectures import model_of, tokens
from tests.attention.tensors import COMPARABLE, LOCAL, random_inputs

SINK, LAG, KEPT, TOKENS = 3, 8, 3, 50  # four partitions are compressed


def config_of(scorer: str = "lag_relative", **options) -> SparseAttentionConfig:
    return SparseAttentionConfig(scorer=scorer, sink_size=SINK, lag_size=LAG, top_k=KEPT, **options)


def kept(config: SparseAttentionConfig, scale: float, seed: int = 0, inputs=None) -> torch.Tensor:
    query, key, value = inputs or random_inputs(2, 4, 2, TOKENS, 16)
    told = {"prompt_lengths": TOKENS - 2} if config.reads_prompt_lengths else {}
    with noisy_selection(scale, seed):
        return kept_tokens(key, value, config, query=query, **told)


@pytest.mark.parametrize("scorer", LOCAL)
@pytest.mark.parametrize("scale", [0.3, math.inf])
def test_noise_moves_the_selection_and_nothing_else(scorer, scale):
    config = config_of(scorer)
    plain, noisy = kept(config, 0), kept(config, scale)
    assert not torch.equal(plain, noisy)
    last = config.geometry.raw_start(config.geometry.compressed(TOKENS))
    assert noisy[..., :SINK].all() and noisy[..., last:].all()
    assert (noisy[..., SINK:last].unflatten(-1, (-1, LAG)).sum(-1) == KEPT).all()
    assert torch.equal(kept(config, scale), noisy), "a function of the seed"
    assert not torch.equal(kept(config, scale, seed=1), noisy)
    assert torch.equal(kept(config, 0), kept_tokens(*random_inputs(2, 4, 2, TOKENS, 16)[1:], config,
                       query=random_inputs(2, 4, 2, TOKENS, 16)[0])), "a scale of 0 is no noise"  # fmt: skip


@pytest.mark.parametrize(
    ("scorer", "options"),
    [("h2o", {"schedule": "prefill_once"}), *((name, {"budget": "adaptive"}) for name in COMPARABLE if name in LOCAL)],
)
def test_it_reaches_every_way_to_select(scorer, options):
    config = config_of(scorer, **options)
    plain, noisy = kept(config, 0), kept(config, 1.0)
    assert not torch.equal(plain, noisy)
    assert torch.equal(plain.sum((1, 2)), noisy.sum((1, 2)))


def test_rows_heads_and_layers_get_noise_of_their_own():
    config = config_of()
    key = torch.randn(1, 1, TOKENS, 16).expand(2, 2, -1, -1)
    with noisy_selection(math.inf, 0):
        first, second = (kept_tokens(key, key, config) for _ in range(2))
    flags = [*first.flatten(0, 1), *second.flatten(0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(flags) for b in flags[:i])


def test_at_scale_one_tokens_are_kept_in_proportion_to_their_scores():
    """The first of the K draws without replacement: K = 1."""
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(40_000, 4)
    draws = chosen(scores, "h2o", 1.0, count=1)[:, 0]
    shares = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)


@pytest.mark.parametrize("scale", [1e4, math.inf])
def test_with_much_noise_all_are_as_likely(scale):
    scores = torch.tensor([1e-3, 0.2, 0.3, 0.499]).expand(40_000, 4)
    shares = chosen(scores, "h2o", scale, count=2).flatten().bincount(minlength=4) / 40_000
    torch.testing.assert_close(shares, torch.full((4,), 0.5), atol=0.012, rtol=0)


def chosen(scores: torch.Tensor, scorer: str, scale: float, count: int) -> torch.Tensor:
    from lrsa.attention.noise import perturbed

    with noisy_selection(scale, 1):
        return best(perturbed(scores, build_scorer(scorer, {})), count)


def test_a_score_of_nothing_is_kept_last_and_equal_ones_have_no_deviation():
    scores = torch.tensor([[0.0, 0.5, 0.5]])
    assert logits(scores, build_scorer("h2o", {})).isfinite().all()
    assert chosen(scores.expand(2000, 3), "h2o", 1.0, count=2).max(1).values.eq(2).all()
    flat = logits(torch.full((2, 5), -3.0), build_scorer("key_norm", {}))
    assert torch.equal(flat, torch.zeros(2, 5))


def test_what_is_an_amount_is_never_negative():
    """Of others the logarithm would make no sense, so a new rule has to say which it is."""
    from tests.attention.test_scorers import cut

    for name, scorer in SCORERS.items():
        scores = build_scorer(name, {})(cut(name, random_inputs(2, 6, 2, TOKENS, 16)))
        assert not scorer.proportional or (scores >= 0).all(), name
        assert scorer.proportional or not scorer.comparable, name


def test_every_backend_ranks_with_the_same_noise():
    inputs = random_inputs(2, 4, 2, TOKENS, 16)
    outputs = []
    for backend in ("reference", "gather"):
        with noisy_selection(0.5, 7):
            outputs.append(sparse_attention(*inputs, config_of(), backend=backend))
    plain = sparse_attention(*inputs, config_of(), backend="gather")
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert (outputs[1] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_checkpointing_uses_the_selection_of_the_forward_pass_and_keeps_dropout_in_step(dropped):
    """The noise is drawn once, so torch's own generator must not be moved by it: dropout follows in the same layer."""
    config, gradients = config_of(), []
    for checkpointing in (False, True):
        model = model_of("llama", config, gradient_checkpointing=checkpointing).train()
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(dropped))
        ids = tokens(2, 90)
        torch.manual_seed(0)
        with noisy_selection(0.5, 3):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside: what is recomputed does not select
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert get_attention(model) == config and "noise" not in str(model.config.to_dict()["lrsa"])
    for with_graph, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, with_graph)


def test_it_ends_with_its_block_and_refuses_less_than_none():
    config, before = config_of(), kept(config_of(), 0)
    with pytest.raises(RuntimeError, match="stop"), noisy_selection(1.0, 0):
        raise RuntimeError("stop")
    assert torch.equal(kept(config, 0), before)
    for scale in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"scale={scale}: at least 0"), noisy_selection(scale, 0):
            pass
