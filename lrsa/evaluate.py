"""`lrsa-eval`: score a checkpoint over the grid of tasks and compressions."""

from __future__ import annotations

from collections.abc import Sequence

import hydra
import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from lrsa.config import EvalConf, config_dir, register_configs
from lrsa.evaluation import evaluate, load_tasks
from lrsa.models import build_model, build_tokenizer
from lrsa.results import Record
from lrsa.tracking import finish, recorded, task_overrides
from lrsa.training import resolve_device
from lrsa.validation import bad_input_without_traceback, check_context_window, check_eval

register_configs()


@hydra.main(config_path=str(config_dir()), config_name="eval", version_base=None)
def main(config: DictConfig) -> None:
    """Hydra entry."""
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, EvalConf)
    with bad_input_without_traceback():
        run_evaluation(conf, overrides=task_overrides())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the jobs of a multirun share the process


def run_evaluation(conf: EvalConf, overrides: Sequence[str] = ()) -> Record:
    """Validate, record, score, in `conf.run.output_dir`; returns the finished record.

    Raises:
        ConfigError: settings that cannot work, before anything is written.
        Exception: whatever went wrong later, after the record and the W&B run were marked as failed.
    """
    check_eval(conf)
    if conf.run.threads is not None:
        torch.set_num_threads(conf.run.threads)
    with recorded(conf, "lrsa-eval", conf.run.arm or conf.run.name, overrides) as (record, logger):
        seed_everything(conf.run.seed, verbose=False)
        tokenizer = build_tokenizer(conf.model)
        tasks = load_tasks(tokenizer, conf.evaluation, conf.evaluation.length)
        record.update(data=[fact for task in tasks for fact in task.facts()])
        # Each cell applies its own attention; what the checkpoint was trained with plays no part here.
        model = build_model(conf.model, None).to(resolve_device(conf.trainer))
        check_context_window(model.config, conf.evaluation.length)
        cells, outcomes = evaluate(
            model,
            tokenizer,
            conf.evaluation,
            conf.evaluation.length,
            tasks=tasks,
            progress=conf.trainer.progress,
        )
        finish(record, logger, cells, outcomes)
    return record


if __name__ == "__main__":
    main()
