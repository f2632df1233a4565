"""The correctness gate of the generation benchmark: prefill and graphed steps against one pass over the same tokens."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrsa.benchmark.engines import Engine
from lrsa.cache import prefill
from lrsa.cache.graphed import GraphedStep

EXACT = 1e-4  # largest relative error of logits in float32


def exactness(engine: Engine, shallow: PreTrainedModel, prompt: int, steps: int, seed: int) -> float:
    """Largest relative error of logits on `shallow_model`, against the mask form: small mistakes show in float32."""
    ids = random_tokens(shallow, prompt + steps, seed)
    expected = one_pass(shallow, engine, ids, steps + 1, "reference")
    engine.attach(shallow, "gather")
    cache = engine.make_cache(shallow, prompt + steps)
    errors = [relative_error(prefill(shallow, ids[:, :prompt], cache), expected[:1])]
    with GraphedStep(shallow, cache) as step:
        return worst(errors + step_errors(step, ids[:, prompt:], expected[1:]))


def one_pass(model: PreTrainedModel, engine: Engine, ids: Tensor, last: int, backend: str) -> Tensor:
    """Logits ``[last, V]`` of the last tokens of ``ids [1, T]``, without a cache."""
    engine.attach_reference(model, backend)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]


def step_errors(step: GraphedStep, ids: Tensor, expected: Tensor) -> list[float]:
    """Feed ``ids [1, T]`` token by token: the relative error of each step's logits to ``expected [T, V]``."""
    return [relative_error(step(ids[:, i]), expected[i : i + 1]) for i in range(ids.shape[1])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def worst(errors: list[float]) -> float:
    """The largest; infinite if one of them is no number, so that no comparison passes."""
    return max(error if math.isfinite(error) else math.inf for error in errors)


def allowed_error(model: PreTrainedModel) -> float:
    """Of logits in the model's dtype. Roundings add up as the root of the depth: one pass and steps in bfloat16 differ
    by a sixth of this (30 layers, random weights), sparse from dense attention by five times as much. Float32 has a
    floor: scores that are equal but for rounding may be ranked differently."""
    return max(2 * torch.finfo(model.dtype).eps * model.config.num_hidden_layers**0.5, 10 * EXACT)


def shallow_model(model: PreTrainedModel) -> PreTrainedModel:
    """Two layers of the model's shape with a small vocabulary and fresh float32 weights, on its device."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size = 2, min(config.vocab_size, 512)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device(model.device):
        shallow = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return shallow.eval().requires_grad_(False)


def random_tokens(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    """int64 ``[1, count]`` on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator).to(model.device)
