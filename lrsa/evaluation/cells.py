"""One cell of the grid: a task under one compression, by scoring references or by generating answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.config import EvaluationConf, GenerateConf
from lrsa.data import Sample
from lrsa.data.datamodule import pad_id_of
from lrsa.evaluation.answers import rouge_scorer
from lrsa.evaluation.generate import Answer, generate_answers
from lrsa.evaluation.journal import Finished
from lrsa.evaluation.peers import build_press
from lrsa.evaluation.scoring import Outcome, score
from lrsa.results.statistics import bootstrap_mean

Cell = dict[str, Any]  # fields of `lrsa.results.schema.CELL`
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Column:
    """What a cell is of: a task's samples under `attention`, at nominal `compression` (1: full, None: no context).

    context: how much of it the samples have: full, none, or gold, their gold documents alone.
    """

    task: str
    samples: Sequence[Sample]
    attention: SparseAttentionConfig | None
    compression: float | None
    context: str = "full"

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the other columns of a run, in its journal: all but samples and attention."""
        return self.task, self.compression, self.context


def score_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    conf: EvaluationConf,
    on_batch: OnBatch | None = None,
    finished: Finished | None = None,
) -> tuple[Cell, list[Outcome]]:
    """References scored in one pass each: token-exact match and likelihood."""
    finished = finished or Finished()
    clock = time.perf_counter() - finished.seconds
    scored = score(
        model,
        column.samples,
        column.attention,
        batch_size=conf.batch_size,
        pad_id=pad_id_of(tokenizer),
        precision=conf.precision,
        task=column.task,
        compression=column.compression,
        context=column.context,
        on_batch=on_batch,
        finished=finished,
    )
    seconds = time.perf_counter() - clock
    tokens = sum(sample.length for sample in column.samples)
    return {**scored_cell(model, column, conf, scored), **_speed(seconds, tokens)}, scored


def scored_cell(model: PreTrainedModel, column: Column, conf: EvaluationConf, scored: Sequence[Outcome]) -> Cell:
    """The cell of outcomes that `score` gave, without its speed."""
    # Tokens before the (last) answer: what is in the cache when answering starts.
    prompts = [sample.answer_spans[-1][0] for sample in column.samples]
    return {
        **_summary(column, scored, ("exact",), conf.bootstrap),
        "nll": sum(outcome.nll for outcome in scored) / len(scored),
        **measure_cache(model, column.attention, prompts, conf.precision),
    }


def generate_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    conf: EvaluationConf,
    settings: GenerateConf,
    stop_ids: Sequence[int],
    on_batch: OnBatch | None = None,
    finished: Finished | None = None,
) -> tuple[Cell, list[Answer]]:
    """Answers generated greedily: exact match by token and normalised, F1, ROUGE-L, string match; the cache as held."""
    rouge_scorer()  # its import is not this cell's time
    finished = finished or Finished()
    clock = time.perf_counter() - finished.seconds
    press = None
    if settings.peer is not None and column.compression not in (None, 1):
        assert column.compression is not None
        press = build_press(settings.peer, column.compression, settings.peer_args or {})
    attention = None if settings.peer is not None else column.attention
    answers = generate_answers(
        model,
        column.samples,
        attention,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        batch_size=conf.batch_size,
        max_new_tokens=settings.max_new_tokens,
        precision=conf.precision,
        task=column.task,
        compression=column.compression,
        context=column.context,
        block_size=settings.block_size,
        press=press,
        share_context=settings.share_context,
        on_batch=on_batch,
        finished=finished,
    )
    seconds = time.perf_counter() - clock
    prompts = [start for sample in column.samples for start, _ in sample.answer_spans]
    written = [answer.generated_tokens for answer in answers.outcomes]
    cell = {
        **_summary(column, answers.outcomes, ("exact", "exact_match", "f1", "rouge_l", "string_match"), conf.bootstrap),
        **measure_cache(model, attention, prompts, conf.precision),
        **answers.cache,
        "max_new_tokens": answers.max_new_tokens,
        "generated_tokens": sum(written) / len(written),
        "hit_limit": sum(answer.hit_limit for answer in answers.outcomes) / len(written),
        "prefilled_tokens": answers.prefilled_tokens,
        **_speed(seconds, answers.prefilled_tokens + sum(written)),
    }
    if press is not None:  # which has no closed form: what was counted stands for it
        cell |= {"slots": cell["cache_slots"], "measured_ratio": cell["cache_ratio"]}
        cell |= {"kept_per_layer": None, "kv_bytes_per_layer": None}
    return cell, answers.outcomes


def _summary(
    column: Column, outcomes: Sequence[Outcome] | Sequence[Answer], metrics: Sequence[str], resamples: int
) -> Cell:
    cell: Cell = {"task": column.task, "compression": column.compression, "context": column.context, "n": len(outcomes)}
    for name in metrics:
        estimate = bootstrap_mean([float(getattr(outcome, name)) for outcome in outcomes], resamples)
        cell |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return cell


def _speed(seconds: float, tokens: int) -> Cell:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def measure_cache(
    model: PreTrainedModel, attention: SparseAttentionConfig | None, prompt_tokens: Sequence[int], precision: str
) -> Cell:
    """What the recurrent form holds after prompts of `prompt_tokens` tokens, from the closed form; means over prompts.

    Returns:
        length: prompt tokens; slots: keys a KV head holds, mean over layers; measured_ratio: full cache / kept;
        kept_per_layer: slots of each layer; kv_bytes_per_layer: keys and values of all heads, one prompt.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    kept = []
    for index, kind in enumerate(kinds):
        layer = None if attention is None else attention.for_layer(index, layers)
        if kind == "sliding_attention":
            held = [min(tokens, config.sliding_window - 1) for tokens in prompt_tokens]
        else:
            held = [tokens if layer is None else layer.held(tokens) for tokens in prompt_tokens]
        kept.append(sum(held) / len(held))
    length = sum(prompt_tokens) / len(prompt_tokens)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = 2 if precision == "bf16-mixed" else torch.finfo(model.dtype).bits // 8
    return {
        "length": length,
        "slots": sum(kept) / layers,
        "measured_ratio": length * layers / sum(kept),
        "kept_per_layer": kept,
        "kv_bytes_per_layer": [2 * heads * head_dim * element * amount for amount in kept],
    }
