"""Decoding with its step captured in a CUDA graph: the same kernels, without the host launching each of them.

    model.generate(**tokens, past_key_values=cache, custom_generate=graphed_decode)

A step of a small model, or of a large one over a small cache, takes the host longer to launch than the device to run.
Captured once and replayed, it costs one launch. Two caches can be decoded so: `SparseKVCache` made with ``max_tokens``,
whose compression runs between replays, and transformers' `StaticCache`, the dense rival. Without CUDA the same loop
runs uncaptured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from lrsa.cache.cache import SparseKVCache

WARM_UPS = 3  # passes before the capture: kernels are compiled and chosen in the first ones


class GraphedStep:
    """One decode step of ``model`` over ``cache``, to be called with a token a row.

    >>> with GraphedStep(model, cache) as step:
    ...     logits = step(tokens)

    Until the block ends nothing else may use the cache, and its storage must stay where it is.

    Args:
        model: a causal language model of transformers, on one device.
        cache: filled with the prompt: a `SparseKVCache` with ``max_tokens``, or a `StaticCache` of full layers.
        attention_mask: ``[B, columns]`` of all that was fed, 0 at pads. A `StaticCache` needs it if there are pads.
        capture: into a CUDA graph; None: if the model is on CUDA.

    Raises:
        ValueError: another cache, an empty one, capture without CUDA, a model on several devices.

    Autocast is taken as it is on entering the block. Weights are then cast in every step, for autocast's own copies
    would be gone at the next replay: better load the model in the dtype wanted.
    """

    def __init__(
        self, model: nn.Module, cache: Any, attention_mask: Tensor | None = None, capture: bool | None = None
    ) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise ValueError(
                f"a captured step needs the model on one device, this one is on {sorted(map(str, devices))}"
            )
        self.device = devices.pop()
        if capture and self.device.type != "cuda":
            raise ValueError(f"capture=True needs CUDA, the model is on {self.device}: leave it out, or move the model")
        self.captured = self.device.type == "cuda" if capture is None else capture
        self._model, self._cache = model, _adapter(cache, attention_mask)
        self._replay: Callable[[], Tensor] | None = None

    def __enter__(self) -> GraphedStep:
        cache, device = self._cache, self.device
        lengths, columns = cache.lengths(), cache.columns()
        self._left = cache.room(lengths, columns)
        self._ids = torch.zeros((len(lengths), 1), dtype=torch.int64, device=device)
        self._positions = torch.tensor(lengths, device=device)[:, None]
        self._column = torch.tensor([columns], device=device)
        self._inputs = self._model_inputs(len(lengths))
        cache.begin()
        try:
            self._replay = self._capture() if self.captured else self._forward
        except BaseException:
            cache.end()
            raise
        return self

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read ``tokens`` int64 ``[B]`` or ``[B, 1]``; logits ``[B, V]`` in the model's dtype, overwritten by the next
        call.

        Raises:
            ValueError: the cache is full.
        """
        assert self._replay is not None, "GraphedStep is used in a with block"
        if self._left < 1:
            raise ValueError(f"the cache is full: {self._cache.limit}; make it with room for prompt and answer")
        self._ids.copy_(tokens.reshape(self._ids.shape))
        logits = self._replay()
        self._cache.advance()
        self._positions.add_(1)
        self._column.add_(1)
        self._left -= 1
        return logits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replay = None  # with it goes the graph and its memory
        self._cache.end()

    def _model_inputs(self, batch: int) -> dict[str, Any]:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model  # type: ignore
        known = inspect.signature(base.forward).parameters  # type: ignore[union-attr]
        given = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            "past_key_values": self._cache.cache,
            "use_cache": True,
            "return_dict": True,
        }
        optional = {"logits_to_keep": 1, "cache_position": self._column}  # the latter until transformers 5.2
        given |= {name: value for name, value in optional.items() if name in known}
        mask = self._cache.static_mask(batch, self.device)
        return given if mask is None else given | {"attention_mask": mask}

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self._model(**self._inputs).logits[:, -1]

    def _capture(self) -> Callable[[], Tensor]:
        kind = self.device.type
        scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if torch.is_autocast_enabled(kind):
            scope = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
        with scope, torch.cuda.device(self.device):
            return capture_graph(self._forward, self._cache.undo)


def capture_graph(function: Callable[[], Tensor], undo: Callable[[], None]) -> Callable[[], Tensor]:
    """Capture ``function`` in a CUDA graph on the current device; what comes back replays it.

    ``undo`` takes back what a call left behind that a replay must not find.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
            undo()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads (a data loader's, a progress bar's) may use CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = function()
    undo()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def graphed_decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """`model.generate(..., custom_generate=graphed_decode)`: greedy decoding and sampling with a captured step.

    The same tokens as without, in every other option of `generate` that concerns logits and stopping. Needs
    ``past_key_values``: a `SparseKVCache` with ``max_tokens``, or a `StaticCache`. transformers hands no streamer on to
    a ``custom_generate``.

    Raises:
        ValueError: another cache, beams, attentions or hidden states as output, inputs besides token ids.
    """
    cache = model_kwargs.get("past_key_values")
    _refuse_what_is_not_captured(model_kwargs, generation_config, synced_gpus)
    _adapter(cache, None)
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores: tuple[Tensor, ...] | None = () if keep_scores else None
    raw: tuple[Tensor, ...] | None = () if keep_logits else None
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
    # transformers' own: it knows which of the ids a cache has already seen.
    logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
    with contextlib.ExitStack() as stack:
        step: GraphedStep | None = None
        while True:
            logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
            ranked = logits_processor(input_ids, logits)
            scores = None if scores is None else (*scores, ranked)
            raw = None if raw is None else (*raw, logits)
            if generation_config.do_sample:
                tokens = torch.multinomial(ranked.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = ranked.argmax(-1)
            if stops_at_eos:
                tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            unfinished = unfinished & ~stopping_criteria(input_ids, scores)
            if not unfinished.any():
                break
            if step is None:
                step = stack.enter_context(GraphedStep(model, cache, model_kwargs.get("attention_mask")))
            logits = step(tokens)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw, past_key_values=cache)
    return input_ids


def _refuse_what_is_not_captured(model_kwargs: dict[str, Any], config: Any, synced_gpus: bool) -> None:
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams={config.num_beams}: graphed_decode samples or is greedy; leave custom_generate out"
        )
    if synced_gpus:
        raise ValueError("synced_gpus: graphed_decode decodes on one device; leave custom_generate out")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("a captured step gives logits alone: leave output_attentions and output_hidden_states out")
    known = {"attention_mask", "position_ids", "cache_position", "past_key_values"}
    others = sorted(name for name, x in model_kwargs.items() if isinstance(x, Tensor) and name not in known)
    if others:
        raise ValueError(f"graphed_decode feeds token ids alone, not {', '.join(others)}; leave custom_generate out")


# ---- the two kinds of cache


def _adapter(cache: Any, attention_mask: Tensor | None) -> _Sparse | _Static:
    if isinstance(cache, SparseKVCache):
        return _Sparse(cache)
    if isinstance(cache, StaticCache):
        return _Static(cache, attention_mask)
    raise ValueError(
        f"past_key_values is {type(cache).__name__}, whose storage moves as it grows: pass "
        "SparseKVCache(..., max_tokens=prompt + answer), or for a dense model transformers' StaticCache"
    )


class _Sparse:
    """`SparseKVCache`, which has a protocol for this."""

    def __init__(self, cache: SparseKVCache) -> None:
        self.cache = cache
        self.limit = f"max_tokens={cache.max_tokens}"

    def lengths(self) -> Sequence[int]:
        """Tokens read by each row: the positions of the next ones."""
        return self.cache.lengths

    def columns(self) -> int:
        """Fed so far, pads included."""
        return self.cache.get_seq_length()

    def room(self, lengths: Sequence[int], columns: int) -> int:
        """Steps until the storage is full."""
        return (self.cache.max_tokens or 0) - max(lengths, default=0)

    def static_mask(self, batch: int, device: torch.device) -> Tensor | None:
        """The attention mask of every step to come; None where the cache knows of its pads, or has none."""
        return None

    def begin(self) -> None:
        self.cache.begin_static()

    def undo(self) -> None:
        """Take back what a pass left behind that the next one must not find: nothing here."""

    def advance(self) -> None:
        self.cache.advance()

    def end(self) -> None:
        self.cache.end_static()


class _Static:
    """transformers' `StaticCache`: since 5.3 its layers count on the device what they hold, and a pass adds to that."""

    def __init__(self, cache: StaticCache, attention_mask: Tensor | None) -> None:
        self.cache, self._mask = cache, attention_mask
        for layer in cache.layers:
            if not isinstance(layer, StaticLayer) or isinstance(layer, StaticSlidingWindowLayer):
                raise ValueError(f"a captured step needs full static layers, the cache has a {type(layer).__name__}")
        self._limit = cache.layers[0].max_cache_len
        self.limit = f"max_cache_len={self._limit}"
        self._counts: list[Tensor] = []

    def lengths(self) -> Sequence[int]:
        if self._mask is None:
            return [self.columns()] * self.cache.layers[0].keys.shape[0]
        return (self._mask != 0).sum(-1).tolist()

    def columns(self) -> int:
        if not self.cache.layers[0].is_initialized:
            raise ValueError("the cache is empty: feed the prompt first")
        # Without a mask nothing is padded, which is where transformers 5.2 miscounts.
        return int(self.cache.get_seq_length()) if self._mask is None else self._mask.shape[1]

    def room(self, lengths: Sequence[int], columns: int) -> int:
        return self._limit - columns

    def static_mask(self, batch: int, device: torch.device) -> Tensor | None:
        if self._mask is None or bool((self._mask != 0).all()):
            return None
        return torch.nn.functional.pad(self._mask.to(device), (0, self._limit - self._mask.shape[1]), value=1)

    def begin(self) -> None:
        layers = self.cache.layers
        self._counts = [x.cumulative_length.clone() for x in layers if hasattr(x, "cumulative_length")]

    def undo(self) -> None:
        for layer, count in zip(self.cache.layers, self._counts, strict=False):
            layer.cumulative_length.copy_(count)

    def advance(self) -> None:
        """The pass itself has counted."""

    def end(self) -> None:
        self._counts = []
