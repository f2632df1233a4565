"""Schedule ``prefill_once``: the rule by hand, its two tensor forms, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lrsa.attention import SparseAttentionConfig, kept_tokens, slots, sparse_attention, visibility_mask
from lrsa.attention.scorers import SCORERS
from lrsa.models import make_cache, set_attention, target_logits
from tests.architectures import model_of, tokens
from tests.attention.tensors import LOCAL, attend, forward_and_gradients, packed_ids, random_inputs
from tests.cache.test_feeding import NEAR

SINK, WINDOW, PROMPT, TOKENS = 3, 8, 50, 63
RANKED = PROMPT - SINK - WINDOW
scorers = pytest.mark.parametrize("name", LOCAL)


def config_of(scorer: str = "snapkv", **options) -> SparseAttentionConfig:
    amount = {} if "top_k" in options else {"keep_ratio": 0.3}
    usual = {"sink_size": SINK, "lag_size": WINDOW, "schedule": "prefill_once"}
    return SparseAttentionConfig(scorer=scorer, **(usual | amount | options))


@scorers
@pytest.mark.parametrize(
    "options", [{"keep_ratio": 0.3}, {"keep_ratio": 1 / 39}, {"top_k": 20}, {"top_k": 999}], ids=str
)
def test_each_head_keeps_as_many_as_it_should(name, options):
    query, key, value = random_inputs(2, 6, 2, TOKENS, 16)
    config = config_of(name, **options)
    kept = kept_tokens(key, value, config, query=query, prompt_lengths=PROMPT)
    count = min(options["top_k"], RANKED) if "top_k" in options else int(options["keep_ratio"] * RANKED + 1e-9)
    assert kept[..., :SINK].all() and kept[..., PROMPT - WINDOW :].all()
    assert (kept[..., SINK : PROMPT - WINDOW].sum(-1) == count).all()
    assert slots(config, PROMPT) == config.held(PROMPT) == SINK + WINDOW + count == kept[0, 0, :PROMPT].sum()


@scorers
def test_the_parallel_form_is_the_mask_form_with_its_gradients(name):
    inputs, config = random_inputs(2, 6, 2, TOKENS, 16), config_of(name)
    lengths = torch.tensor([PROMPT, 37])
    forms = [
        forward_and_gradients(attend(config, backend, prompt_lengths=lengths), *inputs)
        for backend in ("reference", "auto", "gather", "flex")
    ]
    for form in forms[1:]:
        for found, expected in zip(form, forms[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    dense = sparse_attention(*inputs, config_of(name, keep_ratio=1.0), prompt_lengths=lengths)
    assert (forms[0][0] - dense)[0, :, :PROMPT].abs().max() < 1e-5, "the prompt attends densely"
    assert (forms[0][0] - dense)[0, :, PROMPT:].abs().max() > 1e-2, "nothing was compressed"


def test_the_mask_is_the_rule_spelled_out():
    query, key, value = random_inputs(1, 2, 1, TOKENS, 16)
    kept = kept_tokens(key, value, config_of(), query=query, prompt_lengths=PROMPT)
    mask = visibility_mask(kept, config_of(), prompt_lengths=PROMPT)[0, 0]
    for i in range(TOKENS):
        for j in range(TOKENS):
            assert mask[i, j] == (j <= i and (i < PROMPT or j >= PROMPT or bool(kept[0, 0, j])))


@pytest.mark.parametrize("length", [1, 2, SINK, SINK + WINDOW, SINK + WINDOW + 1])
def test_short_prompts(length):
    """Nothing is ranked up to S + W tokens; of one, int(0.3) = 0 stay."""
    inputs = random_inputs(1, 4, 2, 20, 16)
    kept = kept_tokens(inputs[1], inputs[2], config_of(), query=inputs[0], prompt_lengths=length)
    dropped = (~kept[0, 0]).nonzero()[:, 0].tolist()
    assert dropped == ([SINK] if length > SINK + WINDOW else [])
    forms = [sparse_attention(*inputs, config_of(), prompt_lengths=length, backend=b) for b in ("reference", "auto")]
    torch.testing.assert_close(*forms, rtol=1e-4, atol=1e-5)


@scorers
def test_a_full_budget_is_dense_attention(name):
    inputs = random_inputs(2, 4, 2, TOKENS, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    for config in (config_of(name, keep_ratio=1.0), config_of(name, dense_layers=(0,))):
        out = sparse_attention(*inputs, config, prompt_lengths=PROMPT)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


@scorers
def test_what_follows_the_prompt_changes_neither_what_is_before_nor_what_is_kept(name):
    inputs, config = random_inputs(1, 4, 2, TOKENS, 16), config_of(name)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, PROMPT + 4 :] += 1
    before, after = (sparse_attention(*x, config, prompt_lengths=PROMPT) for x in (inputs, changed))
    assert torch.equal(before[:, :, :PROMPT], after[:, :, :PROMPT])
    torch.testing.assert_close(before[:, :, : PROMPT + 4], after[:, :, : PROMPT + 4])
    assert (before - after)[:, :, PROMPT + 4 :].abs().max() > 0.1
    kept = [kept_tokens(k, v, config, query=q, prompt_lengths=PROMPT) for q, k, v in (inputs, changed)]
    assert torch.equal(*kept)


@pytest.mark.parametrize("sink", [0, SINK])
def test_snapkv_by_the_formula(sink):
    """The published rule for the last W queries: softmax over the prompt's keys (less the sinks: with none, over all),
    mean over queries and the group's heads, mean of five neighbours, the best of what is before the window."""
    query, key, value = random_inputs(1, 4, 2, TOKENS, 16)
    query = 3 * query
    config = config_of(sink_size=sink, top_k=9)
    kept = kept_tokens(key, value, config, query=query, prompt_lengths=PROMPT)
    start = PROMPT - WINDOW
    for head in range(2):
        q, k = query[0, 2 * head : 2 * head + 2, start:PROMPT], key[0, head, sink:PROMPT]
        ahead = torch.arange(sink, PROMPT) > torch.arange(start, PROMPT)[:, None]
        weights = (q @ k.T / 4).masked_fill(ahead, -torch.inf).softmax(-1).mean((0, 1))[: start - sink].tolist()
        near = [weights[max(0, j - 2) : j + 3] for j in range(len(weights))]
        best = sorted(range(len(near)), key=lambda j, near=near: -sum(near[j]) / len(near[j]))[:9]
        expected = [*range(sink), *sorted(sink + j for j in best), *range(start, TOKENS)]
        assert kept[0, head].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_padded_rows_are_the_rows_alone(backend):
    """Pads, on either side or all of a row, hold NaN. Lengths count a document's own tokens."""
    config = config_of("lag_relative")
    ids = packed_ids([(-1, 10), (0, 53)], [(0, 40), (-1, 23)], [(-1, 63)])
    inputs = [x.masked_fill((ids == -1)[:, None, :, None], torch.nan) for x in random_inputs(3, 4, 2, TOKENS, 16)]
    options = {"prompt_lengths": torch.tensor([44, 30, 0]), "document_ids": ids}
    out = sparse_attention(*inputs, config, backend=backend, **options)
    kept = kept_tokens(inputs[1], inputs[2], config, **options)
    assert not (kept & (ids == -1)[:, None]).any() and (out.masked_fill((ids >= 0)[:, None, :, None], 0) == 0).all()
    for row, (own, prompt) in enumerate([(slice(10, 63), 44), (slice(0, 40), 30)]):
        alone = [x[row : row + 1, :, own] for x in inputs]
        expected = sparse_attention(*alone, config, prompt_lengths=prompt)
        torch.testing.assert_close(out[row : row + 1, :, own], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept[row, :, own], kept_tokens(alone[1], alone[2], config, prompt_lengths=prompt)[0])


def test_kept_can_be_given_and_is_checked():
    inputs, config = random_inputs(1, 4, 2, TOKENS, 16), config_of("random")
    kept = kept_tokens(inputs[1], inputs[2], config, prompt_lengths=PROMPT)
    other = config_of("snapkv")  # keeps as many
    given = sparse_attention(*inputs, other, kept=kept, prompt_lengths=PROMPT)
    torch.testing.assert_close(given, sparse_attention(*inputs, config, prompt_lengths=PROMPT))
    for place in (0, PROMPT + 1, int(kept[0, 0, SINK:].nonzero()[0]) + SINK):
        wrong = kept.clone()
        wrong[0, 0, place] = False
        with pytest.raises(ValueError, match=r"of the 39 ranked tokens of row 0, the config keeps 11"):
            sparse_attention(*inputs, other, kept=wrong, prompt_lengths=PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"schedule='prefill_once' compresses at the end of the prompt: pass prompt_lengths="),
        (
            {"prompt_lengths": torch.tensor([5.0])},
            r"prompt_lengths must be an int or int64 \[B\] = \(1,\), not torch.float32",
        ),
        (
            {"prompt_lengths": torch.tensor([5, 5])},
            r"prompt_lengths must be an int or int64 \[B\] = \(1,\), not .* \(2,\)",
        ),
        ({"prompt_lengths": 64}, r"row 0 has a prompt of 64 tokens and 63 tokens in all"),
        ({"prompt_lengths": 0}, r"row 0 has a prompt of 0 tokens"),
        (
            {"prompt_lengths": 9, "document_ids": packed_ids([(0, 30), (1, 33)])},
            r"one length a row, but document_ids packs several documents into one",
        ),
        ({"prompt_lengths": 9, "backend": "cudnn"}, r"backend='cudnn' is unknown"),
    ],
    ids=["none", "floats", "two", "long", "empty", "packed", "backend"],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_attention(*random_inputs(1, 4, 2, TOKENS, 16), config_of(), **options)


def test_the_chunked_schedule_takes_prompt_lengths_for_a_rule_that_looks_ahead_alone():
    query, key, value = random_inputs(1, 4, 2, TOKENS, 16)
    config = SparseAttentionConfig(lag_size=8)
    with pytest.raises(ValueError, match=r"prompt_lengths= with schedule='chunked'.*set schedule='prefill_once'"):
        sparse_attention(query, key, value, config, prompt_lengths=9)
    kept = None
    for scorer in SCORERS:
        config = SparseAttentionConfig(scorer=scorer, lag_size=8)
        if config.reads_prompt_lengths:  # the oracle, which looks ahead in the prompt
            kept = kept_tokens(key, value, config, query=query, prompt_lengths=9)
            visibility_mask(kept, config, prompt_lengths=9)
            continue
        with pytest.raises(ValueError, match=rf"with schedule='chunked' and scorer='{scorer}', which do not ask"):
            kept_tokens(key, value, config, query=query, prompt_lengths=9)
    assert kept is not None
    with pytest.raises(ValueError, match=r"prompt_lengths= with schedule='chunked'"):
        visibility_mask(kept, SparseAttentionConfig(lag_size=8), prompt_lengths=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 8}, r"chunk_size=8 with schedule='prefill_once'.*leave chunk_size None"),
        ({"budget": "pyramid"}, r"budget='pyramid' with schedule='prefill_once'.*on the prompt here.*budget='uniform'"),
        ({"budget": "adaptive"}, r"budget='adaptive' with schedule='prefill_once': each head .*budget='uniform'"),
        ({"budget": "cone"}, r"budget='cone' is unknown"),
        (
            {"scorer": "oracle"},
            r"scorer='oracle' with schedule='prefill_once': it ranks by .* has none; choose another",
        ),
        (
            {"scorer": "recency", "top_k": 0, "equal_bytes_at": 99},
            r"equal_bytes_at=99 with schedule='prefill_once': it widens .*leave equal_bytes_at None",
        ),
    ],
)
def test_configs_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_what_knows_chunks_alone_says_so():
    with pytest.raises(ValueError, match=r"schedule='prefill_once' has no chunks"):
        _ = config_of().geometry
    assert SparseAttentionConfig.from_dict(config_of(top_k=99).to_dict()) == config_of(top_k=99)


# ------------------------------------------------------------------ through a model


def test_a_model_trains_through_it_and_checkpointing_changes_nothing():
    """The prompts end where the answers begin: rows of different prompts, one padded."""
    ids = tokens(2, 40)
    answers = torch.zeros((2, 40), dtype=torch.bool)
    answers[0, 33:40], answers[1, 25:30] = True, True
    document_ids = packed_ids([(0, 40)], [(0, 32), (-1, 8)])
    found = []
    for options in ({"backend": "reference"}, {"backend": "auto"}, {"gradient_checkpointing": True}):
        model = model_of("llama", config_of("snapkv"), **options).train()
        logits, targets = target_logits(model, ids, answers, document_ids)
        torch.nn.functional.cross_entropy(logits, targets).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append([logits.detach(), *gradients])
    for form in found[1:]:
        for mine, expected in zip(form, found[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    chunked = model_of("llama", None)
    assert (target_logits(chunked, ids, answers, document_ids)[0] - found[0][0]).abs().max() > 1e-2


def test_a_model_says_what_is_missing():
    model, ids = model_of("llama", config_of()), tokens(1, 40)
    with pytest.raises(ValueError, match=r"pass prompt_lengths=.*keyword argument of its forward"):
        model(input_ids=ids, use_cache=False)
    with (
        pytest.raises(ValueError, match=r"prompt_lengths with a cache.*make_cache\(model, prompt_length=n\)"),
        torch.no_grad(),
    ):
        model(input_ids=ids, past_key_values=make_cache(model), prompt_lengths=30)
    answers = torch.zeros((1, 40), dtype=torch.bool)
    answers[0, [20, 30]] = True
    with pytest.raises(ValueError, match=r"row 0 has several answers.*no one end"):
        target_logits(model, ids, answers)
    set_attention(model, config_of(dense_layers=(0, 1, 2)))
    with torch.no_grad():
        sparse = model(input_ids=ids, use_cache=False, prompt_lengths=30).logits
        set_attention(model, None)
        torch.testing.assert_close(sparse, model(input_ids=ids, use_cache=False).logits, **NEAR)
