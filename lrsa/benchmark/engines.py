"""Ways to generate that the benchmark compares: how the model attends, and the cache that goes with it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from lrsa.attention import SparseAttentionConfig, decode
from lrsa.attention.api import choose_backend
from lrsa.benchmark import dense
from lrsa.cache import SparseKVCache
from lrsa.models import set_attention


class Engine(Protocol):
    """One way to generate."""

    name: str

    @property
    def compression(self) -> float | None:
        """Nominal; None: dense."""

    @property
    def lag(self) -> int | None:
        """Tokens a partition, and a chunk."""

    def kernels(self, model: PreTrainedModel, length: int) -> dict[str, str]:
        """Which kernels run: of a prompt of ``length`` tokens, and of a decode step."""

    def attach(self, model: PreTrainedModel, backend: str = "auto") -> None:
        """Make the model attend as generation does; ``backend``: of a prompt, ``gather`` for the most exact one."""

    def attach_reference(self, model: PreTrainedModel, backend: str) -> None:
        """Make the model compute the same function in one pass without a cache."""

    def make_cache(self, model: PreTrainedModel, max_tokens: int) -> Any:
        """An empty cache with room for ``max_tokens`` tokens a row."""

    def repeat(self, cache: Any, rows: int) -> None:
        """Make the first row of ``cache`` its only content, ``rows`` times."""

    def slots(self, tokens: int) -> int:
        """Keys of a head that a step reads once ``tokens`` tokens were read, its own included."""

    def held(self, cache: Any) -> dict[str, Any]:
        """What ``cache`` holds, measured: slots a head, bytes of those, bytes allocated beyond, bytes a dense one
        holds."""


class Dense:
    """All keys, in transformers' `StaticCache`, attended by the best dense kernels."""

    name, compression, lag = "dense", None, None
    _prefill = "sdpa"

    def kernels(self, model: PreTrainedModel, length: int) -> dict[str, str]:
        query, key = _probe(model)
        shape = query.shape[1], key.shape[1], key.shape[3], length
        self._prefill = dense.fastest_prefill_kernel(*shape, query)
        return {"prefill": self._prefill, "decode": decode.choose_backend("auto", query, key)}

    def attach(self, model: PreTrainedModel, backend: str = "auto") -> None:
        dense.use_prefill_kernel(self._prefill if backend == "auto" else "sdpa")
        set_attention(model, None)
        model.set_attn_implementation(dense.NAME)

    def attach_reference(self, model: PreTrainedModel, backend: str) -> None:
        set_attention(model, None)

    def make_cache(self, model: PreTrainedModel, max_tokens: int) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=max_tokens)

    def repeat(self, cache: StaticCache, rows: int) -> None:
        for layer in cache.layers:  # one at a time: never two whole caches in memory
            for name in ("keys", "values"):
                one = getattr(layer, name)[:1]
                setattr(layer, name, one.repeat(rows, 1, 1, 1))
            for name in ("batch_size", "max_batch_size"):  # the latter until transformers 5.2
                if hasattr(layer, name):
                    setattr(layer, name, rows)

    def slots(self, tokens: int) -> int:
        return tokens + 1

    def held(self, cache: StaticCache) -> dict[str, Any]:
        tokens = int(cache.get_seq_length())
        stores = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        allocated = sum(x.numel() * x.element_size() for x in stores)
        used = allocated // cache.layers[0].max_cache_len * tokens
        return {
            "slots": tokens,
            "ratio": 1.0,
            "bytes": used,
            "buffer_bytes": allocated - used,
            "dense_bytes": used,
            "expected_slots": tokens,
        }


class Sparse:
    """`SparseKVCache` under the lrsa attention."""

    def __init__(self, config: SparseAttentionConfig, compression: float) -> None:
        self.config, self.compression = config, compression
        rule = "lrsa" if config.scorer == "lag_relative" else config.scorer
        self.name, self.lag = f"{rule} {compression:g}x", config.lag_size

    def kernels(self, model: PreTrainedModel, length: int) -> dict[str, str]:
        query, key = _probe(model)
        return {"prefill": choose_backend("auto", query), "decode": decode.choose_backend("auto", query, key)}

    def attach(self, model: PreTrainedModel, backend: str = "auto") -> None:
        set_attention(model, self.config, backend=backend)

    def attach_reference(self, model: PreTrainedModel, backend: str) -> None:
        set_attention(model, self.config, backend=backend)

    def make_cache(self, model: PreTrainedModel, max_tokens: int) -> SparseKVCache:
        return SparseKVCache(self.config, model.config, max_tokens=max_tokens)

    def repeat(self, cache: SparseKVCache, rows: int) -> None:
        cache.batch_select_indices(torch.zeros(rows, dtype=torch.int64))

    def slots(self, tokens: int) -> int:
        return self.config.geometry.held(tokens) + 1

    def held(self, cache: SparseKVCache) -> dict[str, Any]:
        report = cache.report()
        totals = {name: getattr(report, name) for name in ("slots", "ratio", "bytes", "buffer_bytes", "dense_bytes")}
        # S + nK + (t - S - nL), the method's own count
        return totals | {"expected_slots": self.config.geometry.held(report.tokens[0])}


def bytes_per_slot(model: PreTrainedModel) -> int:
    """Of keys and values in all layers and heads, a row."""
    key = _probe(model)[1]
    return 2 * model.config.num_hidden_layers * key.shape[1] * key.shape[3] * key.element_size()


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """A query and a key ``[1, heads, 1, D]`` of the model's shape, dtype and device; no values."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    query, key = (torch.empty((1, n, 1, dim), dtype=model.dtype, device=model.device) for n in heads)
    return query, key


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step reads of the weights: all but an input embedding of its own, of which it reads a row a token."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if embedding is head else total - embedding.numel() * embedding.element_size()
