"""Checks across the fields of a whole config, before a model or a data set is touched.

Hydra has checked names and types by then. All problems are reported at once, each with the values and the fix.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from hydra.errors import CompactHydraException

from lrsa.attention import BACKENDS, flash4
from lrsa.config import (
    AttentionConf,
    DataConf,
    EvalConf,
    EvaluationConf,
    ExamplesConf,
    GenerateConf,
    LMEvalConf,
    LoggerConf,
    ModelConf,
    RecipeConf,
    TrainConf,
    TrainerConf,
)
from lrsa.data import ContextTooLongError, DataRowError
from lrsa.data.prompts import PROMPTS
from lrsa.data.sources import SOURCES, source_args
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.peers import build_press
from lrsa.results import Record, RecordError
from lrsa.training import NonFiniteLoss, find_checkpoint, micro_batches
from lrsa.training.compiling import checkpoints_outside
from lrsa.validation import attention, layers, objective, perplexity, processes, selection
from lrsa.validation.loaded import check_context_window as check_context_window
from lrsa.validation.loaded import check_ranking as check_ranking
from lrsa.validation.loaded import warn_unlike_saved as warn_unlike_saved
from lrsa.validation.problems import ConfigError, raised, report
from lrsa.validation.problems import ConfigWarning as ConfigWarning

PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
WANDB_MODES = ("online", "offline", "disabled", "shared")
DTYPES = ("float32", "bfloat16", "float16")
EVAL_MODES = ("score", "generate", "lm_eval", "perplexity", "selection", "layers")

# What the user can put right: the message says how, and where in the code it was noticed does not matter.
BAD_INPUT = (
    ConfigError,
    ContextTooLongError,
    DataRowError,
    EvaluationInputError,
    NonFiniteLoss,
    RecordError,
    FileNotFoundError,
    ConnectionError,
)


@contextlib.contextmanager
def bad_input_without_traceback() -> Iterator[None]:
    """Around a command: Hydra prints the message of `BAD_INPUT` alone, of other errors the traceback too.

    With HYDRA_FULL_ERROR=1 all errors pass as they are; a run's record holds the traceback in any case.
    """
    try:
        yield
    except BAD_INPUT as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        lines = [f"error: {error}", *getattr(error, "__notes__", [])]
        raise CompactHydraException("\n".join(lines)) from error


def check_train(conf: TrainConf) -> None:
    """Raises ConfigError listing every problem of an `lrsa-train` config; warns of what runs but looks wrong."""
    problems = [
        *_model(conf.model),
        *attention.of_training(conf),
        *attention.looks_ahead(conf.attention),
        *attention.backend(conf.model, "attention", conf.attention),
        *attention.backend(conf.model, "evaluation.attention", conf.evaluation.attention),
        *_data(conf.data),
        *_recipe(conf.recipe, conf.attention),
        *attention.one_question("attention", conf.attention, conf.recipe.train, "data.parts", conf.data.parts),
        *_trainer(conf.trainer),
        *_compiled(conf),
        *_logger(conf.logger),
        *_evaluation(conf.evaluation, conf.data.length),
        *attention.scored_once(conf.evaluation),
    ]
    if conf.resume is not None and not conf.recipe.train:
        problems += _resumed(conf.resume)
    elif conf.resume is not None:
        problems += raised("", lambda: find_checkpoint(conf.resume or ""))
    report(problems)
    factors = conf.recipe.compressions or [4]
    attention.warn_if_dense("attention", conf.attention, "data.length", conf.data.length, factors)
    attention.warn_evaluation(conf.evaluation, conf.data.length)
    attention.warn_if_tested_unlike(conf)


def check_eval(conf: EvalConf) -> None:
    """Raises ConfigError listing every problem of an `lrsa-eval` config; warns of what runs but looks wrong."""
    problems = [
        *_model(conf.model),
        *attention.problems_of("evaluation.attention", conf.evaluation.attention),
        *attention.backend(conf.model, "evaluation.attention", conf.evaluation.attention),
        *_trainer(conf.trainer),
        *_logger(conf.logger),
        *_evaluation(conf.evaluation, None),
    ]
    if conf.mode not in EVAL_MODES:
        problems.append(f"mode={conf.mode!r} is unknown; choose one of {', '.join(EVAL_MODES)}")
    if conf.resume is not None:
        problems += _resumed(conf.resume)
    if conf.resume is not None and conf.mode in ("lm_eval", "selection", "layers"):
        problems.append(
            f"resume={conf.resume}: mode={conf.mode} keeps no journal of what is finished; leave resume out"
        )
    if conf.mode == "score":
        problems += attention.scored_once(conf.evaluation)
    if conf.mode in ("generate", "lm_eval"):
        problems += attention.needs_a_cache(conf)
    if conf.mode == "generate":
        problems += _generate(conf.generate)
        problems += _peer(conf.generate, conf.evaluation)
    if conf.mode == "lm_eval":
        problems += _lm_eval(conf.lm_eval)
        problems += attention.lm_eval_once(conf.evaluation)
    if conf.mode == "perplexity":
        problems += perplexity.problems_of(conf.perplexity, conf.evaluation)
    if conf.mode == "selection":
        problems += selection.problems_of(conf.selection, conf.evaluation)
    if conf.mode == "layers":
        problems += layers.problems_of(conf.layers, conf.evaluation)
    report(problems)
    if conf.mode == "layers":
        layers.warn_if_dense(conf.evaluation)
    elif conf.mode != "lm_eval":  # whose prompts have lengths of their own
        attention.warn_evaluation(conf.evaluation, None)


def _model(conf: ModelConf) -> Iterator[str]:
    if conf.dtype not in DTYPES:
        yield f"model.dtype={conf.dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
    if conf.attention_backend not in BACKENDS:
        yield f"model.attention_backend={conf.attention_backend!r} is unknown; choose one of {', '.join(BACKENDS)}"
    if conf.attention_backend == "flash4" and (missing := flash4.missing()):
        yield f"model.attention_backend=flash4: {missing}"
    if conf.config is not None and "model_type" not in conf.config:
        yield f"model.config={conf.config} lacks model_type (llama, qwen2, ...), which says what the fields mean"
    if conf.config is not None and conf.gguf_file is not None:
        yield f"model.config asks for fresh weights, model.gguf_file={conf.gguf_file} for stored ones: give one of them"
    if len(set(conf.retrieval_layers)) < len(conf.retrieval_layers):
        yield f"model.retrieval_layers={list(conf.retrieval_layers)} names a layer twice: a layer has one rank"
    if conf.lora is not None and conf.lora.rank < 1:
        yield f"model.lora.rank={conf.lora.rank}: at least 1, or model.lora=null for full weights"


def _examples(where: str, conf: ExamplesConf) -> Iterator[str]:
    if conf.source not in SOURCES:
        yield f"{where}.source={conf.source!r} is unknown; choose one of {', '.join(sorted(SOURCES))}"
    else:
        source = SOURCES[conf.source]
        if source.read is not None and source.path is None and conf.path is None:
            yield f"{where}.source={conf.source} needs {where}.path: a hub name, a local folder or a file"
        yield from raised(where, lambda: source_args(conf))
    if conf.questions < 1:
        yield f"{where}.questions={conf.questions}: questions a context, at least 1"
    if conf.apart and conf.questions == 1:
        yield f"{where}.apart=true asks several questions over one context, but {where}.questions=1: raise it"
    if conf.limit is not None and conf.limit < 1:
        yield f"{where}.limit={conf.limit}: number of samples, at least 1, or null for all"
    if conf.prompt not in PROMPTS:
        yield f"{where}.prompt={conf.prompt!r} is unknown; choose one of {', '.join(PROMPTS)}"


def _data(conf: DataConf) -> Iterator[str]:
    if conf.length < 2:
        yield f"data.length={conf.length}: tokens a sample, at least 2"
    if not conf.parts:
        yield "data.parts is empty: a mixture needs at least one part (see conf/data)"
    for name, part in conf.parts.items():
        yield from _examples(f"data.parts.{name}", part)
        targets = part.args.get("targets") if part.source in SOURCES and SOURCES[part.source].prose else None
        if isinstance(targets, int) and targets >= conf.length:
            yield f"data.parts.{name}.args.targets={targets} must be below data.length={conf.length}"
        if part.weight < 0:
            yield f"data.parts.{name}.weight={part.weight}: a share of the mixture, not below 0"
        if part.apart:
            yield f"data.parts.{name}.apart=true is for tasks: a training sample holds all questions of its context"
        if part.limit is not None:
            yield (
                f"data.parts.{name}.limit={part.limit} bounds tasks alone: training reads recipe.steps x "
                "recipe.batch_size samples, every question once an epoch; leave it null"
            )
    if conf.parts and not sum(part.weight for part in conf.parts.values()) > 0:
        yield "data.parts: all weights are 0, so no part can be drawn"


def _recipe(conf: RecipeConf, attention: AttentionConf) -> Iterator[str]:
    for name, least in (
        ("steps", 1),
        ("warmup_steps", 0),
        ("weight_decay", 0),
        ("gradient_clip", 0),
        ("min_learning_rate", 0),
    ):
        if getattr(conf, name) < least:
            yield f"recipe.{name}={getattr(conf, name)}: at least {least}"
    yield from raised("", lambda: micro_batches(conf.batch_size, conf.micro_batch_size))
    if not conf.learning_rate > 0:
        yield f"recipe.learning_rate={conf.learning_rate}: above 0"
    elif conf.min_learning_rate > conf.learning_rate:
        yield (
            f"recipe.min_learning_rate={conf.min_learning_rate} is above recipe.learning_rate={conf.learning_rate}, "
            "but the cosine falls from the latter to the former"
        )
    if conf.warmup_steps > conf.steps:
        yield f"recipe.warmup_steps={conf.warmup_steps} exceeds recipe.steps={conf.steps}: the rate never peaks"
    if len(conf.betas) != 2 or not all(0 <= beta < 1 for beta in conf.betas):
        yield f"recipe.betas={conf.betas}: two numbers in [0, 1)"
    yield from _compressions("recipe.compressions", conf.compressions)
    if conf.compressions and attention.scorer == "dense":
        yield (
            f"recipe.compressions={conf.compressions} draws a compression a step, but attention.scorer=dense keeps "
            "everything: choose a sparse attention (attention=lag_relative), or recipe.compressions=[]"
        )
    yield from objective.problems_of(conf, attention)


def _compressions(where: str, factors: Sequence[float]) -> Iterator[str]:
    low = [factor for factor in factors if factor < 1]
    if low:
        yield f"{where}={list(factors)}: {low} is below 1; 4 means that a quarter is kept, 1 the full cache"


def _trainer(conf: TrainerConf) -> Iterator[str]:
    if conf.precision not in PRECISIONS:
        yield f"trainer.precision={conf.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
    if conf.accelerator not in ACCELERATORS:
        yield f"trainer.accelerator={conf.accelerator!r} is unknown; choose one of {', '.join(ACCELERATORS)}"
    cuda = torch.cuda.is_available()
    if conf.accelerator == "cuda" and not cuda:
        yield "trainer.accelerator=cuda, but torch sees no CUDA device: use trainer=cpu, or a CUDA build of torch"
    elif conf.accelerator == "gpu" and not cuda and not torch.backends.mps.is_available():
        yield "trainer.accelerator=gpu, but torch sees no GPU: use trainer=cpu, or install a CUDA build of torch"
    elif (
        conf.precision == "bf16-mixed"
        and conf.accelerator != "cpu"
        and cuda
        and not torch.cuda.is_bf16_supported(False)
    ):
        yield (
            f"trainer.precision=bf16-mixed, but {torch.cuda.get_device_name()} has no bfloat16 arithmetic: "
            "use trainer.precision=32-true"
        )
    yield from processes.problems_of(conf)
    for name in ("log_every", "checkpoint_every"):
        if getattr(conf, name) < 1:
            yield f"trainer.{name}={getattr(conf, name)}: optimiser steps, at least 1"


def _compiled(conf: TrainConf) -> Iterator[str]:
    """What `compiled_layers` would refuse once model and data are loaded."""
    both = conf.trainer.compile and conf.model.gradient_checkpointing
    if conf.recipe.train and both and checkpoints_outside():
        yield (
            f"trainer.compile=true with model.gradient_checkpointing=true: transformers {transformers.__version__} "
            "checkpoints activations around what is compiled; set trainer.compile=false, set "
            "model.gradient_checkpointing=false, or upgrade to transformers 5.23, which checkpoints inside"
        )


def _logger(conf: LoggerConf) -> Iterator[str]:
    if conf.mode not in WANDB_MODES:
        yield f"logger.mode={conf.mode!r} is unknown; choose one of {', '.join(WANDB_MODES)}"
    if conf.timeout <= 0:
        yield f"logger.timeout={conf.timeout}: seconds that the W&B server is waited for, above 0"


def _evaluation(conf: EvaluationConf, length: int | None) -> Iterator[str]:
    yield from _compressions("evaluation.compressions", conf.compressions)
    if len(set(conf.compressions)) != len(conf.compressions):
        yield f"evaluation.compressions={list(conf.compressions)} repeats a value"
    if conf.attention.scorer == "dense" and any(factor != 1 for factor in conf.compressions):
        yield (
            f"evaluation.attention.scorer=dense cannot compress, but evaluation.compressions="
            f"{list(conf.compressions)}: choose a sparse attention@evaluation.attention, or evaluation.compressions=[1]"
        )
    if conf.precision not in PRECISIONS:
        yield f"evaluation.precision={conf.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
    if conf.batch_size < 1:
        yield f"evaluation.batch_size={conf.batch_size}: samples a forward pass, at least 1"
    if conf.bootstrap < 100:
        yield f"evaluation.bootstrap={conf.bootstrap}: resamples, at least 100 (10,000 for two digits)"
    if conf.length is None and length is None:
        yield "evaluation.length is not set: tokens a prompt with its answer"
    for name, task in conf.tasks.items():
        yield from _examples(f"evaluation.tasks.{name}", task)
        if task.source in SOURCES and SOURCES[task.source].prose:
            yield f"evaluation.tasks.{name}.source={task.source} asks nothing: lrsa-eval mode=perplexity reads prose"


def _resumed(folder: str) -> Iterator[str]:
    """An evaluation goes on from the folder of a run that did not finish."""
    problems = raised(f"resume={folder}", lambda: Record.load(Path(folder).expanduser()))
    yield from problems
    if not problems and Record.load(Path(folder).expanduser()).status == "finished":
        yield f"resume={folder} is the folder of a finished run, with nothing left to do: leave resume out to run anew"


def _generate(conf: GenerateConf) -> Iterator[str]:
    for name in ("max_new_tokens", "block_size"):
        value = getattr(conf, name)
        if value is not None and value < 1:
            yield f"generate.{name}={value}: tokens, at least 1, or null"


def _peer(conf: GenerateConf, evaluation: EvaluationConf) -> Iterator[str]:
    if conf.peer_args is not None and not isinstance(conf.peer_args, dict):
        yield f"generate.peer_args={conf.peer_args!r}: a mapping, such as '{{window_size: 32}}'"
        return
    args = conf.peer_args or {}
    if conf.peer is None:
        if args:
            yield f"generate.peer_args={args} belong to generate.peer, which is not set"
        return
    yield from raised("generate.peer", lambda: build_press(str(conf.peer), 2, args))
    if evaluation.batch_size != 1:
        yield f"generate.peer reads one prompt at a time: evaluation.batch_size={evaluation.batch_size} must be 1"
    if conf.block_size is not None:
        yield f"generate.peer compresses after the whole prompt: generate.block_size={conf.block_size} must be null"


def _lm_eval(conf: LMEvalConf) -> Iterator[str]:
    if not conf.tasks:
        yield "lm_eval.tasks is empty: name tasks of lm-eval, e.g. 'lm_eval.tasks=[niah_single_1]' (`lm-eval ls tasks`)"
    if conf.include_path is not None and not Path(conf.include_path).is_dir():
        yield f"lm_eval.include_path={conf.include_path} is no folder: name one that holds task YAMLs"
    for name, least in (("limit", 1), ("max_length", 2), ("num_fewshot", 0)):
        value = getattr(conf, name)
        if value is not None and value < least:
            yield f"lm_eval.{name}={value}: at least {least}, or null"
    for name in ("gen_kwargs", "metadata"):
        value = getattr(conf, name)
        if value is not None and not isinstance(value, dict):
            yield f"lm_eval.{name}={value!r} is not a mapping; write lm_eval.{name}={{name: value}}"
    lengths = conf.metadata.get("max_seq_lengths") if isinstance(conf.metadata, dict) else None
    if conf.limit is not None and isinstance(lengths, list | tuple) and len(lengths) > 1:
        yield (
            f"lm_eval.limit={conf.limit} takes a task's first examples, which are all of the first of "
            f"lm_eval.metadata.max_seq_lengths={list(lengths)}: leave the limit out, or run a length at a time "
            "(lrsa-eval -m 'lm_eval.metadata={max_seq_lengths: [4096]},{max_seq_lengths: [8192]}')"
        )
