"""Graphed decoding gives the tokens of ordinary generation.

Without CUDA the same loop runs uncaptured, and a stand-in for the graph shows that a pass may run for nothing, and that
what it reads stands in the same tensors at every replay.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lrsa.attention import SparseAttentionConfig
from lrsa.cache.graphed import GraphedStep, graphed_decode
from lrsa.models import make_cache
from tests.architectures import model_of, tokens
from tests.cache.feeding import left_padded

CONFIG = SparseAttentionConfig(sink_size=2, lag_size=8, top_k=3)
NEW = 20  # crosses two chunks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(params=["sparse", "dense"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def small(kind: str, device: str = "cpu"):
    model = model_of("llama", CONFIG if kind == "sparse" else None).to(device)
    # ends early in some rows, in others not
    model.generation_config.eos_token_id = [7, 23]
    return model


def fixed_cache(model, max_tokens: int = 80):
    """A cache with settled storage: what graphed decoding takes."""
    if getattr(model.config, "lrsa", None) is None:
        return StaticCache(config=model.config, max_cache_len=max_tokens)
    return make_cache(model, max_tokens)


def prompts(device: str) -> dict[str, Tensor]:
    """Four prompts of 30, 41, 17 and 23 tokens, pads on the left."""
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (30, 41, 17, 23)])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def both(model, given: dict[str, Tensor], **options) -> tuple:
    """What generation gives ordinarily and graphed, from the same seed."""
    results = []
    for extra in ({"past_key_values": make_cache(model)}, {"custom_generate": graphed_decode}):
        torch.manual_seed(0)
        extra.setdefault("past_key_values", fixed_cache(model))
        results.append(model.generate(**given, max_new_tokens=NEW, **options, **extra))
    return tuple(results)


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of a CUDA graph: passes for nothing, then replays into the one output tensor."""
    counts = {"passes": 0}

    def capture(function, undo):
        for _ in range(2):
            function()
            undo()
        out = function()
        undo()

        def replay() -> Tensor:
            counts["passes"] += 1
            return out.copy_(function())

        return replay

    monkeypatch.setattr(GraphedStep, "_capture", lambda self: capture(self._forward, self._cache.undo))
    monkeypatch.setattr(GraphedStep, "captured", property(lambda self: True, lambda self, value: None), raising=False)
    return counts


# ---------------------------------------------------------------- generate


def test_greedy(kind, device):
    ordinary, ours = both(small(kind, device), prompts(device), do_sample=False)
    assert torch.equal(ordinary, ours)


def test_greedy_with_a_graphs_stand_in(kind, stand_in):
    ordinary, ours = both(small(kind), prompts("cpu"), do_sample=False)
    assert torch.equal(ordinary, ours)
    assert stand_in["passes"] > 8


def test_sampling(kind, device):
    ordinary, ours = both(small(kind, device), prompts(device), do_sample=True, temperature=0.8, top_k=10)
    assert torch.equal(ordinary, ours)


def test_finished_rows_are_padded_and_all_finished_end_it(kind):
    model = small(kind)
    ordinary, ours = both(model, prompts("cpu"), do_sample=False)
    answers = ours[:, 41:]
    ends = torch.isin(answers, torch.tensor([7, 23]))
    assert ends.any(), "no row of this test ends early"
    for answer, end in zip(answers, ends, strict=True):
        if end.any():
            assert not answer[int(end.int().argmax()) + 1 :].any()  # the pad token is 0
    model.generation_config.eos_token_id = list(range(1, 61))
    ordinary, ours = both(model, prompts("cpu"), do_sample=False)
    assert ours.shape == ordinary.shape == (4, 42)


def test_scores_and_logits(kind):
    model = small(kind)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ordinary, ours = both(model, prompts("cpu"), do_sample=False, repetition_penalty=1.3, **wanted)
    assert torch.equal(ordinary.sequences, ours.sequences)
    assert len(ours.scores) == len(ours.logits) == ours.sequences.shape[1] - 41
    for name in ("scores", "logits"):
        for theirs, mine in zip(getattr(ordinary, name), getattr(ours, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    if kind == "sparse":  # with pads, 5.2 counts a static cache's columns wrongly
        assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1


def test_unpadded_prompts_and_several_answers_each(kind):
    given = {"input_ids": tokens(2, 25)}
    ordinary, ours = both(small(kind), given, do_sample=True, num_return_sequences=2)
    assert torch.equal(ordinary, ours) and ours.shape[0] == 4


def test_a_second_turn_goes_on_where_the_first_ended(kind):
    model = small(kind)
    model.generation_config.eos_token_id = None
    turns = []
    for options in ({}, {"custom_generate": graphed_decode}):
        cache = fixed_cache(model) if options else make_cache(model)
        first = model.generate(tokens(1, 20), max_new_tokens=10, past_key_values=cache, do_sample=False, **options)
        longer = torch.cat([first, tokens(1, 9, seed=1)], 1)
        turns.append(model.generate(longer, max_new_tokens=10, past_key_values=cache, do_sample=False, **options))
    assert torch.equal(*turns)


# ---------------------------------------------------------------- the step


@torch.no_grad()
def fill(model, cache, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    out = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


@pytest.mark.parametrize("captured", [False, "stand-in"], ids=str)
def test_steps_equal_one_pass_over_the_same_tokens(kind, captured, request):
    if captured:
        request.getfixturevalue("stand_in")
    model, ids = small(kind), tokens(2, 60)
    cache = fixed_cache(model, 60)
    assert_steps(model, cache, ids)
    assert int(cache.get_seq_length()) == 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("capture", [True, False])
def test_steps_equal_one_pass_on_a_gpu(kind, capture):
    model = small(kind, "cuda")
    assert_steps(model, fixed_cache(model, 60), tokens(2, 60).cuda(), capture)


def assert_steps(model, cache, ids: Tensor, capture: bool | None = None) -> None:
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(fill(model, cache, ids[:, :30]), expected[:, 29], rtol=1e-4, atol=1e-4)
    with GraphedStep(model, cache, capture=capture) as step:
        assert step.captured == (capture if capture is not None else step.captured)
        for i in range(30, 60):
            torch.testing.assert_close(step(ids[:, i]), expected[:, i], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"the cache is full: max_(tokens|cache_len)=60"):
            step(ids[:, 0])


def test_a_batch_row_gets_what_it_gets_alone_in_every_step(kind):
    """Ragged rows: positions are a row's own, and each compresses when its own chunk is complete."""
    model, given = small(kind), prompts("cpu")
    cache = fixed_cache(model)
    mask = given["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**given, position_ids=positions, past_key_values=cache, use_cache=True)
    answers = tokens(4, 12, seed=9)
    with GraphedStep(model, cache, mask) as step:
        stepped = torch.stack([step(answers[:, i]).clone() for i in range(12)], 1)
    for row in range(4):
        alone = torch.cat([given["input_ids"][row][mask[row] == 1], answers[row]])[None]
        with torch.no_grad():
            expected = model(input_ids=alone, use_cache=False).logits[0, -12:]
        torch.testing.assert_close(stepped[row], expected, rtol=1e-4, atol=1e-4)


def test_autocast_reaches_the_step():
    """Of a sparse cache: transformers' static one wants values in the dtype of its keys, which RoPE upcasts."""
    model, ids = small("sparse"), tokens(1, 30)
    cache = fixed_cache(model)
    with torch.autocast("cpu", torch.bfloat16):
        fill(model, cache, ids)
        with GraphedStep(model, cache) as step:
            assert step(ids[:, 0]).dtype == torch.bfloat16


# ---------------------------------------------------------------- what cannot be


def test_other_caches_are_refused(kind):
    model = small(kind)
    with pytest.raises(ValueError, match=r"DynamicCache, whose storage moves as it grows: pass SparseKVCache"):
        GraphedStep(model, DynamicCache(config=model.config))
    if kind == "dense":
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(tokens(1, 5), max_new_tokens=3, custom_generate=graphed_decode)


def test_an_empty_cache_is_refused(kind):
    model = small(kind)
    with pytest.raises(ValueError, match=r"feed the prompt first"), GraphedStep(model, fixed_cache(model)):
        pass


def test_what_a_graph_cannot_do_is_refused(kind):
    model = small(kind)
    given = {"inputs": tokens(1, 5), "max_new_tokens": 3, "custom_generate": graphed_decode}
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(**given, past_key_values=fixed_cache(model), num_beams=2)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.raises(ValueError, match="output_hidden_states"):
        model.generate(**given, past_key_values=fixed_cache(model), **wanted)
    with pytest.raises(ValueError, match="capture=True needs CUDA, the model is on cpu"):
        GraphedStep(model, fixed_cache(model), capture=True)


def test_generate_finds_no_argument_of_its_own_to_withhold():
    """transformers takes a custom function's arguments that its own loop lacks for options of `generate`."""
    from transformers.generation import GenerationMixin

    ours, theirs = (set(inspect.signature(f).parameters) for f in (graphed_decode, GenerationMixin._sample))
    assert ours - theirs == {"model"}
