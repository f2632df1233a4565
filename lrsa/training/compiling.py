"""`trainer.compile`: a model's decoder layers as fused kernels while it trains (torch.compile).

Layer by layer: layers of one config share a compilation (under a pyramid budget those of one K), which takes seconds
where a whole model takes minutes. Only while it trains: an evaluation reads prompts of all lengths, and each would be
compiled anew. Parameters, their names and the layers themselves stay what they are, so that checkpoints know nothing
of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# A variant for each attention that steps draw, for layers of other budgets, with and without gradient (a teacher), and
# for the pieces around a graph break: more than PyTorch's 8, past which it goes on uncompiled.
RECOMPILE_LIMIT = 1024
BACKEND = "inductor"  # torch.compile's own


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """transformers' decoder layers, in order of depth."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoints_outside() -> bool:
    """Whether this transformers checkpoints activations around a layer's forward, and so around what is compiled."""
    return "__call__" in vars(GradientCheckpointingLayer)


@contextlib.contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the decoder layers of `model` run compiled, for one shape each of batch and length.

    Raises:
        ValueError: a model without transformers' decoder layers; activation checkpointing around what is compiled.
        torch._dynamo.exc.FailOnRecompileLimitHit: inside, where `RECOMPILE_LIMIT` variants were compiled and another is
            asked for, instead of going on slowly without a word.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that trainer.compile=true could compile")
    if checkpoints_outside() and any(layer.gradient_checkpointing for layer in layers):
        raise ValueError(
            f"trainer.compile=true with model.gradient_checkpointing=true: transformers {transformers.__version__} "
            "recomputes a compiled layer with its selection, where 5.23 checkpoints inside; upgrade transformers, "
            "or set one of them false"
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)  # for good, as FlexAttention's users need it
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=False)
    # Warns of operators in place under checkpointing, of which there are none here.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
