"""A batch row gets exactly what it gets alone: ragged lengths, pads on any side, several turns, generation."""

from __future__ import annotations

import pytest
import torch

from lrsa.cache import prefill
from lrsa.models import make_cache
from tests.architectures import FAMILIES, model_of, tokens
from tests.attention.tensors import LOCAL
from tests.cache.feeding import feed, kept, left_padded
from tests.cache.test_feeding import NEAR, config_of

LENGTHS = (5, 19, 20, 33, 41, 60, 61, 64)


def rows_of(lengths=LENGTHS):
    return [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("block", [1, 10, 64])
@pytest.mark.parametrize("scorer", LOCAL)
def test_left_padded_rows_are_the_rows_alone(scorer, block):
    model, rows = model_of("llama", config_of(scorer)), rows_of()
    ids, mask = left_padded(rows)
    cache = make_cache(model)
    logits = feed(model, cache, ids, block, mask)
    assert cache.lengths == LENGTHS
    together = kept(cache)
    for row, alone in enumerate(rows):
        single = make_cache(model)
        expected = feed(model, single, alone[None], block)
        torch.testing.assert_close(logits[row : row + 1, -len(alone) :], expected, **NEAR)
        assert [layer[row] for layer in together] == [layer[0] for layer in kept(single)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_pads_in_any_place_and_several_turns(family):
    """Turns of different lengths, each padded as it comes: right, left, and a row that has nothing to say."""
    model = model_of(family, config_of("tova"))
    turns = [(30, 22), (7, 40), (25, 0), (1, 1)]
    rows = [[tokens(1, n, 10 * turn + row)[0] for turn, n in enumerate(lengths)] for row, lengths in
            enumerate(zip(*turns, strict=True))]  # fmt: skip
    cache, mask = make_cache(model), torch.zeros((2, 0), dtype=torch.long)
    found: list[list[torch.Tensor]] = [[], []]
    for turn, lengths in enumerate(turns):
        widest = max(lengths)
        pads = [(0, widest - n) if turn == 0 else (widest - n, 0) for n in lengths]
        ids = torch.stack([torch.nn.functional.pad(rows[r][turn], pads[r]) for r in range(2)])
        new = torch.stack([torch.nn.functional.pad(torch.ones(n, dtype=torch.long), pads[r]) for r, n in
                           enumerate(lengths)])  # fmt: skip
        mask = torch.cat([mask, new], 1)
        logits = feed(model, cache, ids, widest, mask)
        for r in range(2):
            found[r].append(logits[r, new[r].bool()])
    if family == "gemma3_text":  # its sliding layers count pads into their window, as ever: compare lengths alone
        assert cache.lengths == tuple(sum(n) for n in zip(*turns, strict=True))
        return
    for r in range(2):
        expected = feed(model, make_cache(model), torch.cat(rows[r])[None], 1000)[0]
        torch.testing.assert_close(torch.cat(found[r]), expected, **NEAR)


@pytest.mark.parametrize("scorer", [None, *LOCAL])
def test_eight_ragged_prompts_generate_what_each_generates_alone(scorer):
    model, rows = model_of("llama", None if scorer is None else config_of(scorer)), rows_of()
    ids, mask = left_padded(rows)
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, past_key_values=make_cache(model), **options)[:, ids.shape[1] :]
    for row, alone in enumerate(rows):
        single = model.generate(alone[None], past_key_values=make_cache(model), **options)[0, len(alone) :]
        assert together[row].tolist() == single.tolist(), f"row {row}"


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_by_the_parallel_form(family):
    model, ids = model_of(family, config_of("lag_relative")), tokens(1, 50)
    out = model.generate(ids, past_key_values=make_cache(model), do_sample=False, max_new_tokens=30, eos_token_id=None)
    with torch.no_grad():
        logits = model(input_ids=out, use_cache=False).logits
    assert out[0, 50:].tolist() == logits[0, 49:-1].argmax(-1).tolist()


def test_the_next_turn_continues_a_compressed_cache():
    model, first, second = model_of("llama", config_of("tova")), tokens(2, 60), tokens(2, 45, seed=1)
    cache = make_cache(model)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    said = model.generate(first, past_key_values=cache, **options)
    history = torch.cat([said, second], 1)
    continued = model.generate(history, past_key_values=cache, **options)
    anew = model.generate(history, past_key_values=make_cache(model), **options)
    assert continued.tolist() == anew.tolist()


def test_a_prefilled_cache_is_continued_by_generate():
    model, rows = model_of("qwen2", config_of("lag_relative")), rows_of((70, 31))
    ids, mask = left_padded(rows)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "attention_mask": mask}
    cache = make_cache(model)
    prefill(model, ids[:, :-1], cache, mask[:, :-1], block_size=16)
    out = model.generate(ids, past_key_values=cache, **options)
    assert out.tolist() == model.generate(ids, past_key_values=make_cache(model), **options).tolist()


def test_sampling_and_beams():
    model, rows = model_of("llama", config_of("lag_relative")), rows_of((40, 29))
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None}
    sampled = []
    for _ in range(2):
        torch.manual_seed(1)
        sampled.append(model.generate(ids, past_key_values=make_cache(model), do_sample=True, **options).tolist())
    assert sampled[0] == sampled[1]

    beams = model.generate(ids, past_key_values=make_cache(model), num_beams=3, do_sample=False, **options)
    for row, alone in enumerate(rows):
        single = model.generate(
            alone[None], past_key_values=make_cache(model), num_beams=3, do_sample=False, max_new_tokens=12,
            eos_token_id=None,
        )  # fmt: skip
        assert beams[row, -12:].tolist() == single[0, -12:].tolist()
    # The best beam cannot be worse than greedy decoding, by the parallel form's own likelihood.
    greedy = model.generate(ids, past_key_values=make_cache(model), do_sample=False, **options)
    assert (likelihood(model, beams, rows) >= likelihood(model, greedy, rows) - 1e-3).all()


@torch.no_grad()
def likelihood(model, out, rows):
    total = []
    for row, prompt in enumerate(rows):
        ids = torch.cat([prompt, out[row, -12:]])[None]
        logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, -13:-1]
        total.append(logp.gather(-1, ids[0, -12:, None]).sum())
    return torch.stack(total)
