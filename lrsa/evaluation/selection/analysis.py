"""What the selection does: which of an answer's tokens are still held when it is asked for, how far two models (or two
rules on one model) agree, and whether a model does better by what it keeps or by what it makes of it (the swap).

Y compressed layers, H key/value heads, B samples of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import from_conf
from lrsa.attention.inspection import selecting
from lrsa.config import EvaluationConf, SelectionConf
from lrsa.data import Sample, build_samples
from lrsa.data.datamodule import pad_id_of
from lrsa.data.gold import gold_questions
from lrsa.evaluation.cells import Cell, Column, scored_cell
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.grid import Task
from lrsa.evaluation.progress import CellProgress
from lrsa.evaluation.scoring import Outcome, batches_of_similar_length, evaluating, score
from lrsa.evaluation.selection.recording import Looked, Recorder, batch_of, look_for
from lrsa.evaluation.selection.statistics import Pair, agreement, survival, swap

OWN, AGAINST = "own", "against"


class Gathered:
    """What the batches of a cell come to, by pairs: a model, and whose selection, its own or another model's or rule's.

    scored: outcomes of each sample, by its index; tokens, held: which of the tokens looked for, and `Recorder.held` of
    them, a batch; common, ranked: `Recorder.common`, and the compressed tokens of each sample.
    """

    def __init__(self) -> None:
        self.scored: dict[Pair, dict[int, list[Outcome]]] = {}
        self.tokens: dict[Pair, list[np.ndarray]] = {}
        self.held: dict[Pair, list[np.ndarray]] = {}
        self.common: dict[Pair, list[np.ndarray]] = {}
        self.ranked: dict[Pair, list[np.ndarray]] = {}
        self.layers: list[int] = []  # that choose

    def add_scores(self, pair: Pair, indices: Sequence[int], samples: Sequence[Sample], found: list[Outcome]) -> None:
        flat = iter(found)
        for index, sample in zip(indices, samples, strict=True):
            self.scored.setdefault(pair, {})[index] = [next(flat) for _ in sample.answer_spans]

    def outcomes(self, pair: Pair) -> list[Outcome]:
        """In the order of the samples."""
        of = self.scored[pair]
        return [outcome for index in sorted(of) for outcome in of[index]]

    def add_common(self, pair: Pair, recorder: Recorder, other: Sequence[Tensor]) -> None:
        self.common.setdefault(pair, []).append(recorder.common(other))
        self.ranked.setdefault(pair, []).append(np.asarray(recorder.batch.ranked.sum(-1).cpu(), dtype=np.float64))

    def agreement(self, pair: Pair, resamples: int) -> dict[str, Any] | None:
        """None where nothing is compressed."""
        ranked = np.concatenate(self.ranked[pair])
        common = np.concatenate(self.common[pair], 2)[:, :, ranked > 0]
        return agreement(common, ranked[ranked > 0], resamples) if common.size else None

    def add_held(self, pair: Pair, tokens: np.ndarray, held: np.ndarray) -> None:
        self.tokens.setdefault(pair, []).append(tokens)
        self.held.setdefault(pair, []).append(held)

    def survival(self, pair: Pair, looked: Looked, resamples: int) -> dict[str, Any]:
        """By kind. Batches hold samples of similar length, `looked` has the samples in their own order."""
        ranked, kept = np.concatenate(self.ranked[pair]).sum(), np.concatenate(self.common[pair], 2)[2]
        base = kept.sum(1).mean(1) / max(ranked, 1)
        tokens, held = np.concatenate(self.tokens[pair]), np.concatenate(self.held[pair], 1)
        order = np.argsort(tokens)
        tokens, held = tokens[order], held[:, order]
        found = {}
        for kind, rows in looked.rows.items():
            first, stop = np.searchsorted(tokens, [rows.start, rows.stop])
            wanted = looked.wanted[kind].part(tokens[first:stop] - rows.start)
            found[kind] = survival(held[:, first:stop], wanted, base, resamples)
        return found


def analyse(
    model: PreTrainedModel,
    other: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    conf: EvaluationConf,
    settings: SelectionConf,
    tasks: Sequence[Task],
    progress: bool = True,
) -> tuple[list[Cell], list[Outcome], list[dict[str, Any]]]:
    """Every task at every compression above 1.

    Args:
        other: a model of the same shape, whose selection is compared with, and swapped for, that of `model`.

    Returns:
        cells and outcomes of `model` by itself, as mode=score has them; and for each cell what `survival` (of both
        models), `agreement` (of models and rules) and `swap` found, as `lrsa.results.selection` reads it.

    Raises:
        EvaluationInputError: a model of another shape, a task without gold passages.
    """
    attention = from_conf(conf.attention)
    assert attention is not None  # the config's checks
    models = {OWN: model} if other is None else {OWN: model, AGAINST: other}
    if other is not None:
        _check_shapes(model, other, settings.against)
    cells: list[Cell] = []
    outcomes: list[Outcome] = []
    found: list[dict[str, Any]] = []
    with CellProgress("comparing selections", progress) as bar:
        for task in tasks:
            bar.start(f"{task.name}: building prompts", len(task.prompts))
            samples = build_samples(task.prompts, bar.advance)
            try:
                questions = gold_questions(task.prompts, samples)
            except ValueError as error:
                raise EvaluationInputError(f"evaluation.tasks.{task.name}: {error}; mode=score can do it") from error
            for factor in (factor for factor in conf.compressions if factor != 1):
                used = attention.with_compression(factor)
                assert used is not None
                column = Column(task.name, samples, used, factor)
                looked = look_for(samples, questions, used.geometry)
                bar.start(f"{task.name} {factor:g}x", len(samples))
                clock = time.perf_counter()
                gathered = _read(models, tokenizer, column, conf, settings, looked, bar)
                own = gathered.outcomes((OWN, OWN))
                cell = scored_cell(model, column, conf, own)
                cells.append({**cell, "data_fingerprint": task.prompts.fingerprint})
                outcomes += own
                found.append(_found(gathered, looked, column, models, conf.bootstrap))
                took = f"n {len(own)}, {time.perf_counter() - clock:.1f} s"
                bar.finish(f"{task.name} {factor:g}x: {100 * cell['exact']:.1f} %, {took}")
    return cells, outcomes, found


def _check_shapes(model: PreTrainedModel, other: PreTrainedModel, name: str | None) -> None:
    shapes = [
        {key: getattr(m.config.get_text_config(), key, None) for key in
         ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")}
        for m in (model, other)
    ]  # fmt: skip
    if shapes[0] != shapes[1]:
        raise EvaluationInputError(
            f"selection.against={name} has another shape than the model, {shapes[1]} and not {shapes[0]}: layers, "
            "heads and tokens must correspond; name a checkpoint of the same model"
        )


def _read(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    column: Column,
    conf: EvaluationConf,
    settings: SelectionConf,
    looked: Looked,
    bar: CellProgress,
) -> Gathered:
    assert column.attention is not None
    gathered, attention = Gathered(), column.attention
    rivals = {
        name: replace(attention, scorer=name, scorer_args={}, budget="uniform", dense_layers=())
        for name in settings.scorers
    }
    with ExitStack() as stack:
        for each in models.values():
            stack.enter_context(evaluating(each, attention))
        for indices in batches_of_similar_length([len(sample.input_ids) for sample in column.samples], conf.batch_size):
            rows = [column.samples[index] for index in indices]
            batch, tokens = batch_of(rows, indices, looked, attention.geometry, next(iter(models.values())).device)
            recorders = {}
            for name, each in models.items():
                ranking = min(indices) < settings.scorer_samples
                recorder = recorders[name] = Recorder(batch, rivals if ranking else {})
                with selecting(recorder):
                    gathered.add_scores((name, name), indices, rows, _score(each, tokenizer, rows, column, conf))
                gathered.layers = sorted(recorder.kept)
                if not gathered.layers:
                    raise EvaluationInputError(
                        f"no layer chooses at {column.compression:g}x: each is dense (evaluation.attention.dense_layers"
                        f"={list(attention.dense_layers)}), or keeps nothing"
                    )
                gathered.add_held((name, name), tokens, recorder.held(recorder.layers))
                gathered.add_common((name, name), recorder, recorder.layers)
                for rival, kept in recorder.rival_kept.items():
                    gathered.add_held((name, rival), tokens, recorder.held(kept))
                    gathered.add_common((name, rival), recorder, kept)
            for name, chosen in _swaps(models):
                with selecting(recorders[chosen].again):
                    scored = _score(models[name], tokenizer, rows, column, conf)
                    gathered.add_scores((name, chosen), indices, rows, scored)
            if AGAINST in recorders:
                gathered.add_common((OWN, AGAINST), recorders[OWN], recorders[AGAINST].layers)
            bar.advance(len(rows), sum(sample.length for sample in rows))
    return gathered


def _swaps(models: Mapping[str, PreTrainedModel]) -> Iterator[Pair]:
    """Whose weights, whose selection."""
    yield from ((name, chosen) for name in models for chosen in models if name != chosen)


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Sample],
    column: Column,
    conf: EvaluationConf,
) -> list[Outcome]:
    return score(
        model, rows, column.attention, batch_size=len(rows), pad_id=pad_id_of(tokenizer), precision=conf.precision,
        task=column.task, compression=column.compression,
    )  # fmt: skip


def _found(
    gathered: Gathered, looked: Looked, column: Column, models: Mapping[str, PreTrainedModel], resamples: int
) -> dict[str, Any]:
    survived = {name: gathered.survival((name, name), looked, resamples) for name in models}
    rules = [
        {"of": of, "by": by, "found": gathered.survival((of, by), looked, resamples)}
        for of, by in gathered.held
        if of != by
    ]
    pairs = [pair for pair in gathered.common if pair[0] != pair[1]]
    agreed = [{"of": of, "with": by, "found": gathered.agreement((of, by), resamples)} for of, by in pairs]
    swapped = None
    if AGAINST in models:
        swapped = swap({pair: gathered.outcomes(pair) for pair in gathered.scored}, resamples)
    return {
        "task": column.task,
        "compression": column.compression,
        "samples": len(column.samples),
        "layers": gathered.layers,
        "survival": survived,
        "survival_by_rule": rules,
        "agreement": agreed,
        "swap": swapped,
    }
