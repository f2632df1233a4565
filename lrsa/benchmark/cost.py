"""What a training run costs before it is run: arithmetic, memory a GPU, hours; from the model's shape and the config.

Counted are multiplications and additions of the matrices (the head apart, which runs at answer tokens alone) and of
attention by attended pairs, exact for both dense and sparse. A forward pass is 2 a weight and token and 4 Hq D a pair;
a backward pass twice that for weights that train, once for frozen ones, and 2.5 times for attention, whose scores are
computed again (FlashAttention-2, arXiv 2307.08691). Activation checkpointing adds a forward pass. Norms, RoPE and the
selection are not counted: what they take is in the utilisation, which is that of a measured run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa.attention import SparseAttentionConfig, from_conf
from lrsa.config import LoraConf, ModelConf, TrainConf, config_dir
from lrsa.results.record import Record
from lrsa.training.distillation import SELF

H100_FLOPS = 989.4e12  # bfloat16, dense, SXM: NVIDIA's data sheet
ADAM_BYTES = 16  # float32 weight, gradient and two moments of a parameter that trains
_BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True)
class Shape:
    """Of a model. `matrices`: weights that every token meets, embeddings and head apart; `adapters`: those of LoRA."""

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    parameters: int
    matrices: int
    largest_layer: int
    adapters: int = 0


@dataclass(frozen=True)
class Cost:
    """Of a whole run. `flops`: multiplications and additions, recomputation included; `memory`: bytes a GPU by part."""

    flops: float
    tokens: int
    devices: int
    memory: Mapping[str, float]
    shape: Shape
    length: int
    sparse: bool
    compiled: bool = False

    def hours(self, utilisation: float, peak: float = H100_FLOPS) -> float:
        """On `devices` GPUs of `peak` operations a second."""
        return self.flops / (self.devices * peak * utilisation) / 3600


def shape_of(conf: ModelConf) -> Shape:
    """From the model's config: `config` itself, the model option `shape`'s, or the checkpoint's, here or on the hub.

    Raises ValueError where none can be had.
    """
    fields = conf.config
    if fields is None and conf.shape is not None:
        file = config_dir() / "model" / f"{conf.shape}.yaml"
        if not file.is_file():
            raise ValueError(f"model.shape={conf.shape}: there is no {file}; name a model option that has a `config`")
        fields = OmegaConf.to_container(OmegaConf.load(file).config)  # type: ignore[assignment]
    try:
        config = (
            AutoConfig.for_model(**fields) if fields else AutoConfig.from_pretrained(conf.name, revision=conf.revision)
        )
    except OSError as error:
        raise ValueError(
            f"model.name={conf.name}: its config is neither here nor on a hub that answers; set model.shape to a model "
            "option of the same shape (conf/model/*_random.yaml)"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return _measured_shape(model, config, conf.lora)


def _measured_shape(model: nn.Module, config: Any, lora: LoraConf | None) -> Shape:
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    layers = [part for name, part in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    adapted = [part for name, part in linear.items() if lora and name.rpartition(".")[2] in lora.target_modules]
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrices=sum(part.weight.numel() for name, part in linear.items() if "layers" in name),
        largest_layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        adapters=sum(lora.rank * (part.in_features + part.out_features) for part in adapted) if lora else 0,
    )


def forward_flops(shape: Shape, tokens: int, attention: SparseAttentionConfig | None) -> tuple[float, float]:
    """Of one sequence: of the matrices, and of attention."""
    layers = [None if attention is None else attention.for_layer(i, shape.layers) for i in range(shape.layers)]
    pairs = sum(tokens * (tokens + 1) // 2 if one is None else one.geometry.pairs(tokens) for one in layers)
    return 2.0 * shape.matrices * tokens, 4.0 * shape.query_heads * shape.head_dim * pairs


def training_flops(shape: Shape, tokens: int, attention: SparseAttentionConfig | None, checkpointing: bool) -> float:
    """Of one sequence, forward and backward; full weights where the shape has no adapters."""
    matrices, scores = forward_flops(shape, tokens, attention)
    adapters = 2.0 * shape.adapters * tokens
    again = matrices + adapters + scores if checkpointing else 0.0
    of_weights = 2 * adapters if shape.adapters else matrices
    return (matrices + adapters + scores) + again + (matrices + of_weights) + _BACKWARD_ATTENTION * scores


def predict(conf: TrainConf) -> Cost:
    """The cost of `lrsa-train` with this config, its evaluation apart.

    Raises ValueError as `shape_of` does, and for a batch that the devices cannot share.
    """
    shape, recipe, devices = shape_of(conf.model), conf.recipe, conf.trainer.devices
    micro = recipe.micro_batch_size or recipe.batch_size
    if recipe.batch_size % (micro * devices):
        raise ValueError(
            f"recipe.batch_size={recipe.batch_size} is not a multiple of recipe.micro_batch_size={micro} x "
            f"trainer.devices={devices}"
        )
    samples = recipe.steps * recipe.batch_size
    attention = from_conf(conf.attention)
    drawn = [attention] if attention is None or not recipe.compressions else [
        None if factor == 1 else attention.with_compression(factor) for factor in recipe.compressions
    ]  # fmt: skip
    checkpointing = conf.model.gradient_checkpointing
    flops = [training_flops(shape, conf.data.length, one, checkpointing) for one in drawn]
    taught, teacher = recipe.distillation, sum(forward_flops(shape, conf.data.length, None))
    if taught.weight > 0 or taught.hidden > 0:  # a frozen teacher is taken to be of the student's size
        flops = [
            of_student + (teacher if one is not None or taught.teacher != SELF else 0.0)
            for of_student, one in zip(flops, drawn, strict=True)
        ]
    memory = _memory(shape, conf, micro, devices if conf.trainer.strategy == "fsdp" else 1)
    mean, length = sum(flops) / len(flops), conf.data.length
    return Cost(
        samples * mean, samples * length, devices, memory, shape, length, attention is not None, conf.trainer.compile
    )


def _memory(shape: Shape, conf: TrainConf, micro: int, shards: int) -> dict[str, float]:
    """Bytes a GPU. Frozen weights in the model's own type; what trains with its optimiser in float32."""
    width = torch.finfo(getattr(torch, conf.model.dtype)).bits // 8
    tokens = micro * conf.data.length
    # What a layer keeps for its backward pass with flash attention: inputs of norms and matrices, queries, keys,
    # values, and the MLP's products; bfloat16 under autocast.
    heads = (2 * shape.query_heads + 2 * shape.key_value_heads) * shape.head_dim
    kept = tokens * 2 * (6 * shape.hidden + heads + 4 * shape.intermediate)
    inputs = tokens * 2 * shape.hidden
    trained = shape.adapters or shape.parameters
    frozen = shape.parameters if shape.adapters else 0
    parts: dict[str, float] = {
        "frozen weights": frozen * width / shards,
        "trained weights, gradients, AdamW": trained * ADAM_BYTES / shards,
        "activations": shape.layers * inputs + kept if conf.model.gradient_checkpointing else shape.layers * kept,
    }
    if conf.recipe.distillation.teacher != SELF:
        parts["teacher"] = shape.parameters * width  # as large as the student, and whole on each GPU
    if shards > 1:
        # embeddings and head throughout, a layer, and the next one on its way
        outside = shape.parameters - shape.layers * shape.largest_layer
        parts["gathered weights"] = (outside + 2 * shape.largest_layer) * width
    return parts


@dataclass(frozen=True)
class Utilisation:
    """Share of the peak that a measured run reached, by the same count as `predict`'s: of a whole training step or of a
    forward pass, dense or sparse, of a model of so many `parameters` at so many `tokens`; its layers `compiled` or not.
    """

    share: float
    step: bool
    sparse: bool
    parameters: int
    tokens: int
    what: str
    compiled: bool = False


def measured_utilisations(record: Record, peak: float = H100_FLOPS) -> list[Utilisation]:
    """Of an H100 record of `lrsa-bench mode=step` (whole steps) or `mode=generate` (prefill: forward passes); none of
    others.
    """
    config = record.config
    mode = config.get("mode") if record.command == "lrsa-bench" else None
    if "H100" not in str(record.hardware.get("device")) or mode not in ("step", "generate"):
        return []
    shape, found = shape_of(_model_conf(config["model"])), []
    for row in record.metrics["rows"]:
        for kind in ("dense", "sparse") if mode == "step" else (str(row["engine"]).split()[0],):
            if (mode == "generate" and "prefill" not in row) or kind not in ("dense", "sparse", "lrsa"):
                continue
            attention = None if kind == "dense" else _attention(config, row)
            if mode == "step":
                flops = config["batch_size"] * training_flops(shape, row["length"], attention, False)
                times, what = row["step"][kind], "training step"
            else:
                flops = sum(forward_flops(shape, row["length"], attention))
                times, what = row["prefill"]["ms"], "forward pass"
            share = flops / (times["median"] / 1e3) / peak
            compiled = bool(config.get("compile"))  # records until 2026-11-22 do not say
            how = f"{kind}, compiled" if compiled else kind
            what = f"{what} of {config['model']['name']}, {how}, {row['length']:,} tokens ({record.folder.name})"
            size = shape.parameters, row["length"]
            found.append(Utilisation(share, mode == "step", attention is not None, *size, what, compiled))
    return found


def most_alike(found: Sequence[Utilisation], cost: Cost) -> list[Utilisation]:
    """Of steps and of forward passes the one most like the run: dense or sparse as it is, a step's layers compiled or
    not as they are, then nearest in size."""
    chosen = []
    for step in (True, False):
        fitting = [one for one in found if one.step == step and one.sparse == cost.sparse]
        fitting = [one for one in fitting if not step or one.compiled == cost.compiled]
        if fitting:
            chosen.append(min(fitting, key=lambda one: _distance(one, cost)))
    return chosen


def _distance(one: Utilisation, cost: Cost) -> tuple[float, float]:
    return abs(math.log(one.parameters / cost.shape.parameters)), abs(math.log(one.tokens / cost.length))


def _model_conf(values: Mapping[str, Any]) -> ModelConf:
    return ModelConf(name=values["name"], config=values["config"])


def _attention(config: Mapping[str, Any], row: Mapping[str, Any]) -> SparseAttentionConfig:
    sink = config["sink_size"]
    return SparseAttentionConfig(sink_size=sink, lag_size=row["lag"], keep_ratio=1 / row["compression"])
