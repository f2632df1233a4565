"""`lrsa-train`: post-train a model, save it, and score it over the grid of tasks and compressions."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import from_conf
from lrsa.attention.config import BY_LAYER
from lrsa.config import TrainConf, config_dir, register_configs
from lrsa.data import LRSADataModule
from lrsa.evaluation import evaluate, load_tasks
from lrsa.models import build_model, build_tokenizer, set_attention
from lrsa.results import Record, downsample
from lrsa.results.summary import headline
from lrsa.sweep import register_sweeps, run_once
from lrsa.tracking import WandbRun, finish, journalled, plain, recorded, task_overrides
from lrsa.training import PostTraining, TrainingResult, find_checkpoint, fit, resolve_device, save_model
from lrsa.training.lora import add_lora, merge_lora
from lrsa.training.module import parameter_counts
from lrsa.training.sharded import FSDP, gathered_state, is_first_process, leave
from lrsa.validation import bad_input_without_traceback, check_context_window, check_ranking, check_train

log = logging.getLogger(__name__)
register_configs()
register_sweeps()

# What a resumed run must share with the one that it continues; paths of caches and the like may change.
IDENTITY = ("model", "attention", "data", "recipe")
NOT_IDENTITY = {
    # the layers act through attention.dense_layers alone
    "model": ("gradient_checkpointing", "retrieval_layers", "ranked_on"),
    "data": ("cache_dir", "workers"),
    "recipe": ("name",),
}


@hydra.main(config_path=str(config_dir()), config_name="train", version_base=None)
def main(config: DictConfig) -> float | None:
    """Hydra entry; returns the headline score, for sweepers that optimise."""
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, TrainConf)
    try:
        with bad_input_without_traceback():
            return run_once(conf, lambda conf: run_training(conf, overrides=task_overrides()))
    finally:
        # The jobs of a multirun share the process: the next one needs this one's memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_training(conf: TrainConf, overrides: Sequence[str] = ()) -> float | None:
    """Validate, record, train, save, evaluate, in `conf.run.output_dir`.

    Returns:
        Mean exact match (a fraction) over the compressed cells, or over the full ones where none is compressed; None
        without tasks.

    Raises:
        ConfigError: settings that cannot work, before anything is written.
        Exception: whatever went wrong later, after the record and the W&B run were marked as failed.
    """
    check_train(conf)
    if conf.run.threads is not None:
        torch.set_num_threads(conf.run.threads)
    if not is_first_process():
        _train_beside(conf)
        return None
    with recorded(conf, "lrsa-train", conf.run.arm or conf.recipe.name, overrides) as (record, logger):
        return _train_and_evaluate(conf, record, logger)


def _train_and_evaluate(conf: TrainConf, record: Record, logger: WandbRun | None) -> float | None:
    seed_everything(conf.run.seed, verbose=False)
    tokenizer = build_tokenizer(conf.model)
    tasks = load_tasks(tokenizer, conf.evaluation, conf.data.length)
    record.update(data=[fact for task in tasks for fact in task.facts()])
    if conf.recipe.train:
        model = _train(conf, tokenizer, record, logger)
    else:
        model = build_model(conf.model, None)
        check_ranking(conf, model.config)
    model.to(resolve_device(conf.trainer))
    with journalled(record, conf, model, tasks) as journal:
        cells, outcomes = evaluate(
            model,
            tokenizer,
            conf.evaluation,
            conf.data.length,
            tasks=tasks,
            progress=conf.trainer.progress,
            journal=journal,
        )
        finish(record, logger, cells, outcomes)
    return headline(cells)


def _train(
    conf: TrainConf,
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    logger: WandbRun | None,
) -> PreTrainedModel:
    """The trained model, adapters merged, saved in `<run folder>/model`."""
    folder = Path(conf.run.output_dir)
    attention = from_conf(conf.attention)
    data = LRSADataModule(conf.data, tokenizer, conf.recipe, conf.run.seed)
    data.setup()
    record.update(data=data.describe())
    model, adapter = _built(conf)
    for factor in conf.recipe.compressions:
        used = None if attention is None else attention.with_compression(factor)
        if used is not None and used.budget in BY_LAYER:
            log.info("%gx: %s", factor, used.spread(model.config.get_text_config().num_hidden_layers))
    parameters = parameter_counts(model)
    trained = _fitted(conf, model, data, logger)
    record.update(training={**_training_facts(trained), "parameters": parameters, "devices": conf.trainer.devices})
    if conf.trainer.strategy == FSDP:  # a whole model again, with the weights that the processes hold together
        state = gathered_state(model)
        leave()
        model, adapter = _built(conf)
        model.load_state_dict(state)
    if conf.trainer.save_model:
        model = save_model(model, tokenizer, folder / "model", attention, adapter)
        log.info("model: %s", folder / "model")
    elif adapter is not None:
        model = merge_lora(adapter)
    return model


def _built(conf: TrainConf) -> tuple[PreTrainedModel, PeftModel | None]:
    model = build_model(conf.model, None)
    check_ranking(conf, model.config)  # before layers that the model may not have are asked for
    set_attention(model, from_conf(conf.attention))
    check_context_window(model.config, conf.data.length)
    return model, None if conf.model.lora is None else add_lora(model, conf.model.lora)


def _fitted(
    conf: TrainConf, model: PreTrainedModel, data: LRSADataModule, logger: WandbRun | None = None
) -> TrainingResult:
    module = PostTraining(
        model,
        from_conf(conf.attention),
        conf.recipe,
        conf.run.seed,
        identity=_identity(conf),
        not_identity=[f"{group}.{name}" for group, names in NOT_IDENTITY.items() for name in names],
    )
    resume = None if conf.resume is None else find_checkpoint(conf.resume)
    return fit(module, data, conf.trainer, Path(conf.run.output_dir), logger=logger, resume=resume)


def _train_beside(conf: TrainConf) -> None:
    """The part of a process that is not the first: it trains its share, and writes nothing."""
    seed_everything(conf.run.seed, verbose=False)
    data = LRSADataModule(conf.data, build_tokenizer(conf.model), conf.recipe, conf.run.seed)
    model, _ = _built(conf)
    _fitted(conf, model, data)
    gathered_state(model)
    leave()


def _training_facts(trained: TrainingResult) -> dict[str, Any]:
    steps, loss, kl, hidden = (
        [entry.get(name) for entry in trained.history] for name in ("step", "loss", "kl", "hidden")
    )
    curve = downsample(steps, loss, kl=kl, hidden=hidden)  # type: ignore[arg-type]  # steps and losses are never None
    return {**trained.summary, "loss_curve": curve}


def _identity(conf: TrainConf) -> dict[str, Any]:
    config = plain(conf)
    shared = {
        group: {name: value for name, value in config[group].items() if name not in NOT_IDENTITY.get(group, ())}
        for group in IDENTITY
    }
    return {**shared, "seed": conf.run.seed, "precision": conf.trainer.precision}


if __name__ == "__main__":
    main()
