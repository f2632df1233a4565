"""Which layers need the full cache: a greedy forward search over the attention's `dense_layers`.

All layers attend under `evaluation.attention` as it is set, but for its `dense_layers`, the start set. Each round tries
every layer that is left as one more dense layer, and keeps the one under which the references are likeliest. The order
is a greedy one: what a layer is worth depends on those that are dense already, and a set of n layers that was searched
as a whole may do better than the first n. A search that was cut off goes on from where it was, with the order so far as
`evaluation.attention.dense_layers`.

Related: DuoAttention (arXiv 2410.10819) keeps the full cache for the heads that retrieve, PyramidKV (arXiv 2406.02069)
gives layers unequal budgets. Here the unit is a layer, as `dense_layers` has it, and its worth is measured on tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig, from_conf
from lrsa.config import EvaluationConf, LayersConf
from lrsa.data import Sample, build_samples
from lrsa.data.datamodule import pad_id_of
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.grid import Task
from lrsa.evaluation.progress import CellProgress
from lrsa.evaluation.scoring import Outcome, evaluating, score

Found = dict[str, Any]
SCORES = ("nll", "exact")


def rank_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conf: EvaluationConf,
    settings: LayersConf,
    tasks: Sequence[Task],
    progress: bool = True,
    on_round: Callable[[Found], object] | None = None,
) -> Found:
    """The first `settings.count` layers that are to be dense, in order. `conf.compressions` is not read.

    Args:
        on_round: called with what was found so far before the first round and after each.

    Returns:
        `start`, the layers that are dense from the start; `order`, these and then those that were added, as
        `dense_layers` takes them; `full`, a score with every layer dense; `rounds`, of which the first adds no layer
        (`layer` None), each with the score after it and `candidates`, those of every layer that was tried. A score is
        `nll` (nats an answer token) and `exact` (a fraction), means over tasks of means over examples, and `tasks`,
        these means and `n` by task.

    Raises:
        EvaluationInputError: more layers asked for than are left, a start set outside the model, a likelihood that is
            no number.
    """
    attention = from_conf(conf.attention)
    assert attention is not None  # the config's checks
    start, candidates = _layers(model, attention, settings.count)
    attention = replace(attention, dense_layers=start)
    # Sparse throughout: `score` puts back what it found, and to dense and back would be two changes a candidate.
    with CellProgress("ranking layers", progress) as bar, evaluating(model, attention):
        samples = _build(tasks, bar)
        total = sum(map(len, samples.values()))

        def measure(used: SparseAttentionConfig | None) -> Found:
            return _measure(model, tokenizer, conf, samples, used, bar)

        bar.start("none, all", 2 * total)
        found: Found = {"start": list(start), "order": list(start), "full": measure(None)}
        found["rounds"] = [{"layer": None, **measure(attention), "candidates": []}]
        bar.finish(f"no layer added: {_said(found['rounds'][0])}; every layer dense: {_said(found['full'])}")
        for number in range(1, settings.count + 1):
            if on_round is not None:
                on_round(found)
            left = [layer for layer in candidates if layer not in found["order"]]
            bar.start(f"{number} of {settings.count}", len(left) * total)
            tried = [
                {"layer": layer, **measure(replace(attention, dense_layers=(*found["order"], layer)))} for layer in left
            ]
            best = min(tried, key=lambda of: of["nll"])  # the first of equals, which is the earlier layer
            found["order"].append(best["layer"])
            found["rounds"].append({**best, "candidates": tried})
            bar.finish(f"{number} of {settings.count}: layer {best['layer']}, {_said(best)}")
    if on_round is not None:
        on_round(found)
    return found


def _layers(model: PreTrainedModel, attention: SparseAttentionConfig, count: int) -> tuple[tuple[int, ...], list[int]]:
    """The start set, counted from the first layer, and the layers that can be added: those with full attention."""
    config = model.config.get_text_config()
    depth: int = config.num_hidden_layers
    try:
        start = tuple(dict.fromkeys(attention.resolved(depth).dense_layers))
    except ValueError as error:
        raise EvaluationInputError(f"evaluation.attention.{error}: name layers of 0 to {depth - 1}") from error
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * depth
    left = [layer for layer, kind in enumerate(kinds) if kind == "full_attention" and layer not in start]
    if count > len(left):
        raise EvaluationInputError(
            f"layers.count={count}, but {len(left)} of the model's {depth} layers can be added: those with full "
            f"attention that are not in evaluation.attention.dense_layers={list(attention.dense_layers)} already; "
            + (f"set layers.count to 1 to {len(left)}" if left else "take some out of dense_layers")
        )
    return start, left


def _build(tasks: Sequence[Task], bar: CellProgress) -> dict[str, list[Sample]]:
    samples = {}
    for task in tasks:
        bar.start(f"{task.name}: building prompts", len(task.prompts))
        samples[task.name] = build_samples(task.prompts, bar.advance)
    return samples


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conf: EvaluationConf,
    samples: Mapping[str, Sequence[Sample]],
    used: SparseAttentionConfig | None,
    bar: CellProgress,
) -> Found:
    options: dict[str, Any] = {"batch_size": conf.batch_size, "pad_id": pad_id_of(tokenizer)}
    options |= {"precision": conf.precision, "on_batch": bar.advance}
    found = {name: _means(score(model, rows, used, **options)) for name, rows in samples.items()}
    for name, of in found.items():
        if not math.isfinite(of["nll"]):
            dense = "every layer" if used is None else list(used.dense_layers)
            raise EvaluationInputError(
                f"evaluation.tasks.{name}: the references' NLL is {of['nll']} with {dense} dense, which ranks nothing; "
                f"is model.dtype or evaluation.precision={conf.precision} too narrow for the model?"
            )
    return {name: sum(of[name] for of in found.values()) / len(found) for name in SCORES} | {"tasks": found}


def _means(outcomes: Sequence[Outcome]) -> Found:
    n = len(outcomes)
    return {name: sum(float(getattr(outcome, name)) for outcome in outcomes) / n for name in SCORES} | {"n": n}


def _said(of: Found) -> str:
    return f"NLL {of['nll']:.4f}, {100 * of['exact']:.1f} %"
