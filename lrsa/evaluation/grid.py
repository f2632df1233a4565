"""Tasks x compressions: one cell each, with measured ratio and bytes, and every example's outcome."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig, from_conf, slots
from lrsa.config import EvaluationConf
from lrsa.data import Sample, SampleSet
from lrsa.data.datamodule import pad_id_of
from lrsa.evaluation.scoring import Outcome, score
from lrsa.results.statistics import bootstrap_mean


@dataclass(frozen=True)
class Task:
    """A task's prompts, with the context and (for the floor) without."""

    name: str
    prompts: SampleSet
    floor: SampleSet | None

    def facts(self) -> list[dict[str, Any]]:
        """For the record."""
        facts = [{**self.prompts.describe(), "name": self.name}]
        if self.floor is not None:
            facts.append({**self.floor.describe(), "name": f"{self.name} without context"})
        return facts


def load_tasks(tokenizer: PreTrainedTokenizerBase, conf: EvaluationConf, length: int | None) -> list[Task]:
    """Read and check what `evaluate` needs, so that a missing file or a too long context shows before training.

    Args:
        length: tokens a prompt with its answer, T, where `conf.length` is not set.
    """
    length = conf.length if conf.length is not None else length
    tasks = []
    for name, examples in conf.tasks.items():
        try:
            prompts = SampleSet(examples, tokenizer, length)
            prompts.check(len(prompts))
            floor = SampleSet(examples, tokenizer, None, context=False, loaded=prompts.loaded) if conf.floor else None
        except (ValueError, OSError) as error:
            error.add_note(f"in evaluation.tasks.{name}")
            raise
        tasks.append(Task(name, prompts, floor))
    return tasks


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conf: EvaluationConf,
    length: int | None = None,
    *,
    tasks: Sequence[Task] | None = None,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Score `model` on every task at every compression, and without the context (`conf.floor`).

    Args:
        length: tokens a prompt with its answer, T, where `conf.length` is not set.
        tasks: what `load_tasks` returned for the same arguments, if it was called before.

    Returns:
        cells, with the fields of `lrsa.results.schema.CELL` (`compression` 1 is the full cache, None the floor; ratios,
        slots and bytes count prompt tokens and are means over prompts that differ in length), and all outcomes.

    Raises:
        ValueError: compressions above 1 asked of dense attention.
    """
    attention = from_conf(conf.attention)
    if attention is None and any(factor != 1 for factor in conf.compressions):
        raise ValueError(
            f"evaluation.attention.scorer=dense cannot compress, but evaluation.compressions={conf.compressions}: "
            "choose a sparse evaluation.attention, or compressions=[1]"
        )
    cells: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    with _ScoringProgress(progress) as bar:
        for task in load_tasks(tokenizer, conf, length) if tasks is None else tasks:
            columns: list[tuple[float | None, SampleSet]] = [(factor, task.prompts) for factor in conf.compressions]
            if task.floor is not None:
                columns.insert(0, (None, task.floor))
            made: dict[str, list[Sample]] = {}
            for factor, prompts in columns:
                title = f"{task.name} {'no context' if factor is None else 'full' if factor == 1 else f'{factor:g}x'}"
                if prompts.fingerprint not in made:
                    bar.start(f"{task.name}: building prompts", len(prompts))
                    made = {prompts.fingerprint: [prompts[index] for index in range(len(prompts))]}
                samples = made[prompts.fingerprint]
                used = None if attention is None or factor is None else attention.with_compression(factor)
                bar.start(title, len(samples))
                clock = time.perf_counter()
                scored = score(
                    model,
                    samples,
                    used,
                    batch_size=conf.batch_size,
                    pad_id=pad_id_of(tokenizer),
                    precision=conf.precision,
                    task=task.name,
                    compression=factor,
                    on_batch=bar.advance,
                )
                seconds = time.perf_counter() - clock
                cell = {
                    **_summary(scored, conf.bootstrap),
                    **measure_cache(model, used, [_prompt_tokens(sample) for sample in samples], conf.precision),
                    "seconds": seconds,
                    "tokens_per_second": sum(sample.length for sample in samples) / seconds,
                    "data_fingerprint": prompts.fingerprint,
                }
                if factor is None:
                    cell["measured_ratio"] = None  # another prompt, not a compressed one
                cells.append(cell)
                outcomes += scored
                bar.finish(f"{title}: {100 * cell['exact']:.1f} %, n {cell['n']}, {seconds:.1f} s")
    return cells, outcomes


def _summary(scored: Sequence[Outcome], resamples: int) -> dict[str, Any]:
    estimate = bootstrap_mean([float(outcome.exact) for outcome in scored], resamples)
    return {
        "task": scored[0].task,
        "compression": scored[0].compression,
        "n": len(scored),
        "exact": estimate.mean,
        "exact_low": estimate.low,
        "exact_high": estimate.high,
        "nll": sum(outcome.nll for outcome in scored) / len(scored),
    }


def measure_cache(
    model: PreTrainedModel, attention: SparseAttentionConfig | None, prompt_tokens: Sequence[int], precision: str
) -> dict[str, Any]:
    """What the recurrent form holds after prompts of `prompt_tokens` tokens, from the closed form; means over prompts.

    Returns:
        length: prompt tokens; slots: keys a KV head holds, mean over layers; measured_ratio: full cache / kept;
        kept_per_layer: slots of each layer; kv_bytes_per_layer: keys and values of all heads, one prompt.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    layers = config.num_hidden_layers
    kept = []
    for index in range(layers):
        layer = None if attention is None else attention.for_layer(index, layers)
        held = [tokens if layer is None else slots(layer, tokens) for tokens in prompt_tokens]
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


def _prompt_tokens(sample: Sample) -> int:
    """Tokens before the (last) answer: what is in the cache when answering starts."""
    return sample.answer_spans[-1][0]


class _ScoringProgress:
    """Rich bar of the running cell with rate and time left; without a terminal, one line a cell."""

    def __init__(self, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("[bold]scoring[/] {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, rate="")
        self._clock = 0.0
        self._tokens = 0

    def __enter__(self) -> _ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, text: str, samples: int) -> None:
        self._clock, self._tokens = time.perf_counter(), 0
        self._bar.reset(self._task, description=text, total=samples, rate="")

    def advance(self, samples: int, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._clock, 1e-9)
        self._bar.update(self._task, advance=samples, rate=f"{rate:,.0f} tokens/s")

    def finish(self, text: str) -> None:
        self._console.print(text, highlight=False)
