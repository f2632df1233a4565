"""Parameters of sparse attention: one frozen object that fixes the function, whatever form computes it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lrsa.attention.layout import Geometry, PromptGeometry
from lrsa.attention.scorers import SCORERS, Scorer, build_scorer
from lrsa.config import AttentionConf

BUDGETS = ("uniform", "pyramid", "concentrated", "adaptive")
BY_LAYER = ("pyramid", "concentrated")  # budgets under which layers keep different numbers of tokens
PYRAMID_BETA = 20  # the last layer keeps 1/20 of the mean (PyramidKV's own setting)
ONCE = "prefill_once"
SCHEDULES = ("chunked", ONCE)
DEFAULT_KEEP_RATIO = 0.25
DENSE = "dense"  # the name of full attention among the scorers of a config


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Which tokens of the past a query sees.

    Args:
        scorer: registered name of the rule that ranks the tokens of a partition.
        scorer_args: the rule's own parameters, e.g. ``{"value_weight": 1.0}`` for ``lag_relative``.
        sink_size: S, first tokens that are always kept.
        lag_size: L, tokens a partition; a partition is scored against the one after it, its lag. Under
            ``prefill_once`` W, the last tokens of the prompt, which are kept and score the others.
        keep_ratio: r in (0, 1]; a compressed partition keeps ``int(r * L)`` tokens. Default 1/4 without ``top_k``.
        top_k: K in [0, L], the kept tokens as a count. At most one of ``keep_ratio`` and ``top_k``.
        chunk_size: C >= 1, tokens between two compressions; L by default, where training, prefill and decode coincide.
        dense_layers: indices of layers with full attention; negative ones count from the last layer.
        budget: how the kept tokens are shared, the same total each time: ``uniform``; ``pyramid``, linearly falling
            from the first layer to the last (PyramidKV, arXiv 2406.02069); ``concentrated``, where the total is that of
            all layers, ``dense_layers`` included: in the order given, as many of them attend densely as it pays for,
            and the other layers share the rest evenly, with ``equal_bytes_at`` as a wider window; or ``adaptive``, to
            the heads of a layer by their scores (AdaKV, arXiv 2407.11550; mask form alone). The chunked schedule has
            all of them.
        schedule: ``chunked``, each partition once its lag was read, wherever the prompt ends; or ``prefill_once``, as
            SnapKV, H2O and kvpress are published: the prompt attends densely, and at its end the p tokens between sinks
            and lag are compressed to ``int(r * p)`` (or ``min(top_k, p)``), as one partition. What follows the prompt
            sees these and all that came after it, and is never compressed.
        equal_bytes_at: T, for a window alone (``top_k=0``) in chunks, which has no ratio: `with_compression` then
            widens the window, ``lag_size``, to as many slots at T tokens as that compression of this ``lag_size`` would
            leave. With ``concentrated`` that is a hybrid of full and window layers, as close as windows come at T and
            in the mean before (``keep_ratio`` in place of ``top_k`` is its compression, as `with_compression` sets it).

    Raises:
        ValueError: a value out of range or two that contradict each other; the message names them and the fix.

    Source: LagKV (arXiv 2504.04704), LRSA (arXiv 2506.11498).
    """

    scorer: str = "lag_relative"
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    sink_size: int = 16
    lag_size: int = 128
    keep_ratio: float | None = None
    top_k: int | None = None
    chunk_size: int | None = None
    dense_layers: tuple[int, ...] = ()
    budget: str = "uniform"
    schedule: str = "chunked"
    equal_bytes_at: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scorer_args", dict(self.scorer_args))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name, least in (("sink_size", 0), ("lag_size", 1), ("chunk_size", 1), ("top_k", 0), ("equal_bytes_at", 1)):
            value = getattr(self, name)
            if value is None and name in ("chunk_size", "top_k", "equal_bytes_at"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give an integer of at least {least}")
        if self.keep_ratio is not None and self.top_k is not None:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} and top_k={self.top_k} both set the tokens kept a partition: "
                "give one of them and leave the other None"
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} is outside (0, 1]: it is the share of a partition that stays "
                "(1/4 for 4x compression); to keep nothing, set top_k=0"
            )
        if self.schedule != ONCE and self.top_k is not None and self.top_k > self.lag_size:
            raise ValueError(
                f"top_k={self.top_k} is more than lag_size={self.lag_size}, the tokens of a partition: "
                f"lower top_k to at most {self.lag_size} or raise lag_size"
            )
        hybrid = self.budget == "concentrated" and self.top_k is None
        if self.equal_bytes_at is not None and self.top_k != 0 and not hybrid:
            raise ValueError(
                f"equal_bytes_at={self.equal_bytes_at} widens a window, but top_k={self.top_k} keeps tokens of the "
                "partitions before it: set top_k=0, or leave equal_bytes_at None"
            )
        for name, valid in (("budget", BUDGETS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(valid)}")
        scorer = self.build_scorer()  # an unknown scorer or argument fails here, before any forward
        if self.schedule == ONCE:
            self._check_once(scorer)
        if self.budget == "concentrated" and not self.dense_layers:
            raise ValueError(
                "budget='concentrated' takes tokens from most layers to leave dense_layers all of theirs, and "
                "dense_layers is empty: name them, the neediest first (lrsa-eval mode=layers ranks them), or take "
                "budget='uniform'"
            )
        if self.budget == "adaptive" and not scorer.comparable:
            raise ValueError(
                f"budget='adaptive' shares tokens by comparing scores of different heads, and those of scorer="
                f"{self.scorer!r} rank the tokens of one head alone: choose one of "
                f"{', '.join(name for name in sorted(SCORERS) if SCORERS[name].comparable)}, or budget='uniform'"
            )

    def _check_once(self, scorer: Scorer) -> None:
        if self.chunk_size is not None:
            raise ValueError(
                f"chunk_size={self.chunk_size} with schedule={ONCE!r}, which compresses once, at the prompt's end: "
                "leave chunk_size None, or take schedule='chunked'"
            )
        if self.budget != "uniform":
            reason = (
                "each head would keep another number of tokens, where this schedule holds one for all"
                if self.budget == "adaptive"
                else "it shares out the tokens kept of a partition, and how many those are depends on the prompt here"
            )
            raise ValueError(
                f"budget={self.budget!r} with schedule={ONCE!r}: {reason}; take budget='uniform', or schedule='chunked'"
            )
        if self.equal_bytes_at is not None:
            raise ValueError(
                f"equal_bytes_at={self.equal_bytes_at} with schedule={ONCE!r}: it widens the window of the chunked "
                "schedule, and a keep ratio says here already what share of the prompt stays; leave equal_bytes_at "
                "None, or take schedule='chunked'"
            )
        if scorer.reads_future:
            raise ValueError(
                f"scorer={self.scorer!r} with schedule={ONCE!r}: it ranks by the prompt's queries after the "
                "compression, and a prompt compressed at its end has none; choose another scorer, or schedule='chunked'"
            )

    def __hash__(self) -> int:
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"scorer_args": self._frozen_args}
        return hash(tuple(values.items()))

    @functools.cached_property
    def _frozen_args(self) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted(self.scorer_args.items()))

    @property
    def geometry(self) -> Geometry:
        """The same parameters as plain integers: S, L, K, C.

        Raises:
            ValueError: ``prefill_once``, whose counts depend on the prompt: see `prompt`.
        """
        if self.schedule == ONCE:
            raise ValueError(
                f"schedule={ONCE!r} has no chunks: what is held depends on the prompt's length, see "
                "config.prompt(length); what asked for chunks here works with schedule='chunked' alone"
            )
        if self.top_k is not None:
            kept = self.top_k
        else:
            kept = self._share(self.lag_size)
        return Geometry(sink=self.sink_size, lag=self.lag_size, kept=kept, chunk=self.chunk_size or self.lag_size)

    def prompt(self, length: int) -> PromptGeometry:
        """What schedule ``prefill_once`` makes of a prompt of ``length`` tokens."""
        ranked = max(0, length - self.sink_size - self.lag_size)
        kept = self._share(ranked) if self.top_k is None else min(self.top_k, ranked)
        return PromptGeometry(length, min(self.sink_size, length), ranked, kept)

    def held(self, tokens: int) -> int:
        """Keys that a head holds after a prompt of ``tokens`` tokens, whatever the schedule."""
        return self.prompt(tokens).held if self.schedule == ONCE else self.geometry.held(tokens)

    def _share(self, tokens: int) -> int:
        ratio = DEFAULT_KEEP_RATIO if self.keep_ratio is None else self.keep_ratio
        return int(ratio * tokens + 1e-9)  # 1/49 of 49 is 1, not what floating point makes of it

    def build_scorer(self) -> Scorer:
        return build_scorer(self.scorer, self.scorer_args)

    @functools.cached_property
    def reads_prompt_lengths(self) -> bool:
        """Whether the parallel form must be told where each row's prompt ends: `sparse_attention`'s
        ``prompt_lengths``."""
        return self.schedule == ONCE or self.build_scorer().reads_future

    @functools.cached_property
    def mask_form_only(self) -> str | None:
        """Why the mask form (``backend="reference"``) alone computes this; None where every form does."""
        if self.build_scorer().reads_future:
            return (
                f"scorer={self.scorer!r} ranks a partition by queries that come after it was compressed, which takes "
                "the whole prompt at once"
            )
        if self.budget == "adaptive":
            return (
                "budget='adaptive' keeps another number of tokens in each head, where kernels and cache hold one for "
                "all (padding to the largest would save nothing)"
            )
        return None

    def for_layer(self, index: int, num_layers: int | None = None) -> SparseAttentionConfig | None:
        """The config of layer ``index``, or None where that layer attends densely.

        Under a budget that differs by layer, the layer's own share as ``top_k`` of a uniform one.

        Raises:
            ValueError: as `resolved`; a budget that depends on the depth, which is not given.
        """
        resolved = self.resolved(num_layers)
        if self.budget not in BY_LAYER:
            return None if index in resolved.dense_layers else self
        if num_layers is None:
            raise ValueError(
                f"budget={self.budget!r} depends on the number of layers: pass config.for_layer(index, num_layers)"
            )
        kept = _shares(resolved, num_layers)[index]
        if kept is None:
            return None
        layer = _uniform(resolved, kept)
        if self.equal_bytes_at is None or self.top_k == 0:
            return layer
        return _window_alone(layer, self.equal_bytes_at, even=True)

    def spread(self, num_layers: int) -> str:
        """In words, how tokens are shared out over layers."""
        layers = [self.for_layer(index, num_layers) for index in range(num_layers)]
        dense = [index for index, layer in enumerate(layers) if layer is None]
        rest = sorted({layer.geometry.kept for layer in layers if layer is not None})
        said = f"{len(dense)} of {num_layers} layers dense" + (f" ({', '.join(map(str, dense))})" if dense else "")
        if not rest:
            return said
        if self.equal_bytes_at is not None:
            window = next(layer.lag_size for layer in layers if layer is not None)
            return f"{said}, the others hold sinks and windows of {window} tokens"
        few = f"{rest[0]}" if len(rest) == 1 else f"{rest[0]} to {rest[-1]}"
        none = ": sinks and window alone, the scorer chooses nothing" if rest == [0] else ""
        return f"{said}, the others keep {few} of {self.lag_size} tokens a partition{none}"

    def alone(self, index: int, num_layers: int) -> SparseAttentionConfig:
        """What says the same of layer ``index`` whatever the model's depth: `for_layer`, or a config with it dense."""
        return self.for_layer(index, num_layers) or _dense_at(self, index)

    def resolved(self, num_layers: int | None) -> SparseAttentionConfig:
        """The same config with ``dense_layers`` counted from the first layer.

        Raises:
            ValueError: an index outside the model, or a negative one when ``num_layers`` is not known.
        """
        if not self.dense_layers or (num_layers is None and min(self.dense_layers) >= 0):
            return self
        if num_layers is None:
            raise ValueError(f"dense_layers={self.dense_layers} counts from the last layer: num_layers is needed")
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"dense_layers={self.dense_layers}: layer {layer} is not among {num_layers} layers")
        layers = tuple(layer % num_layers for layer in self.dense_layers)
        if self.budget == "concentrated" and len(set(layers)) < len(layers):
            raise ValueError(f"dense_layers={self.dense_layers} names a layer of {num_layers} twice: name each once")
        return self if layers == self.dense_layers else replace(self, dense_layers=layers)

    def with_compression(self, factor: float) -> SparseAttentionConfig | None:
        """The same rule at nominal compression ``factor`` (4 for "4x": keep ratio 1/4); None, full attention, at 1."""
        if factor < 1:
            raise ValueError(f"compression {factor} is below 1: 4 means that a quarter is kept, 1 the full cache")
        if factor == 1:
            return None
        if self.budget == "concentrated":  # what the windows of a hybrid hold depends on the depth: see for_layer
            return replace(self, keep_ratio=1 / factor, top_k=None)
        kept = replace(self, keep_ratio=1 / factor, top_k=None, equal_bytes_at=None)
        return kept if self.equal_bytes_at is None else _window_alone(kept, self.equal_bytes_at)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a model's ``config.json`` under ``lrsa``."""
        return {**asdict(self), "dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAttentionConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key that this version does not know, so that a newer checkpoint is never half-read.
        """
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(valid))
        if unknown:
            raise ValueError(f"unknown sparse attention fields {unknown}: the valid ones are {', '.join(valid)}")
        return cls(**values)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def from_json(cls, text: str) -> SparseAttentionConfig:
        """Inverse of `to_json`; the same object for the same text."""
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        """`to_dict` as text, made once: every layer of every step asks."""
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=512)
def _uniform(config: SparseAttentionConfig, kept: int) -> SparseAttentionConfig:
    return replace(config, budget="uniform", keep_ratio=None, top_k=kept, dense_layers=(), equal_bytes_at=None)


@functools.lru_cache(maxsize=512)
def _dense_at(config: SparseAttentionConfig, index: int) -> SparseAttentionConfig:
    return replace(config, budget="uniform", dense_layers=(index,), equal_bytes_at=None)


@functools.lru_cache(maxsize=512)
def _shares(config: SparseAttentionConfig, layers: int) -> tuple[int | None, ...]:
    """Kept tokens a partition of each layer, None where it is dense, under a budget by layer."""
    mean, most = config.geometry.kept, config.lag_size
    if config.budget == "concentrated":
        dense, kept = concentrated(mean, most, len(config.dense_layers), layers)
        return tuple(None if layer in config.dense_layers[:dense] else kept for layer in range(layers))
    shares = iter(pyramid(mean, most, layers - len(set(config.dense_layers))))
    return tuple(None if layer in config.dense_layers else next(shares) for layer in range(layers))


@functools.lru_cache(maxsize=512)
def _window_alone(config: SparseAttentionConfig, tokens: int, even: bool = False) -> SparseAttentionConfig:
    """Sinks and a window that hold as many slots after ``tokens`` as ``config``, and nothing in between."""
    lag = _window(config.geometry, tokens, even)
    return replace(config, keep_ratio=None, top_k=0, lag_size=lag, equal_bytes_at=None)


@functools.lru_cache(maxsize=64)
def _window(geometry: Geometry, tokens: int, even: bool) -> int:
    """Lag of a window alone, K = 0, that holds as many slots after ``tokens`` as ``geometry``, the widest where several
    come as close. A window's slots rise from S + lag to S + 2 lag and fall again, so that with ``even`` it is the one
    that comes closest there and, as well, in the mean of its last rise."""
    wanted = geometry.slots(tokens)
    away = {
        lag: float(abs(replace(geometry, lag=lag, kept=0, chunk=lag).slots(tokens) - wanted))
        for lag in range(1, tokens + 1)
    }
    if even:
        rise = range(max(1, tokens - geometry.lag + 1), tokens + 1)
        mean = sum(geometry.slots(t) for t in rise) / len(rise)
        away = {lag: distance + abs(geometry.sink + 1.5 * lag - 0.5 - mean) for lag, distance in away.items()}
    least = min(away.values())
    return max(lag for lag, distance in away.items() if distance == least)


def concentrated(mean: int, most: int, wanted: int, layers: int) -> tuple[int, int]:
    """Dense layers, of those ``wanted``, and kept tokens a partition of the others, which keep at least none:
    ``layers * mean`` in all, or less by what does not divide evenly.

    mean, most: K that every layer would keep, and L, which a dense layer keeps.
    """
    dense = min(wanted, layers * mean // most)
    return dense, 0 if dense == layers else (layers * mean - dense * most) // (layers - dense)


def pyramid(mean: int, most: int, layers: int) -> list[int]:
    """Kept tokens a partition of each of ``layers`` layers: linear, ``layers * mean`` in all, none above ``most``.

    Source: PyramidKV (arXiv 2406.02069), section 3; the first layer has 2 * mean less the last one's mean / beta.
    """
    if layers == 1:
        return [mean]
    last = mean / PYRAMID_BETA
    first = min(2 * mean - last, most)
    last = 2 * mean - first
    shares = [first + (last - first) * i / (layers - 1) for i in range(layers)]
    # Rounded so that the total is what it was: each layer gets what the running total has grown by.
    totals = [round(sum(shares[: i + 1])) for i in range(layers)]
    return [after - before for before, after in zip([0, *totals], totals, strict=False)]


def from_conf(conf: AttentionConf) -> SparseAttentionConfig | None:
    """The `attention` config group as a config; None for ``scorer: dense``."""
    values = {f.name: getattr(conf, f.name) for f in fields(SparseAttentionConfig)}
    return None if conf.scorer == DENSE else SparseAttentionConfig(**values)
