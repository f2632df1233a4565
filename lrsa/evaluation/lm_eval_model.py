"""lm-eval's model `lrsa`: any of its tasks under any compression.

    import lm_eval, lrsa.evaluation.lm_eval_model  # the import registers it

    lm_eval.simple_evaluate("lrsa", {"pretrained": "models/SmolLM2", "compression": 4, "lag_size": 128}, tasks=[...])
    lm_eval.simple_evaluate(LRSALM(model, tokenizer=tokenizer, batch_size=8), tasks=[...])

lm-eval finds models by imports alone (it looks for no entry points, up to 0.4.13), so its command goes through here:
`python -m lrsa.evaluation.lm_eval_model run --model lrsa --model_args pretrained=recall-tiny,compression=4 --tasks ...`
`lrsa-eval mode=lm_eval` does the same for a grid of compressions and keeps a record.

Generation runs through `SparseKVCache`, likelihoods through the parallel form. What lm-eval does without a word:
prompts longer than `max_length` less the room for an answer lose their beginning (here counted, see `protocol`);
`--limit` takes a task's first examples, of several RULER lengths the first; `simple_evaluate` sets seeds, `evaluate`
and a model do not; stop strings are cut off afterwards, a batch runs on to its slowest row; and what the model's
`generation_config` says (sampling, penalties) holds where a task does not set it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.config import ONCE
from lrsa.evaluation.errors import EvaluationInputError, TruncationWarning
from lrsa.evaluation.lm_eval_args import choose_attention, choose_dtype
from lrsa.evaluation.measured import MeasuredCache, count_cache
from lrsa.models import get_attention, load_model, load_tokenizer, make_cache, set_attention

_OWN = (
    "pretrained",
    "tokenizer",
    "gguf_file",
    "revision",
    "dtype",
    "backend",
    "rope_scaling",
    "attention",
    "device",
    "batch_size",
)
_ATTENTION = tuple(item.name for item in fields(SparseAttentionConfig))
# What is handed on to HFLM as it is.
_HFLM = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
)


@register_model("lrsa")
class LRSALM(HFLM):
    """A causal language model with sparse or dense attention.

    Args:
        pretrained: as `lrsa.models.load_model` takes it, or a model, which then keeps its attention.
        tokenizer: name, folder or tokenizer; by default beside the model.
        gguf_file, revision, dtype, backend, rope_scaling: of `load_model`; dtype float32, bfloat16 or float16.
        attention: `stored`, what the checkpoint was saved with, or `dense`.
        device: cuda where there is one, else cpu; of a model that is passed, its own.
        batch_size: as lm-eval's, `auto` included.
        options: fields of `SparseAttentionConfig` (scorer, keep_ratio, top_k, sink_size, lag_size, chunk_size, ...)
            over the stored ones, or over the defaults where none are stored; `compression` for keep_ratio = 1 /
            compression (1: dense); `dense_layers` as numbers with a colon between in an argument string; and HFLM's
            max_length, max_batch_size, add_bos_token, prefix_token_id, chat_template_args, enable_thinking,
            think_end_token, logits_cache, softmax_dtype, mixed_precision_dtype.

    Raises:
        EvaluationInputError: an unknown option, dtype or attention, or options that contradict each other.
        Others: as `load_model` and `SparseAttentionConfig`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        backend: str = "auto",
        rope_scaling: dict[str, Any] | None = None,
        attention: str = "stored",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in (*_ATTENTION, "compression", *_HFLM)]
        if unknown:
            valid = ", ".join((*_OWN, "compression", *_ATTENTION, *_HFLM))
            raise EvaluationInputError(f"model lrsa has no arguments {unknown}; valid: {valid}")
        wanted = {name: options.pop(name) for name in (*_ATTENTION, "compression") if options.get(name) is not None}
        options = {name: value for name, value in options.items() if name in _HFLM}
        if isinstance(pretrained, str):
            name = pretrained
            model = load_model(
                name,
                gguf_file=gguf_file,
                revision=revision,
                dtype=choose_dtype(dtype),
                rope_scaling=rope_scaling,
                backend=backend,
            )
            set_attention(model, choose_attention(get_attention(model), attention, **wanted))
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            model, name = pretrained, pretrained.name_or_path
            if wanted or attention != "stored":
                said = ", ".join([*([f"attention={attention}"] if attention != "stored" else []), *wanted])
                raise EvaluationInputError(
                    f"a model that is passed keeps its attention, but {said} was given: use set_attention"
                )
        attending = get_attention(model)
        if attending is not None and attending.schedule == ONCE:
            raise EvaluationInputError(
                f"schedule={ONCE!r} does not work here: lm-eval's likelihood requests do not say where a prompt ends; "
                "take schedule='chunked'"
            )
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or name, gguf_file=None if tokenizer else gguf_file, revision=revision)
        with _quiet():  # its warnings are about arguments that `load_model` has used already
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **options)
        self.revision = revision
        self.show_progress = True
        self.measured = MeasuredCache()
        self._requests = 0
        self._lost: list[int] = []  # tokens that each truncated prompt lost
        self._stops: set[str] = set()
        self._decoding: list[dict[str, Any]] = []
        self._templated = False

    # ---- what lm-eval calls

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        with self._counting(len(requests)):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not self.show_progress)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._counting(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.show_progress)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._templated = True
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """For `results["config"]`, `protocol` under `lrsa`. The hub is not asked."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "model_revision": self.revision,
            "model_sha": getattr(self.config, "_commit_hash", None) or "",
            "lrsa": self.protocol(),
        }

    def protocol(self) -> dict[str, Any]:
        """How the answers so far were made. The cache is measured after prompt and answer, over generated answers."""
        attention = get_attention(self.model)
        template = self.tokenizer.chat_template or ""
        return {
            "attention": "dense" if attention is None else attention.to_dict(),
            "cache": self.measured.facts(),
            "chat_template": {
                "applied": self._templated,
                "sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
                "args": dict(self.chat_template_args),
            },
            "decoding": list(self._decoding),
            "generation_config": self.model.generation_config.to_diff_dict(),
            "stop_strings": sorted(self._stops),
            "max_length": self.max_length,
            "truncation": {
                "side": "left",
                "requests": self._requests,
                "truncated": len(self._lost),
                "tokens_lost": sum(self._lost),
                "most_lost": max(self._lost, default=0),
            },
        }

    # ---- what HFLM calls

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        if left_truncate_len:
            self._lost += [lost for lost in (mask.sum(-1) - left_truncate_len).tolist() if lost > 0]
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        room = self.max_length + 1  # the last token is predicted, not read
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        self._lost += [length - room for length in lengths if length > room]
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        # Without a cache: the parallel form. Pads are on the right, where no query of a token looks.
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        self._stops.update(stop)
        mask = generation_kwargs.get("attention_mask")
        said = {name: value for name, value in generation_kwargs.items() if name != "attention_mask"}
        said["max_new_tokens"] = max_length - context.shape[1]
        if said not in self._decoding:
            self._decoding.append(said)
        cache = make_cache(self.model, max_tokens=max_length)
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        pads = [0] * len(context) if mask is None else (mask == 0).sum(-1).tolist()
        held = int(cache.get_seq_length())
        if len(context) == _rows(cache):  # beams hold several rows a prompt
            self.measured.add(count_cache(cache, [held - pad for pad in pads]))
        return out

    @contextlib.contextmanager
    def _counting(self, requests: int) -> Iterator[None]:
        """Count requests, and warn of those that were truncated."""
        before = len(self._lost)
        self._requests += requests
        yield
        lost = self._lost[before:]
        if lost:
            warnings.warn(
                f"{len(lost)} of {requests} prompts lost their first tokens, {sum(lost) / len(lost):.0f} on average: "
                f"prompt and answer are longer than max_length={self.max_length}. Raise max_length if the model reads "
                "more, or leave these tasks out: what was cut off cannot be answered",
                TruncationWarning,
                stacklevel=4,
            )


def _rows(cache: Any) -> int:
    keys = next((layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None), None)
    return 0 if keys is None else int(keys.shape[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
