"""The bridge to transformers: what reaches the attention, and what is refused instead of ignored."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lrsa.attention import SparseAttentionConfig, huggingface
from lrsa.models import enable_gradient_checkpointing, load_model, set_attention
from tests import architectures
from tests.architectures import FAMILIES, SMALL, tokens

CONFIG = SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3)
NEAR = {"rtol": 1e-3, "atol": 1e-4}


def model_of(family: str = "llama", attention=CONFIG, **options):
    return architectures.model_of(family, attention, **options)


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("scorer", ["lag_relative", "tova"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_same_logits_by_reference_and_gather(family, scorer):
    config = SparseAttentionConfig(scorer=scorer, sink_size=3, lag_size=8, top_k=3)
    model, ids = model_of(family, config), tokens(2, 90)
    set_attention(model, config, backend="reference")
    reference = logits(model, ids)
    set_attention(model, config, backend="gather")
    torch.testing.assert_close(logits(model, ids), reference, **NEAR)
    set_attention(model, None)
    dense = logits(model, ids)
    torch.testing.assert_close(dense[:, :19], reference[:, :19], **NEAR)
    assert (dense - reference).abs().max() > 0.01, "nothing was compressed"


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_gives_the_dense_logits(family):
    model, ids = model_of(family, SparseAttentionConfig(sink_size=3, lag_size=8, top_k=8)), tokens(2, 90)
    sparse = logits(model, ids)
    set_attention(model, None)
    torch.testing.assert_close(sparse, logits(model, ids), **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_a_padded_row_equals_the_row_alone(backend, side):
    model = model_of(backend=backend)
    rows = [tokens(1, n, seed=n)[0] for n in (90, 61, 5)]
    ids, mask = torch.zeros(3, 90, dtype=torch.int64), torch.zeros(3, 90, dtype=torch.int64)
    for i, row in enumerate(rows):
        span = slice(90 - len(row), 90) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as generate() makes them
    together = logits(model, ids, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i, mask[i].bool()], logits(model, row[None])[0], **NEAR)
    assert together.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("told", ["position_ids", "both"])
def test_packed_documents_equal_the_documents_alone(told, backend):
    model = model_of(backend=backend)
    rows = [tokens(1, n, seed=n) for n in (50, 40, 30)]
    ids = torch.cat(rows, 1)
    arguments = {
        "document_ids": torch.tensor([[0] * 50 + [1] * 40 + [2] * 30]),
        "position_ids": torch.cat([torch.arange(n) for n in (50, 40, 30)])[None],
    }
    if told == "position_ids":
        del arguments["document_ids"]
    together = logits(model, ids, **arguments)
    for row, part in zip(rows, together.split((50, 40, 30), dim=1), strict=True):
        torch.testing.assert_close(part, logits(model, row), **NEAR)


def test_positions_that_count_pads_or_neighbours_are_refused():
    """They would turn the keys, and `lag_relative` would pick other tokens than in the row alone."""
    model, ids = model_of(), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[1, :20] = 0
    with pytest.raises(ValueError, match=r"row 1: the document at token 20 has position 20 there, not 0.*cumsum"):
        logits(model, ids, attention_mask=mask)
    documents = torch.tensor([[0] * 50 + [1] * 40] * 2)
    with pytest.raises(ValueError, match=r"row 0: the document at token 50 has position 50 there, not 0"):
        logits(model, ids, document_ids=documents)


def test_a_mask_beside_document_ids_still_hides_its_pads():
    model, ids = model_of(), tokens(1, 90)
    mask = torch.ones(1, 90, dtype=torch.int64)
    mask[:, 70:] = 0
    documents = torch.zeros(1, 90, dtype=torch.int64)
    out = logits(model, ids, attention_mask=mask, document_ids=documents)
    torch.testing.assert_close(out[:, :70], logits(model, ids[:, :70]), **NEAR)
    changed = logits(model, ids.where(mask == 1, 5), attention_mask=mask, document_ids=documents)
    assert torch.equal(out[:, :70], changed[:, :70])


def test_positions_shared_by_the_batch_are_understood():
    model, ids = model_of(), tokens(3, 90)
    torch.testing.assert_close(logits(model, ids, position_ids=torch.arange(90)[None]), logits(model, ids), **NEAR)
    packed = torch.cat([torch.arange(50), torch.arange(40)])[None]
    torch.testing.assert_close(
        logits(model, ids, position_ids=packed), logits(model, ids, position_ids=packed.expand(3, -1)), **NEAR
    )


def test_dense_layers_count_from_the_models_end():
    ids = tokens(1, 90)
    model = model_of(attention=SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3, dense_layers=(0, 1, -1)))
    sparse = logits(model, ids)
    set_attention(model, None)
    torch.testing.assert_close(sparse, logits(model, ids), **NEAR)
    outs = []
    for layers in ((-1,), (2,), (0,)):
        set_attention(model, SparseAttentionConfig(sink_size=3, lag_size=8, top_k=3, dense_layers=layers))
        outs.append(logits(model, ids))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_layers_draw_their_own_random_tokens():
    """The bridge hands on the layer's index: with one index for all layers the output would be another."""
    config = SparseAttentionConfig(scorer="random", sink_size=3, lag_size=8, top_k=3)
    model, seen = model_of(attention=config), []

    def spy(*args, **kwargs):
        seen.append(kwargs["layer_idx"])
        return original(*args, **kwargs)

    original, huggingface.sparse_attention = huggingface.sparse_attention, spy
    try:
        logits(model, tokens(1, 60))
    finally:
        huggingface.sparse_attention = original
    assert seen == [0, 1, 2]


def test_generate_without_a_cache_is_greedy_by_hand():
    model, prompt = model_of(), tokens(2, 40)
    mask = torch.ones_like(prompt)
    prompt[1, :7], mask[1, :7] = 0, 0
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False,
                         eos_token_id=None)  # fmt: skip
    for row, start in ((0, 0), (1, 7)):
        alone = prompt[row : row + 1, start:]
        for _ in range(6):
            alone = torch.cat([alone, logits(model, alone)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out[row, start:], alone[0])


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_gradient_checkpointing_gives_the_same_gradients_and_selects_once_a_layer(mixed, monkeypatch):
    from lrsa.attention.scorers import SCORERS

    scorer, calls = SCORERS["lag_relative"], []
    original = scorer.__call__

    def counted(self, partitions):
        calls.append(partitions.layer_idx)
        return original(self, partitions)

    monkeypatch.setattr(scorer, "__call__", counted)
    gradients = []
    for checkpointing in (False, True):
        model = model_of(gradient_checkpointing=checkpointing).train()
        assert getattr(model.model.layers[0], "gradient_checkpointing", False) == checkpointing
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens(2, 90), labels=tokens(2, 90), use_cache=False).loss
        assert calls == [0, 1, 2]
        loss.backward()
        assert calls == [0, 1, 2], "the backward pass selected again"
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_checkpointing_can_be_turned_on_later_and_with_packing():
    model = model_of().train()
    ids = tokens(1, 90)
    packed = torch.cat([torch.arange(50), torch.arange(40)])[None]

    def gradient():
        model.zero_grad()
        model(input_ids=ids, labels=ids, position_ids=packed, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    plain = gradient()
    enable_gradient_checkpointing(model)
    torch.testing.assert_close(gradient(), plain)


# ------------------------------------------------------------------ refused, never ignored


def test_decoding_over_an_ordinary_cache_is_refused():
    model, ids = model_of(), tokens(1, 40)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"1 queries came with 41 keys.*ordinary cache.*make_cache"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="an ordinary cache"):
            model.generate(ids, max_new_tokens=3, attention_mask=torch.ones_like(ids))
        with pytest.raises(ValueError, match="an ordinary cache"):
            cache = DynamicCache()
            for part in ids.split(20, dim=1):
                model(input_ids=part, past_key_values=cache)


def test_a_sliding_window_in_every_layer_is_refused():
    torch.manual_seed(0)
    mistral = {"model_type": "mistral", **SMALL, "sliding_window": 16}
    with pytest.raises(ValueError, match=r"MistralForCausalLM slides a window of 16 tokens.*sliding_window=None"):
        load_model("fresh", CONFIG, config=mistral)
    model = load_model("fresh", None, config=mistral)
    model.config.lrsa = CONFIG.to_dict()  # as AutoModel with attn_implementation="lrsa" would have it
    model.set_attn_implementation("lrsa")
    with pytest.raises(ValueError, match=r"MistralAttention slides a window of 16 tokens in every layer"):
        logits(model, tokens(1, 40))
    config = {"model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    mixed = load_model("fresh", CONFIG, config=config, backend="gather").eval()  # sliding layers beside full ones stay
    ids = tokens(1, 60)
    found = logits(mixed, ids)
    set_attention(mixed, CONFIG, backend="reference")
    torch.testing.assert_close(found, logits(mixed, ids), **NEAR)
    set_attention(mixed, SparseAttentionConfig(sink_size=3, lag_size=8, top_k=8))
    everything = logits(mixed, ids)
    set_attention(mixed, None)
    torch.testing.assert_close(everything, logits(mixed, ids), **NEAR)


def test_dropout_is_refused_in_training_and_absent_in_evaluation():
    torch.manual_seed(0)
    model = load_model("fresh", CONFIG, config={"model_type": "llama", **SMALL, "attention_dropout": 0.1})
    with pytest.raises(ValueError, match=r"attention_dropout=0.1: the lrsa attention has no dropout; set it to 0"):
        model.train()(input_ids=tokens(1, 40))
    assert logits(model.eval(), tokens(1, 40)).isfinite().all()


@pytest.mark.parametrize("documents", [None, torch.zeros(1, 40, dtype=torch.int64)], ids=["alone", "document_ids"])
def test_a_ready_made_mask_is_refused(documents):
    model = model_of()
    options = {} if documents is None else {"document_ids": documents}
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 40, 40\).*\[B, T\] mask"):
        logits(model, tokens(1, 40), attention_mask=torch.zeros(1, 1, 40, 40), **options)


def test_an_implementation_without_parameters_says_how_to_give_them():
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lrsa")
    with pytest.raises(ValueError, match=r"under 'lrsa'.*load_model.*set_attention"):
        logits(model, tokens(1, 40))


def test_pads_between_two_parts_of_a_row_are_refused():
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[:, 10:15] = 0
    with pytest.raises(ValueError, match=r"comes back after another document or a pad"):
        logits(model_of(), tokens(1, 40), attention_mask=mask)
