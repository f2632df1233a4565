"""The bridge to transformers: the only file that registers there. Nothing is patched.

``attn_implementation="lrsa"`` makes a model's attention layers call `attention`; the parameters stand in the model's
config under ``lrsa`` and so travel in ``config.json``. transformers does not store the implementation's *name*, so a
plain ``AutoModelForCausalLM.from_pretrained`` gives a dense model: use `lrsa.models.load_model`, or name it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lrsa.attention import compiled, inspection
from lrsa.attention.api import sparse_attention
from lrsa.attention.config import BY_LAYER, SparseAttentionConfig
from lrsa.attention.documents import PAD, LastResult, find_documents
from lrsa.attention.inspection import LayerInputs

NAME = "lrsa"
CACHE_ATTEND = "_lrsa_cache_attend"  # attribute of the key tensor that `SparseKVCache.update` hands out
# Those that the tests compare all forms on; another may rotate, scale or mask in a way that the cache does not know.
ARCHITECTURES = ("gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "learned attention sinks",
    "position_bias": "an additive position bias",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in the order of transformers' sdpa: kvpress, which wraps all attentions, passes it by place
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: ``[B, heads, T, D]`` in, ``([B, T, Hq, D], None)`` out.

    ``attention_mask`` is what `mask` returned: the tokenizer's ``[B, T]``, 0 at pads, or None. Packed documents are
    told by ``document_ids`` among the keyword arguments, or by ``position_ids`` that start anew; where prompts end, by
    ``prompt_lengths`` (without a cache, for an attention that asks). Who knows that each row is one document passes
    ``whole_rows``, and nobody looks for others, which takes a wait for the device (`compiled.whole_rows`). With a
    `SparseKVCache` the keys are those of the newest block, and bring their cache along. A sliding-window layer, which
    never holds more than its window, is attended as ever.

    Raises:
        ValueError: something that sparse attention does not compute: another cache, dropout, soft-capping.
    """
    if torch.compiler.is_compiling():
        traced = compiled.attend(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        if traced is not None:
            return traced.transpose(1, 2).contiguous(), None
    return _attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


# A compiled layer (`trainer.compile`) runs what is before and after as its own kernels, and this as it is.
@torch.compiler.disable(reason="sparse attention looks into masks and caches here, which takes Python")
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("sliding_window") is not None:
        if "full_attention" not in (getattr(module.config, "layer_types", None) or ()):
            raise ValueError(
                f"{type(module).__name__} slides a window of {kwargs['sliding_window']} tokens in every layer, sparse "
                "attention needs full ones: load the model with sliding_window=None in its config"
            )
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    config = _layer_config(module)
    attend_cached = getattr(key, CACHE_ATTEND, None)
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: the lrsa attention has no dropout; set it to 0 in the config")
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {what} ({name}), which the lrsa attention cannot do")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries came with {key.shape[2]} keys: an ordinary cache, which keeps every token. "
            "Pass past_key_values=lrsa.models.make_cache(model), a cache that compresses"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: the lrsa attention takes the tokenizer's [B, T] mask; "
            "a ready-made 4-D mask would contradict the visibility rule"
        )
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's attention does; RoPE hands out float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    backend = getattr(module, "lrsa_backend", "auto")
    if attend_cached is not None:
        if kwargs.get("document_ids") is not None:
            raise ValueError(
                "document_ids with a cache: a row of a cache is one document; pass attention_mask for pads"
            )
        if kwargs.get("prompt_lengths") is not None:
            raise ValueError(
                "prompt_lengths with a cache, which counts what it is fed: its first forward pass is the prompt; for a "
                "prompt in blocks, lrsa.models.make_cache(model, prompt_length=n)"
            )
        out = attend_cached(
            query,
            key,
            value,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            config=config,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            backend=backend,
        )
        return out.transpose(1, 2).contiguous(), None
    document_ids = None
    if kwargs.get("whole_rows") is None:
        told = kwargs.get("document_ids"), attention_mask, kwargs.get("position_ids")
        found = _FOUND.get(*told) or [_FOUND.put(_document_ids(*told, query), *told)]
        document_ids = found[0]
    depth: int = module.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    config = config.alone(layer_idx, depth)
    prompt_lengths = kwargs.get("prompt_lengths")
    inputs = LayerInputs(layer_idx, query, key, value, config, scaling, document_ids, prompt_lengths)
    out = sparse_attention(
        query, key, value, config, kept=inspection.show(inputs), layer_idx=layer_idx, document_ids=document_ids,
        prompt_lengths=prompt_lengths, scale=scaling, backend=backend,
        straight_through=getattr(module, "lrsa_straight_through", False),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def set_straight_through(model: nn.Module, on: bool) -> None:
    """Give the selection of a live model's sparse layers a gradient, or none: of this process alone, never saved."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.lrsa_straight_through = on  # type: ignore[assignment]


def mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """transformers' mask interface: hand on the ``[B, T]`` padding mask; each layer sees for itself what is visible.

    For sliding-window layers (``local_size``) the mask that they have always had.
    """
    if local_size is not None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            *args, attention_mask=attention_mask, local_size=local_size, **kwargs
        )
    return attention_mask


def _layer_config(module: nn.Module) -> SparseAttentionConfig:
    """The model's config, with ``dense_layers`` resolved against its depth."""
    model_config: Any = module.config
    check_architecture(model_config)
    stored = getattr(model_config, NAME, None)
    if stored is None:
        raise ValueError(
            "attn_implementation='lrsa' needs the parameters in the model's config under 'lrsa': load with "
            "lrsa.models.load_model(name, attention=SparseAttentionConfig(...)) or call set_attention(model, ...)"
        )
    return _parse(json.dumps(stored, sort_keys=True), model_config.num_hidden_layers)


def check_architecture(model_config: Any) -> None:
    """Raise ValueError for a model whose kind sparse attention was never compared on."""
    if model_config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_config.model_type!r} is not among the architectures that sparse attention is tested "
            f"with: {', '.join(ARCHITECTURES)}. Adding one is a word in lrsa.attention.huggingface.ARCHITECTURES and a "
            "line in tests/architectures.py, which compares all forms on it"
        )


def check_budget(attention: SparseAttentionConfig, model_config: Any) -> None:
    """Raise ValueError for a budget by layer where some layers pay nothing: it is shared out over all of them."""
    kinds = getattr(model_config, "layer_types", None) or ()
    others = [kind for kind in kinds if kind != "full_attention"]
    if attention.budget in BY_LAYER and others:
        raise ValueError(
            f"budget={attention.budget!r} on a model with {len(others)} of {len(kinds)} layers of another kind "
            f"({', '.join(sorted(set(others)))}): it shares one total out over all layers, and these keep what they "
            "have, so that less would be compressed than asked for; take budget='uniform'"
        )


@functools.lru_cache(maxsize=64)
def _parse(stored: str, depth: int) -> SparseAttentionConfig:
    return SparseAttentionConfig.from_json(stored).resolved(depth)


def _document_ids(
    document_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, query: Tensor
) -> Tensor | None:
    """``[B, T]`` ids from what the caller said, from a padding mask, and from positions that do not continue.

    None where each row is one document.
    """
    batch, _, tokens, _ = query.shape
    ids = document_ids
    if ids is None and position_ids is not None and position_ids.ndim == 2 and position_ids.shape[-1] == tokens:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if restarts.any():
            ids = torch.nn.functional.pad(restarts, (1, 0)).cumsum(-1).expand(batch, -1)
    if attention_mask is not None and (attention_mask == 0).any():
        if ids is None:
            ids = torch.zeros((batch, tokens), dtype=torch.int64, device=query.device)
        ids = ids.masked_fill(attention_mask == 0, PAD)
    if ids is not None and position_ids is not None:
        _check_positions(ids, position_ids)
    return ids


def _check_positions(document_ids: Tensor, position_ids: Tensor) -> None:
    """RoPE turns a key by its position, and a rule that reads keys then picks other tokens than in the row alone."""
    positions = position_ids.expand_as(document_ids).cpu()
    for document in find_documents(document_ids):
        first = int(positions[document.row, document.start])
        if first:
            raise ValueError(
                f"row {document.row}: the document at token {document.start} has position {first} there, not 0: pads "
                "and packed neighbours must not count. Pass position_ids that start anew, as generate and "
                "target_logits do, e.g. (attention_mask.cumsum(-1) - 1).clamp(min=0)"
            )


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make ``attn_implementation=name`` known to transformers: an attention function and its mask function."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


_FOUND: LastResult[Tensor | None] = LastResult()  # looking into a tensor on the GPU waits for it: once a forward pass

register(NAME, attention, mask)
