"""The recurrent form as a transformers cache: what a post-trained model meets in `generate`.

    cache = SparseKVCache(config, model.config)
    model.generate(**tokens, past_key_values=cache)

Feeding changes nothing: whole, in blocks, token by token, in one turn or several, a row comes to the same logits and
the same kept tokens, and to those of training. A batch row gets exactly what it gets alone; pads are never scored, kept
or attended.

transformers hands `update` keys and values, but no queries and no mask. So `update` ties the layer's own attention to
the key tensor that it returns, and the lrsa attention function, which has everything, finds and calls it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.config import ONCE
from lrsa.attention.huggingface import CACHE_ATTEND
from lrsa.cache import checks
from lrsa.cache.base import AttendingLayer
from lrsa.cache.layer import SparseLayer
from lrsa.cache.once import OnceLayer
from lrsa.cache.report import CacheReport, layer_report
from lrsa.cache.static import StaticRows
from lrsa.cache.step import Step


class SparseKVCache(Cache):
    """A cache that compresses as it grows, for models that attend through lrsa.

    Args:
        config: the sparse attention, the same as the model's.
        model_config: of the model; sliding-window layers get transformers' own cache layers, ``dense_layers`` keep all.
        max_tokens: most tokens a row will ever hold, prompt and answer. Storage is then made once; without, it grows by
            half when full, which copies it.
        prompt_length: of schedule ``prefill_once``, columns of the prompt, pads included: compression comes when they
            were read. None: the first forward pass is the prompt, as in `generate` (whose own prefill_chunk_size
            would make several of it: give the length then). Pads are on the left. What follows is never compressed: a
            later turn's prompt is appended as it is, as these rules are published.

    Raises:
        ValueError: a model that does not attend through lrsa, or whose attention is another one.

    Source: LagKV (arXiv 2504.04704), LRSA (arXiv 2506.11498), for every scorer.
    """

    def __init__(
        self,
        config: SparseAttentionConfig,
        model_config: PreTrainedConfig,
        max_tokens: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        text_config: Any = model_config.get_text_config(decoder=True)
        checks.check_model(config, text_config)
        checks.check_prompt_length(config, prompt_length)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: give a positive number of tokens, or None")
        depth = text_config.num_hidden_layers
        kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * depth
        resolved = config.resolved(depth)
        kind_of_layer = OnceLayer if config.schedule == ONCE else SparseLayer
        layers: list[Any] = [
            DynamicSlidingWindowLayer(sliding_window=text_config.sliding_window)
            if kind == "sliding_attention"
            else kind_of_layer(resolved.for_layer(index, depth), index, max_tokens)
            for index, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        self.config, self.max_tokens, self.prompt_length = resolved, max_tokens, prompt_length
        self._sparse = [layer for layer in layers if isinstance(layer, AttendingLayer)]
        self._clear()

    def _clear(self) -> None:
        self.lengths: tuple[int, ...] = ()  # tokens read, a row each, pads not counted
        self.columns = 0  # fed, pads included
        self._real = torch.ones((0, 0), dtype=torch.bool)  # [B, columns] on the CPU: which of them were tokens
        self._prompt_end = self.prompt_length  # in columns; None: not known yet, or of no interest
        self._step: Step | None = None
        self._pending: int | None = None  # layer whose keys are on their way to the attention function
        self._advancing = False  # between two static steps
        self._verify = True  # look at the next positions, even if that makes the host wait for the device
        self._scale = 1.0
        self._static: StaticRows | None = None

    # ---- a forward pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values ``[B, H, T, D]`` on; the attention function takes them in, through `_attend`.

        Raises:
            RuntimeError: an earlier forward pass did not run to its end, or nothing took in what was handed on before.
            ValueError: gradients are asked for.
        """
        layer = self.layers[layer_idx]
        self._refuse_if_interrupted(layer_idx)
        if not isinstance(layer, AttendingLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "SparseKVCache carries no gradient: decode under torch.no_grad(), and train with use_cache=False"
            )
        self._pending = layer_idx
        setattr(key_states, CACHE_ATTEND, partial(self._attend, layer))
        return key_states, value_states

    def _refuse_if_interrupted(self, layer_idx: int) -> None:
        if self._pending is not None:
            pending, step = self._pending, self._step
            reason = (
                "its keys were never attended by the lrsa attention"
                if step is None or not step.attended
                else "a forward pass was interrupted there (an exception, out of memory, Ctrl-C)"
            )
            raise RuntimeError(
                f"the cache is not in a usable state: layer {pending} did not take in what it was given; {reason}. "
                "Load the model with lrsa.models.load_model(name, attention=...) or call set_attention; then reset() "
                "the cache and feed the prompt anew"
            )
        if self._advancing:
            raise RuntimeError(
                "compression was interrupted between two steps (an exception, out of memory, Ctrl-C): the cache holds "
                "half of it. reset() the cache and feed the prompt anew"
            )
        if self._step is not None and (layer_idx < 0 or layer_idx in self._step.attended):
            missing = sorted({layer.layer_idx for layer in self._sparse} - self._step.attended)
            raise RuntimeError(
                f"the last forward pass ended before layers {missing} (an exception, out of memory, Ctrl-C): the cache "
                "holds half of it. reset() the cache and feed the prompt anew"
            )

    def _attend(
        self,
        layer: AttendingLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        config: SparseAttentionConfig,
        scale: float,
        backend: str,
    ) -> Tensor:
        """See `AttendingLayer.attend`. ``attention_mask [B, columns]`` as the tokenizer makes it, 0 at pads."""
        if self._step is None and self._static is None:
            try:
                checks.check_config(config, self.config)
                self._step = self._begin(query, attention_mask, position_ids)
            except ValueError:
                if layer is self.layers[0]:  # nothing was written anywhere: the caller may correct it and go on
                    self._pending = None
                    self._prompt_end = self._prompt_end if self.columns else self.prompt_length
                raise
        else:
            checks.check_config(config, self.config)
        if self._static is not None:
            out = self._attend_static(layer, query, key, value, scale)
        else:
            assert self._step is not None
            out = layer.attend(self._step, query, key, value, scale, backend)
            layer.columns += query.shape[2]
            self._step.attended.add(layer.layer_idx)
            if len(self._step.attended) == len(self._sparse):
                self._commit(self._step)
        self._scale = scale
        self._pending = None
        return out

    def _begin(self, query: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Step:
        batch, _, tokens, _ = query.shape
        before = self.lengths or (0,) * batch
        if len(before) != batch:
            raise ValueError(f"a batch of {batch} rows for a cache that holds {len(before)}: reset() it first")
        self._refuse_if_sliding_layers_differ()
        real = None
        if attention_mask is not None:
            real = self._new_columns(attention_mask, batch, tokens)
        step = Step(before, tokens, None if real is None or bool(real.all()) else real, *self._place(real, tokens))
        if position_ids is not None and (self._verify or tokens > 1 or position_ids.device.type == "cpu"):
            checks.check_positions(step, position_ids)
            self._verify = tokens > 1
        return step

    def _place(self, real: Tensor | None, tokens: int) -> tuple[bool, bool]:
        """Whether the new columns are of a prompt that is to be compressed once, and whether they end it."""
        if self.config.schedule != ONCE:
            return False, False
        if self._prompt_end is None:
            self.expect_prompt(tokens)
        assert self._prompt_end is not None
        fed = None if real is None else torch.cat([self._history(len(real)), real], 1)
        checks.check_prompt_block(self.columns, tokens, self._prompt_end, fed)
        return self.columns < self._prompt_end, self.columns + tokens == self._prompt_end

    def expect_prompt(self, columns: int) -> None:
        """The ``columns`` to come are the prompt, in however many forward passes; ``prompt_length``, if it was given,
        knows better. `lrsa.cache.prefill` says so; without effect once something was fed, and on other schedules."""
        if self.prompt_length is None and not self.columns:
            self._prompt_end = columns

    def _refuse_if_sliding_layers_differ(self) -> None:
        """Those before the first sparse layer have taken in the new block already, later ones have not."""
        counts = {layer.get_seq_length() for layer in self.layers[self._sparse[-1].layer_idx + 1 :]}
        if counts - {self.columns}:
            raise RuntimeError(
                f"the cache holds {self.columns} columns, a sliding-window layer after the last sparse one {counts}: a "
                "forward pass was interrupted. reset() the cache and feed the prompt anew"
            )

    def _new_columns(self, attention_mask: Tensor, batch: int, tokens: int) -> Tensor:
        """bool ``[B, T]`` on the CPU: which of the block's columns are tokens."""
        columns = self.columns + tokens
        if attention_mask.ndim != 2 or attention_mask.shape != (batch, columns):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}: the cache holds {self.columns} columns, {tokens} are "
                f"new, so it must be [B, columns] = {(batch, columns)}, the past included"
            )
        mask = attention_mask.cpu() != 0
        if self.columns and not torch.equal(mask[:, : self.columns], self._history(batch)):
            raise ValueError("attention_mask says of past columns something else than when they were fed")
        return mask[:, self.columns :]

    def _history(self, batch: int) -> Tensor:
        return self._real if self._real.shape[0] else torch.ones((batch, self.columns), dtype=torch.bool)

    def _commit(self, step: Step) -> None:
        batch = len(step.before)
        if step.real is not None or self._real.shape[0]:
            new = step.real if step.real is not None else torch.ones((batch, step.tokens), dtype=torch.bool)
            self._real = torch.cat([self._history(batch), new], 1)
        self.lengths, self.columns, self._step = step.after, self.columns + step.tokens, None

    def padding_mask(self, new: int) -> Tensor | None:
        """``[B, columns + new]`` int64, 0 at pads, for ``new`` columns of tokens to come; None if there are no pads."""
        if not self._real.shape[0]:
            return None
        return torch.nn.functional.pad(self._real.long(), (0, new), value=1)

    # ---- decoding as a CUDA graph wants it: see `lrsa.cache.graphed`

    def begin_static(self) -> None:
        """From now on, a pass with one token a row runs on device tensors alone and changes no host state: it writes
        the token and attends, twice as well as once. `advance` then says that the token was read.

        Raises:
            ValueError: nothing was fed yet, or ``max_tokens`` is not known, without which storage would move.
        """
        self._refuse_if_interrupted(-1)
        if obstacle := self.static_obstacle():
            raise ValueError(obstacle)
        self._static = StaticRows([x for x in self._sparse if isinstance(x, SparseLayer)], self.lengths)

    def static_obstacle(self) -> str | None:
        """Why `begin_static` would refuse, or None."""
        if self.config.schedule == ONCE:
            why = f"static decoding is not there for schedule={ONCE!r}, whose storage grows with each token"
            return f"{why}: decode with generate or forward passes, or take schedule='chunked'"
        if not self.lengths or self.max_tokens is None:
            what = "feed the prompt first" if not self.lengths else "make the cache with max_tokens="
            return f"static decoding needs a cache whose storage is settled: {what}"
        if len(self._sparse) != len(self.layers):
            return "static decoding needs full-attention layers alone: this model has sliding-window ones"
        return None

    def end_static(self) -> None:
        """Back to ordinary use."""
        self._static = None

    def advance(self) -> None:
        """One token was read in every row (after a static pass): count it, compress what is due."""
        assert self._static is not None, "advance() belongs between begin_static() and end_static()"
        self._refuse_if_interrupted(-1)
        step = Step(self.lengths, 1, None)
        if max(step.after) > (self.max_tokens or 0):
            raise ValueError(f"a row comes to {max(step.after)} tokens, more than max_tokens={self.max_tokens}")
        self._advancing = True  # an exception from here on leaves it so, and the cache refuses further use
        for layer in self._sparse:
            assert isinstance(layer, SparseLayer)
            layer.compress_due(step, self._scale)
            layer.columns += 1
        self._commit(step)
        self._advancing = False
        self._static.follow(step)

    def _attend_static(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert self._static is not None and isinstance(layer, SparseLayer)
        if query.shape[2] != 1:
            raise ValueError(f"{query.shape[2]} tokens a row in static decoding, which takes one: end_static() first")
        return layer.decode(self._static.slots(layer), query, key, value, scale)

    # ---- what it holds

    def report(self) -> CacheReport:
        """Slots and bytes of each layer as held now, beside those of a dense cache."""
        lengths = self.lengths or (0,)
        return CacheReport(lengths, tuple(layer_report(layer, lengths) for layer in self.layers))

    def kept(self, layer_idx: int) -> list[Tensor]:
        """Original positions that each head holds once all that is due is compressed: a row each, int64 ``[H, slots]``,
        ascending; what `lrsa.attention.kept_tokens` marks."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, AttendingLayer):
            raise ValueError(f"layer {layer_idx} is a sliding-window layer, which lrsa leaves as it is")
        return [layer.kept(row, tokens, self._scale) for row, tokens in enumerate(self.lengths)]

    # ---- what transformers asks of a cache

    def reset(self) -> None:
        """Forget everything, a wrong state included; the storage stays."""
        for layer in self.layers:
            layer.reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back: their number as a negative integer, or (5.2) how many to keep as a positive one.

        Raises:
            ValueError: some row's removed tokens have let a partition be compressed: the tokens that were dropped then
                are gone; or they are of a prompt that is compressed once. Nothing is changed.
        """
        self._refuse_if_interrupted(-1)
        remove = max(0, self.columns - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if remove == 0:
            return
        if remove > self.columns:
            raise ValueError(f"crop({tokens_to_remove}): the cache holds {self.columns} columns")
        history = self._history(len(self.lengths))[:, : self.columns - remove]
        lengths = tuple(history.sum(-1).tolist())
        if self._compresses and self.config.schedule == ONCE:
            checks.check_crop_once(self.columns - remove, self._prompt_end or 0)
        elif self._compresses:
            for geometry in {layer.geometry for layer in self._sparse if layer.config is not None}:
                checks.check_crop(geometry, self.lengths, lengths)
        for layer in self.layers:
            if isinstance(layer, AttendingLayer):
                layer.take_back(remove)
            else:
                layer.crop(-remove)
        self._real = history if self._real.shape[0] else self._real
        self.lengths, self.columns, self._verify = lengths, self.columns - remove, True

    def activate_past_recording(self) -> None:
        """transformers asks before assisted decoding, which takes rejected tokens back wherever they are.

        Raises:
            ValueError: always; a rejected token may have let a partition be compressed.
        """
        raise ValueError(
            "assisted decoding takes tokens back after they were read, which a compressed cache cannot: leave "
            "assistant_model and prompt_lookup_num_tokens out"
        )

    @property
    def _compresses(self) -> bool:
        return any(layer.config is not None for layer in self._sparse)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after the other."""
        self._select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def _select_rows(self, index: Tensor) -> None:
        self._refuse_if_interrupted(-1)
        if self._static is not None:
            raise RuntimeError("rows cannot be reordered in static decoding: end_static() first")
        if not self.lengths:
            return
        rows = index.cpu().nonzero()[:, 0] if index.dtype == torch.bool else index.cpu()
        for layer in self.layers:
            if isinstance(layer, AttendingLayer):
                layer.select_rows(rows)
            else:
                layer.batch_select_indices(rows.to(layer.keys.device))
        self.lengths = tuple(self.lengths[i] for i in rows.tolist())
        self._real = self._real[rows] if self._real.shape[0] else self._real

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed, pads included: what transformers cuts inputs by."""
        return self.columns

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)
