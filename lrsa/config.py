"""Structured configs of the commands: what a YAML under `conf/` may say, and the checks across fields.

One dataclass a group. Hydra rejects unknown keys and wrong types; `check_*` rejects combinations that make no sense,
before a model or a data set is touched. Compression is written as a factor, `4` for "4x": keep ratio 1/4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class AttentionConf:
    """`attention` group: fields of `lrsa.attention.SparseAttentionConfig`, or `scorer: dense` for full attention."""

    scorer: str = "lag_relative"
    scorer_args: dict[str, Any] = field(default_factory=dict)
    sink_size: int = 16
    lag_size: int = 128
    keep_ratio: float | None = None
    top_k: int | None = None
    chunk_size: int | None = None
    dense_layers: list[int] = field(default_factory=list)
    budget: str = "uniform"
    schedule: str = "chunked"
    equal_bytes_at: int | None = None


@dataclass
class LoraConf:
    """`model.lora`: low-rank adapters instead of full weights (peft)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class ModelConf:
    """`model` group: a hub id, a local folder, a model that ships with lrsa, or a fresh model from `config`."""

    name: str = MISSING
    gguf_file: str | None = None  # weights inside the folder `name`, dequantised to `dtype`
    revision: str | None = None
    config: dict[str, Any] | None = None  # fresh random weights: transformers config fields, `model_type` among them
    shape: str | None = None  # a model option whose `config` is of this shape, for lrsa-cost where no hub answers
    tokenizer: str | None = None  # default: `name`
    dtype: str = "float32"  # of the weights; training on GPU autocasts to bfloat16 (trainer.precision)
    rope_scaling: dict[str, Any] | None = None  # e.g. {rope_type: yarn, factor: 4.0}
    gradient_checkpointing: bool = False
    attention_backend: str = "auto"  # reference, gather, flex, flash4, auto
    # layers that need the full cache, the neediest first, as `lrsa-eval mode=layers` ranks them (recipe=lrsa)
    retrieval_layers: list[int] = field(default_factory=list)
    # the model that they were ranked on, by fields of its transformers config: another one does not take them over
    ranked_on: dict[str, Any] | None = None
    lora: LoraConf | None = None


@dataclass
class ExamplesConf:
    """`data.parts.<name>` and `evaluation.tasks.<name>`: where examples come from and how a prompt is put together."""

    source: str = MISSING  # of lrsa.data.sources.SOURCES
    path: str | None = None  # hub name, local folder or file; synthetic sources have none
    split: str = "train"  # train[fit], train[dev]: two sides of it that share no article
    weight: float = 1.0  # share of the training mixture
    questions: int = 1  # per context, one after another in a sample
    apart: bool = False  # of a task: each of a context's questions is a sample of its own, over the same context
    limit: int | None = None  # samples of a task (training: recipe.steps); None: every question once
    seed: int = 0
    # prose: folder of *.txt(.gz), or hub id:config, @train without the books that are held out (lrsa.data.books);
    # repeat: RULER's line of noise; None: the built-in sentences
    filler: str | None = None
    prompt: str = "chat"  # chat (the tokenizer's template) or plain
    args: dict[str, Any] = field(default_factory=dict)  # of the source


@dataclass
class DataConf:
    """`data` group: the training mixture."""

    length: int = 4096  # tokens a sample, T
    parts: dict[str, ExamplesConf] = field(default_factory=dict)
    cache_dir: str | None = None  # default: $LRSA_CACHE or ~/.cache/lrsa
    workers: int = 0


@dataclass
class DistillationConf:
    """`recipe.distillation`: what a teacher with full attention adds to the loss, (1 - weight) CE + weight KL + hidden
    MSE, each a mean over the step's target tokens. Off with both weights 0; a pass forward more a step otherwise."""

    weight: float = 0.0  # 0 to 1, of KL(teacher || student), nats a target token; cross-entropy has the rest
    temperature: float = 1.0  # T of both distributions; the KL is multiplied by T^2
    # self: the step's own weights with dense attention (steps that are dense are plain cross-entropy); or a frozen
    # model of the same vocabulary with dense attention: a run's model/ folder, a hub id
    teacher: str = "self"
    # of the squared error of the last hidden state, what the head reads, relative to the teacher's squared length
    hidden: float = 0.0


@dataclass
class RecipeConf:
    """`recipe` group: optimisation, the compressions a step is drawn from, and the training objective."""

    name: str = "lrsa"
    train: bool = True  # false: score the model as it is, a table's row of what was not post-trained
    steps: int = 300
    batch_size: int = 8  # samples an optimiser step
    micro_batch_size: int | None = None  # samples a forward pass; None: batch_size (no accumulation)
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0  # at the end of the cosine
    warmup_steps: int = 20
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    gradient_clip: float = 1.0
    compressions: list[float] = field(default_factory=list)  # one is drawn a step; []: the attention's own ratio
    schedule: str = "drawn"  # annealed: the compressions in their order, an equal share of the steps each
    # Gumbel noise of this scale on the logarithm of a rule's scores (standardised, where they are no amounts: key norm,
    # KeyDiff, positions) before the top K, fresh each micro-batch, in training alone. 1: kept in proportion to the
    # score. LagKV's scores are nearly flat: 0.01 moves a quarter of what it keeps, 0.2 is almost random
    score_noise: float = 0.0
    random_share: float = 0.0  # of the steps, drawn by seed and step: tokens are kept at random instead of by the rule
    straight_through: bool = False  # kept tokens' scores get a gradient, through their values; the output is the same
    distillation: DistillationConf = field(default_factory=DistillationConf)


@dataclass
class TrainerConf:
    """`trainer` group: Lightning's Trainer."""

    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    log_every: int = 10
    checkpoint_every: int = 100  # optimiser steps
    save_model: bool = True  # write <run>/model as safetensors at the end
    compile: bool = False  # decoder layers as fused kernels while they train; a resumed run may change it
    progress: bool = True


@dataclass
class LoggerConf:
    """`logger` group: W&B. The local record is always written."""

    wandb: bool = True
    mode: str = "offline"
    project: str = "lrsa"
    entity: str | None = None
    group: str | None = None  # default: the sweep's folder name
    tags: list[str] = field(default_factory=list)
    timeout: float = (
        60.0  # seconds that a server may take to answer at the start, and to receive what is left at the end
    )


@dataclass
class EvaluationConf:
    """`evaluation`: tasks x compressions, with the attention that is applied at inference (not the training one)."""

    tasks: dict[str, ExamplesConf] = field(default_factory=dict)
    attention: AttentionConf = field(default_factory=AttentionConf)
    compressions: list[float] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # 1: full cache
    floor: bool = True  # also score without the context
    ceiling: bool = False  # also score with the gold documents alone, full cache
    length: int | None = None  # default: data.length
    batch_size: int = 8
    precision: str = "32-true"  # or bf16-mixed
    bootstrap: int = 10_000


@dataclass
class GenerateConf:
    """`generate`, of `lrsa-eval mode=generate`: greedy answers to the prompts of `evaluation`."""

    max_new_tokens: int | None = None  # None: what the task's longest reference takes, and 16 more
    block_size: int | None = None  # tokens of a prompt read at once, to bound memory; None: all
    share_context: bool = True  # read a context that several questions have in common once; peers read each prompt
    peer: str | None = None  # kvpress/<Press>, which then compresses instead of `evaluation.attention`
    peer_args: Any = None  # mapping, of the press, its compression_ratio excepted; Any as TableConf.names


@dataclass
class LMEvalConf:
    """`lm_eval`, of `lrsa-eval mode=lm_eval`: lm-eval's tasks under `evaluation`'s attention and compressions."""

    tasks: list[str] = field(default_factory=list)  # names of lm-eval's, or of `include_path`
    include_path: str | None = None  # folder of one's own task YAMLs
    apply_chat_template: bool = False
    system_instruction: str | None = None
    num_fewshot: int | None = None  # None: the task's own
    fewshot_as_multiturn: bool = False
    limit: int | None = None  # first examples of a task; for trying things out
    max_length: int | None = None  # tokens of prompt and answer, longer ones lose their beginning; None: the model's
    gen_kwargs: Any = None  # mapping, over the task's own generation_kwargs; Any as TableConf.names
    metadata: Any = None  # mapping, for tasks that ask for one: {max_seq_lengths: [4096]} for RULER
    fewshot_seed: int = 1234  # lm-eval's default; all other seeds are run.seed


@dataclass
class PerplexityConf:
    """`perplexity`, of `lrsa-eval mode=perplexity`: prose in windows of `evaluation.length` tokens, one pass each."""

    # folder of *.txt(.gz), a file, or hub id:config; @validation: the books alone that training leaves out
    text: str = "Salesforce/wikitext:wikitext-2-raw-v1"
    windows: int = 100  # at most, spread evenly over the text; they do not overlap
    buckets: int = 8  # equal stretches of a window, each with a row of its own


@dataclass
class SelectionConf:
    """`selection`, of `lrsa-eval mode=selection`: what is kept of `evaluation`'s prompts, and what that does."""

    against: str | None = None  # another model of the same shape: a run's `model` folder, a hub id, or a .gguf file
    name: str = "against"  # as tables and figures call it; the model itself is `run.arm`
    scorers: list[str] = field(default_factory=lambda: ["oracle", "snapkv", "random"])  # compared on the same inputs
    scorer_samples: int = 64  # first samples of a task that these rank too: the oracle takes O(T^2)
    figure: bool = True


@dataclass
class LayersConf:
    """`layers`, of `lrsa-eval mode=layers`: which layers need the full cache, under `evaluation.attention` as it is
    set. Compressions, floor and ceiling of `evaluation` are not read."""

    count: int = 8  # layers to rank, besides evaluation.attention.dense_layers, which are dense from the start


@dataclass
class RunConf:
    """What every command knows about its run."""

    name: str = "run"
    study: str = "scratch"  # experiments/<study>
    arm: str = ""  # the row this run fills in a table; default: recipe name
    seed: int = 0
    threads: int | None = None  # torch.set_num_threads
    output_dir: str = MISSING  # Hydra's run folder


@dataclass
class TrainConf:
    """`lrsa-train`: post-train, then evaluate the grid."""

    run: RunConf = field(default_factory=RunConf)
    model: ModelConf = field(default_factory=ModelConf)
    attention: AttentionConf = field(default_factory=AttentionConf)
    data: DataConf = field(default_factory=DataConf)
    recipe: RecipeConf = field(default_factory=RecipeConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    logger: LoggerConf = field(default_factory=LoggerConf)
    evaluation: EvaluationConf = field(default_factory=EvaluationConf)
    resume: str | None = None  # a run folder, trained and evaluated as far as it came; or a checkpoint: training alone
    dry_run: bool = False  # list the jobs (of a sweep, with -m) and what they will take; run none


@dataclass
class EvalConf:
    """`lrsa-eval`: evaluate a checkpoint over the grid."""

    # references in one pass; generate: answers; lm_eval: lm-eval's tasks; perplexity: of prose; selection: what is
    # kept; layers: which of them need the full cache
    mode: str = "score"
    run: RunConf = field(default_factory=RunConf)
    model: ModelConf = field(default_factory=ModelConf)
    logger: LoggerConf = field(default_factory=LoggerConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    evaluation: EvaluationConf = field(default_factory=EvaluationConf)
    generate: GenerateConf = field(default_factory=GenerateConf)
    lm_eval: LMEvalConf = field(default_factory=LMEvalConf)
    perplexity: PerplexityConf = field(default_factory=PerplexityConf)
    selection: SelectionConf = field(default_factory=SelectionConf)
    layers: LayersConf = field(default_factory=LayersConf)
    resume: str | None = None  # folder of a run that was killed or failed; what it finished is not computed again
    dry_run: bool = False  # as of lrsa-train


@dataclass
class TableConf:
    """`lrsa-table`, and `experiments/<study>/table.yaml`: records -> tables and figures."""

    experiment: str | None = None  # a study with a table.yaml, or all; what is given beside it wins
    records: list[str] = field(default_factory=list)  # folders to search; []: the experiment's own
    study: str | None = None  # only records of this study
    where: str | None = None  # only such cells: attention.lag_size == 128 and seed < 3
    output: str | None = None  # folder; default: tables, of an experiment as its table.yaml says its own folder
    stem: str = "table"  # name of the files
    title: str = "Post-training x inference compression"
    rows: list[str] = field(default_factory=lambda: ["arm"])  # keys of record, config or cell whose values make a row
    columns: list[str] = field(default_factory=lambda: ["compression"])  # likewise a column
    rows_title: str | None = None  # above the rows' names; null: "post-trained with", or the keys of rows
    arms: list[str] = field(default_factory=list)  # rows in this order, as they are called; []: all, by name
    seeds: Any = None  # that the arms are to have, [0, 1, 2] or {arm: [0]}: one that no record gives is named
    reference: Any = None  # row that differences are to, {arm: its own}, or full: its full cache; default: the first
    tasks: list[str] = field(default_factory=list)
    compressions: list[float] = field(default_factory=list)  # 1 for the full cache; []: all, and the floor
    names: Any = None  # {arm or task: as displayed}; Any, for Hydra refuses new keys of a typed mapping without a `+`
    metric: str = "exact"  # or nll, perplexity (its exponential); exact_match, f1, rouge_l, string_match of answers
    retention: str | None = None  # own, reference: of the metric, the share of whose full score; null: the score itself
    benchmark: bool = False  # the tables of lrsa-bench's records instead: speed and memory
    formats: list[str] = field(default_factory=lambda: ["markdown", "latex", "csv"])
    figure: bool = True
    figures: Any = (
        None  # names of lrsa.results.figures.FIGURES, or {name: its options}; None: all that the records have
    )
    bootstrap: int = 10_000
    draws: str | None = None  # each: own ones for an interval; shared: for the whole table; null: shared with a store
    store: str | None = None  # folder of Parquet files that gather the records and answer for those that did not change


@dataclass
class ReportConf:
    """`lrsa-report`: records -> one HTML page."""

    study: str | None = None  # only its records; also where `records` default to
    records: list[str] = field(default_factory=list)  # folders to search; []: experiments/<study>/records
    output: str = "report.html"
    title: str | None = None  # default: the study's name
    arms: list[str] = field(default_factory=list)  # this and what follows as TableConf
    reference: Any = None
    tasks: list[str] = field(default_factory=list)
    compressions: list[float] = field(default_factory=list)
    names: Any = None
    metrics: list[str] = field(default_factory=list)  # []: all scores that were measured, or else nll
    bootstrap: int = 10_000


@dataclass
class BenchConf:
    """`lrsa-bench`: speed and memory against dense attention."""

    run: RunConf = field(default_factory=RunConf)
    mode: str = "kernels"  # or step: a whole training step; generate: prefill and graphed decoding
    device: str = "auto"  # cpu, cuda
    dtype: str = "float32"
    lengths: list[int] = field(default_factory=lambda: [8192])  # of the prompt in mode=generate
    lags: list[int] = field(default_factory=lambda: [128, 1024])
    compressions: list[float] = field(default_factory=lambda: [4])
    sink_size: int = 16
    scorers: list[str] = field(default_factory=lambda: ["lag_relative"])
    backends: list[str] = field(default_factory=lambda: ["gather"])  # mode=generate: [0] makes the gate's one pass
    batch_size: int = 1
    query_heads: int = 9
    key_value_heads: int = 3
    head_dim: int = 64
    rounds: int = 5
    graphs: bool = False  # mode=kernels: replay CUDA graphs, so that no time is Python's; what a short length is worth
    compile: bool = False  # of mode=step: decoder layers as trainer.compile=true trains them
    # of mode=kernels: nsa, moba of flash-linear-attention, at as many pairs as each case has, or as nsa/16x64 says
    peers: list[str] = field(default_factory=list)
    # of mode=generate: dense, lrsa (at each of `compressions`), kvpress/<Press> (likewise)
    engines: list[str] = field(default_factory=lambda: ["dense", "lrsa"])
    decode_steps: int = 256  # of mode=generate, at least; whole chunks are timed
    batches: list[int] = field(default_factory=list)  # of mode=generate, besides 1 and the largest that fits
    largest_batch: bool = True  # also measure it; CUDA alone
    records: list[str] = field(default_factory=list)  # folders of earlier records: show these, measure nothing
    table: str | None = None  # also write the tables to this Markdown file
    figure: str | None = None  # of mode=kernels: also draw them, to this path with .pdf and .png after it
    model: ModelConf = field(default_factory=ModelConf)  # of mode=step, generate; its dtype is generate's
    logger: LoggerConf = field(default_factory=LoggerConf)


def config_dir() -> Path:
    """The folder of the YAML files: `conf/` beside the package in a checkout, inside the package in a wheel.

    Raises:
        FileNotFoundError: neither is there; the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    places = f"{package / 'conf'} nor {package.parent / 'conf'}"
    raise FileNotFoundError(f"lrsa's configs are neither in {places}: reinstall lrsa")


def register_configs() -> None:
    """Tell Hydra the schemas; each `conf/<group>/*.yaml` merges into its group's schema."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConf)
    store.store(name="eval_schema", node=EvalConf)
    store.store(name="table_schema", node=TableConf)
    store.store(name="report_schema", node=ReportConf)
    store.store(name="bench_schema", node=BenchConf)
