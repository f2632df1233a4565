"""A checkpoint, or a fresh config, with an attention -> a model that can be trained and scored.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrsa.attention import BACKENDS, SparseAttentionConfig, checkpoint_contexts
from lrsa.attention.compiled import prepare, whole_rows
from lrsa.attention.config import ONCE
from lrsa.attention.documents import find_documents
from lrsa.attention.huggingface import NAME, check_architecture, check_budget
from lrsa.cache import SparseKVCache
from lrsa.config import ModelConf

ASSETS = Path(__file__).resolve().parent / "assets"
STORED: Literal["stored"] = "stored"


def load_model(
    name_or_path: str | Path,
    attention: SparseAttentionConfig | Literal["stored"] | None = STORED,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    rope_scaling: dict[str, Any] | None = None,
    backend: str = "auto",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Load a causal language model and give it an attention.

    Args:
        name_or_path: hub id, local folder, or a model that ships with lrsa (`packaged_models`).
        attention: sparse attention; None for dense; by default what the checkpoint was saved with.
        gguf_file: weights inside the folder, dequantised to ``dtype``.
        config: fields of a transformers config, ``model_type`` among them: fresh random weights, nothing is loaded.
        dtype: of the weights.
        rope_scaling: merged into the config's RoPE parameters, e.g. ``{"rope_type": "yarn", "factor": 4.0}``.
        backend: of the sparse attention; see `lrsa.attention.sparse_attention`.
        gradient_checkpointing: recompute activations in the backward pass, the selection excepted.

    Raises:
        ValueError: an unknown backend, or a model whose layers sparse attention cannot replace.
        FileNotFoundError: no such model here and no hub; names the local alternative.
    """
    if config is not None:
        model_config = AutoConfig.for_model(**copy.deepcopy(config))
        _scale_rope(model_config, rope_scaling)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
    else:
        folder = _locate(name_or_path)
        with _HubErrors(name_or_path):
            if gguf_file is not None:
                model = _dequantised(_read_gguf(folder, gguf_file, revision, dtype), rope_scaling)
            else:
                model_config = AutoConfig.from_pretrained(folder, **_options(revision=revision))
                _scale_rope(model_config, rope_scaling)
                model = _from_pretrained(folder, config=model_config, dtype=dtype, revision=revision)
    if attention == STORED:
        stored = getattr(model.config, NAME, None)
        attention = None if stored is None else SparseAttentionConfig.from_dict(stored)
    set_attention(model, attention, backend=backend)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def load_tokenizer(
    name_or_path: str | Path, *, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; raises as `load_model` does. A missing pad token is filled by the EOS token."""
    with _HubErrors(name_or_path):
        read = AutoTokenizer.from_pretrained if gguf_file is None else _read_gguf_tokenizer
        tokenizer = read(_locate(name_or_path), **_options(gguf_file=gguf_file, revision=revision))
        if gguf_file is not None:
            tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_cache(model: nn.Module, max_tokens: int | None = None, prompt_length: int | None = None) -> Cache:
    """A cache for the model's attention: a `SparseKVCache`, or transformers' dynamic one for a dense model.

    ``max_tokens``: most tokens a row will hold; a sparse cache then never has to grow. ``prompt_length``: of schedule
    ``prefill_once``, where the prompt is fed in blocks; see `SparseKVCache`.
    """
    attention = get_attention(model)
    config = _base(model).config
    if attention is None:
        return DynamicCache(config=config)
    return SparseKVCache(attention, config, max_tokens, prompt_length)


def build_model(conf: ModelConf, attention: SparseAttentionConfig | None) -> PreTrainedModel:
    """`load_model` from the `model` config group. LoRA adapters are the training's affair."""
    return load_model(
        conf.name,
        attention,
        gguf_file=conf.gguf_file,
        revision=conf.revision,
        config=conf.config,
        dtype=getattr(torch, conf.dtype),
        rope_scaling=conf.rope_scaling,
        backend=conf.attention_backend,
        gradient_checkpointing=conf.gradient_checkpointing,
    )


def stored_attention(conf: ModelConf) -> dict[str, Any] | None:
    """What the checkpoint's config.json says that it attends with (`SparseAttentionConfig.to_dict`), None where it is
    dense or fresh; weights are not read. Raises as `load_model` does.
    """
    if conf.config is not None or conf.gguf_file is not None:
        return None
    with _HubErrors(conf.name):
        return getattr(AutoConfig.from_pretrained(_locate(conf.name), **_options(revision=conf.revision)), NAME, None)


def build_tokenizer(conf: ModelConf) -> PreTrainedTokenizerBase:
    """`load_tokenizer` from the `model` config group."""
    gguf_file = conf.gguf_file if conf.tokenizer is None else None
    return load_tokenizer(conf.tokenizer or conf.name, gguf_file=gguf_file, revision=conf.revision)


def packaged_models() -> list[str]:
    """Names of the models that ship with lrsa."""
    return sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").is_file()) if ASSETS.is_dir() else []


def set_attention(model: nn.Module, attention: SparseAttentionConfig | None, *, backend: str | None = None) -> None:
    """Change a live model's attention: sparse, or dense (None). Weights and training state stay.

    The parameters go to ``model.config.lrsa`` and are saved with the model; ``backend`` belongs to this process alone
    (None leaves it as it is).

    Raises:
        ValueError: an unknown backend, ``dense_layers`` outside the model, layers that are not plain full attention, a
            budget by layer on a model with other layers beside those.
    """
    base = _base(model)
    config = base.config
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if attention is None:
        if hasattr(config, NAME):
            delattr(config, NAME)
        wanted = "sdpa"
    else:
        attention.resolved(config.num_hidden_layers)
        _check_architecture(base)
        check_budget(attention, config)
        wanted = NAME
    if config._attn_implementation != wanted:
        base.set_attn_implementation(wanted)
        if config._attn_implementation != wanted:  # transformers only logs a warning, and the model stays dense
            raise ValueError(
                f"{type(base).__name__} cannot take another attention: its layers do not call transformers' attention "
                "interface. Choose an architecture that does, such as Llama, Qwen2, Qwen3, Mistral or Phi3"
            )
    if attention is not None:
        if getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None):
            raise ValueError(
                f"{type(base).__name__} slides a window of {config.sliding_window} tokens in every layer, sparse "
                "attention needs full ones: load it with sliding_window=None in its config"
            )
        setattr(config, NAME, attention.to_dict())
    prepare(base, attention, config.num_hidden_layers)
    if backend is not None:
        for module in base.modules():
            if hasattr(module, "layer_idx"):
                module.lrsa_backend = backend


def full_attention(model: nn.Module) -> SparseAttentionConfig | None:
    """Dense attention as a config, every layer dense: its full cache then has the storage and the kernels of compressed
    ones. None for a model that takes no other attention than its own.
    """
    base = _base(model)
    try:
        _check_architecture(base)
    except ValueError:
        return None
    return SparseAttentionConfig(dense_layers=tuple(range(base.config.num_hidden_layers)))


def _check_architecture(model: Any) -> None:
    """Raise ValueError where sparse attention would compute something else than the model's own."""
    config, name = model.config, type(model).__name__
    check_architecture(config)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    special = sorted(kinds - {"full_attention", "sliding_attention"})
    if special or "full_attention" not in kinds:
        raise ValueError(
            f"{name} has {', '.join(special) or 'sliding_attention'} layers{'' if special else ' alone'}: sparse "
            "attention replaces full ones, and leaves sliding-window ones beside them as they are"
        )


def get_attention(model: nn.Module) -> SparseAttentionConfig | None:
    """The model's sparse attention, None where it is dense."""
    base = _base(model)
    stored = getattr(base.config, NAME, None)
    return None if stored is None else SparseAttentionConfig.from_dict(stored)


def _base(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, and use again the selection of the forward pass."""
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def target_logits(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits that predict each target token, in one pass; the language-model head runs at those positions alone.

    Args:
        input_ids: ``[B, T]`` int64.
        answer_mask: bool ``[B, T]``, True at targets; a row's first token cannot be one. On the CPU it costs no wait
            for the device: how many targets there are is known without asking.
        document_ids: ``[B, T]`` int64, -1 at pads; None where no row is padded or packed.

    To an attention that asks, a row's prompt ends where its first answer begins, its only one under schedule
    ``prefill_once``; a row without one is all prompt.

    Returns:
        float32 logits ``[N, V]`` and int64 targets ``[N]``, N targets in row-major order.

    Raises:
        ValueError: a target at a row's first token, which nothing predicts; several answers in a row that is compressed
            once, at the end of its prompt.
    """
    answer_mask, device = answer_mask.cpu(), input_ids.device
    if answer_mask[:, 0].any():
        rows = answer_mask[:, 0].nonzero()[:, 0].tolist()
        raise ValueError(
            f"answer_mask: row {', '.join(map(str, rows))} has its first token as a target: nothing is before it"
        )
    if document_ids is not None:
        for document in find_documents(document_ids):
            if answer_mask[document.row, document.start]:
                raise ValueError(
                    f"answer_mask: row {document.row} has the first token of the document at {document.start} as a "
                    "target: what is before it belongs to another document"
                )
    attention = get_attention(model)
    arguments = _document_arguments(model, input_ids, document_ids)
    if attention is not None and attention.reads_prompt_lengths:
        if attention.schedule == ONCE:
            _refuse_several_answers(answer_mask)
        arguments["prompt_lengths"] = _prompt_lengths(answer_mask.to(device), document_ids)
    wanted = answer_mask[:, 1:].nonzero(as_tuple=True)
    # `read`: positions of which some row needs the prediction; `places`: where among them it is
    found = *wanted, *wanted[1].unique(return_inverse=True)
    rows, columns, read, places = (x.to(device, non_blocking=True) for x in found)
    outputs = model(input_ids=input_ids, logits_to_keep=read, use_cache=False, **arguments)
    return outputs.logits[rows, places].float(), input_ids[rows, columns + 1]


def _prompt_lengths(answer_mask: Tensor, document_ids: Tensor | None) -> Tensor:
    """Tokens before the first answer of each row, pads not counted: int64 ``[B]``."""
    before = answer_mask.cumsum(-1) == 0
    return (before if document_ids is None else before & (document_ids >= 0)).sum(-1)


def _refuse_several_answers(answer_mask: Tensor) -> None:
    begins = answer_mask & ~torch.nn.functional.pad(answer_mask, (1, -1))
    several = (begins.sum(-1) > 1).nonzero()[:, 0].tolist()
    if several:
        raise ValueError(
            f"answer_mask: row {', '.join(map(str, several))} has several answers, but schedule={ONCE!r} compresses at "
            "the end of the prompt, and such a row has no one end: give each question a row of its own (questions=1)"
        )


def _document_arguments(model: nn.Module, input_ids: Tensor, document_ids: Tensor | None) -> dict[str, Any]:
    if document_ids is None:
        sparse = get_attention(model) is not None
        return {"whole_rows": whole_rows(_base(model), input_ids.shape[1], input_ids.device)} if sparse else {}
    documents = find_documents(document_ids)
    single = len(documents) == len(document_ids) and all(d.start == 0 for d in documents)
    if get_attention(model) is not None:
        arguments = {"document_ids": document_ids}
    elif single:
        return {}  # pads on the right alone: a causal model never looks there
    else:
        arguments = {}
    # Each document, and each run of pads, starts its positions anew; dense attention splits the row there.
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    arguments["position_ids"] = steps - torch.where(starts, steps, 0).cummax(-1).values
    return arguments


def _scale_rope(config: Any, scaling: dict[str, Any] | None) -> None:
    if scaling:
        config.rope_parameters = {**(config.rope_parameters or {}), **scaling}


def _options(**given: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained`, less those that are None."""
    return {"trust_remote_code": False} | {name: value for name, value in given.items() if value is not None}


def _from_pretrained(folder: str, **given: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **_options(**given))


# Reading a GGUF file takes many times as long as safetensors, and the jobs of a multirun start from the same one.
@functools.lru_cache(maxsize=1)
def _read_gguf(folder: str, gguf_file: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    return _from_pretrained(folder, gguf_file=gguf_file, revision=revision, dtype=dtype)


@functools.lru_cache(maxsize=1)
def _read_gguf_tokenizer(folder: str, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, **options)


def _dequantised(model: PreTrainedModel, rope_scaling: dict[str, Any] | None) -> PreTrainedModel:
    """A copy of the model that does not call itself quantised: one that does can be neither trained nor saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _scale_rope(config, rope_scaling)
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _locate(name_or_path: str | Path) -> str:
    packaged = ASSETS / str(name_or_path)
    return str(packaged) if (packaged / "config.json").is_file() else str(name_or_path)


class _HubErrors:
    """Turns the hub's many ways to say "not there" into one message with the way out."""

    def __init__(self, name: str | Path) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            if Path(self.name).is_dir():
                raise FileNotFoundError(f"model folder {str(self.name)!r} cannot be loaded: {error}") from error
            raise FileNotFoundError(
                f"model {str(self.name)!r} is not a local folder, and the Hugging Face hub did not give it: {error}\n"
                f"Name a local folder with config.json and safetensors (or with gguf_file=...), "
                f"or a model that ships with lrsa: {', '.join(packaged_models()) or 'none'}."
            ) from error
