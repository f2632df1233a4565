"""Tasks x compressions: one cell each, with measured ratio and bytes, and every example's outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import from_conf
from lrsa.config import EvaluationConf, GenerateConf
from lrsa.data import Sample, SampleSet, build_samples
from lrsa.evaluation.cells import Cell, Column, generate_cell, score_cell
from lrsa.evaluation.generate import Answer, stop_tokens
from lrsa.evaluation.journal import Finished, Journal, weights_fingerprint
from lrsa.evaluation.progress import CellProgress
from lrsa.evaluation.scoring import Outcome

# Of a model's config: where it was read, by which version, and the attention it was trained with.
_NOT_IN_MODEL = ("_name_or_path", "transformers_version", "lrsa")


@dataclass(frozen=True)
class Task:
    """A task's prompts, with the context, and where asked for without (the floor) and with its gold alone (`gold`)."""

    name: str
    prompts: SampleSet
    floor: SampleSet | None
    gold: SampleSet | None = None

    def facts(self) -> list[dict[str, Any]]:
        """For the record."""
        facts = [{**self.prompts.describe(), "name": self.name}]
        if self.floor is not None:
            facts.append({**self.floor.describe(), "name": f"{self.name} without context"})
        if self.gold is not None:
            facts.append({**self.gold.describe(), "name": f"{self.name} with its gold documents alone"})
        return facts

    def columns(self, compressions: Sequence[float]) -> list[tuple[str, float | None, SampleSet]]:
        """Context, nominal compression and prompts of each cell: floor, gold, then the whole context compressed."""
        yardsticks = [("none", None, self.floor), ("gold", 1.0, self.gold)]
        wanted = [(context, factor, prompts) for context, factor, prompts in yardsticks if prompts is not None]
        return wanted + [("full", factor, self.prompts) for factor in compressions]

    def stop_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """What ends a generated answer, id to text."""
        return stop_tokens(tokenizer, self.prompts.prompt.end)


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
            gold = SampleSet(examples, tokenizer, None, gold_only=True, loaded=prompts.loaded) if conf.ceiling else None
        except (ValueError, OSError) as error:
            error.add_note(f"in evaluation.tasks.{name}")
            raise
        tasks.append(Task(name, prompts, floor, gold))
    return tasks


def identity(
    model: PreTrainedModel, conf: EvaluationConf, tasks: Sequence[Task], generate: GenerateConf | None = None
) -> dict[str, Any]:
    """What determines the outcomes of `evaluate` with these arguments, as a `Journal` asks for it: settings, data,
    model. Machine and versions are the caller's to add.
    """
    settings = {name: value for name, value in asdict(conf).items() if name not in ("tasks", "bootstrap")}
    described = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_IN_MODEL}
    return {
        "evaluation": settings,
        "generate": None if generate is None else asdict(generate),
        "data": {fact["name"]: fact["fingerprint"] for task in tasks for fact in task.facts()},
        "model": {"weights": weights_fingerprint(model), "config": described},
    }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conf: EvaluationConf,
    length: int | None = None,
    *,
    tasks: Sequence[Task] | None = None,
    generate: GenerateConf | None = None,
    progress: bool = True,
    journal: Journal | None = None,
) -> tuple[list[Cell], list[Outcome] | list[Answer]]:
    """Evaluate `model` on every task at every compression, without the context (`conf.floor`), and with the gold
    documents alone (`conf.ceiling`).

    Args:
        length: tokens a prompt with its answer, T, where `conf.length` is not set.
        tasks: what `load_tasks` returned for the same arguments, if it was called before.
        generate: generate answers, with these settings; None: score the references in one pass each.
        journal: gets every batch as it is finished; those that it holds already are not computed again.

    Returns:
        cells, with the fields of `lrsa.results.schema.CELL` (`compression` 1 is the full cache, None the floor; ratios,
        slots and bytes count prompt tokens and are means over prompts that differ in length), and all outcomes.

    Raises:
        ValueError: compressions above 1 asked of dense attention; what `generate_answers` refuses.
    """
    attention = from_conf(conf.attention)
    if attention is None and any(factor != 1 for factor in conf.compressions):
        raise ValueError(
            f"evaluation.attention.scorer=dense cannot compress, but evaluation.compressions={conf.compressions}: "
            "choose a sparse evaluation.attention, or compressions=[1]"
        )
    cells: list[Cell] = []
    outcomes: list[Any] = []
    with CellProgress("scoring" if generate is None else "generating", progress) as bar:
        for task in load_tasks(tokenizer, conf, length) if tasks is None else tasks:
            made: dict[str, list[Sample]] = {}
            for context, factor, prompts in task.columns(conf.compressions):
                title = f"{task.name} {_title(context, factor)}"
                if prompts.fingerprint not in made:
                    bar.start(f"{task.name}: building prompts", len(prompts))
                    made = {prompts.fingerprint: build_samples(prompts, bar.advance)}
                samples = made[prompts.fingerprint]
                used = None if attention is None or factor is None else attention.with_compression(factor)
                column = Column(task.name, samples, used, factor, context)
                finished = Finished() if journal is None else journal.column(column)
                cell: Cell
                found: Sequence[Outcome] | Sequence[Answer]
                if generate is None:
                    bar.start(title, len(samples), finished.rows)
                    cell, found = score_cell(model, tokenizer, column, conf, bar.advance, finished)
                else:
                    bar.start(title, sum(len(sample.answer_spans) for sample in samples), finished.rows)
                    stop_ids = list(task.stop_tokens(tokenizer))
                    advance = bar.advance
                    cell, found = generate_cell(model, tokenizer, column, conf, generate, stop_ids, advance, finished)
                cell["data_fingerprint"] = prompts.fingerprint
                if context != "full":
                    cell["measured_ratio"] = None  # another prompt, not a compressed one
                cells.append(cell)
                outcomes += found
                f1 = f", F1 {100 * cell['f1']:.1f}" if "f1" in cell else ""
                bar.finish(f"{title}: {100 * cell['exact']:.1f} %{f1}, n {cell['n']}, {cell['seconds']:.1f} s")
    return cells, outcomes


def _title(context: str, factor: float | None) -> str:
    if context != "full" or factor is None:
        return "gold documents alone" if context == "gold" else "no context"
    return "full" if factor == 1 else f"{factor:g}x"
