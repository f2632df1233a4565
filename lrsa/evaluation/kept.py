"""Kept-token maps: which tokens of a prompt each layer and head of a model still holds once it has read them.

>>> found = kept_map(model, tokenizer, "a long prompt ...", SparseAttentionConfig(keep_ratio=1 / 4))
>>> found.kept.mean(axis=(0, 1))  # [T], the share of heads that keep each token
>>> [token for token, kept in zip(found.tokens, found.kept[5, 0]) if kept]  # what layer 5's first head keeps
>>> found.scores[5, 0]  # [T] what it was ranked by
>>> kept_figure(found), kept_text_figure(found), kept_html(found, layer=5, head=0)  # lrsa.results.figures
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.inspection import LayerInputs, inspecting, kept_by, token_scores
from lrsa.evaluation.scoring import evaluating


@dataclass(frozen=True)
class KeptMap:
    """Of a prompt of T tokens, in a model of `layers` layers with H key/value heads.

    Attributes:
        tokens: T pieces of the prompt's text; joined they are the prompt, special tokens added to it apart. A piece is
            empty where a character takes several tokens, but for the first of them.
        input_ids: int64 ``[T]``.
        kept: bool ``[layers, H, T]``, True for what is held after all T were read: sinks, kept tokens, the raw tail.
        scores: float32 ``[layers, H, T]``, what the tokens were ranked by, NaN where nothing was: sinks, the tail,
            layers that are not compressed. They compare within one partition of one head alone.
        ranked: bool ``[layers, T]``, the tokens among which the layer chose.
        attention: the config under which the prompt was read.
    """

    tokens: list[str]
    input_ids: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    ranked: np.ndarray
    attention: SparseAttentionConfig

    @property
    def slots(self) -> np.ndarray:
        """int ``[layers, H]``: tokens held."""
        return self.kept.sum(-1)

    @property
    def ratio(self) -> float:
        """Full cache / kept, over all layers and heads."""
        return float(self.kept.size / self.kept.sum())


def kept_map(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    attention: SparseAttentionConfig,
    *,
    add_special_tokens: bool = True,
) -> KeptMap:
    """Read `prompt` with `attention` in one pass, and see what each layer and head keeps: what a `SparseKVCache` holds
    after the same prompt.

    The model may be dense or have another attention: it is given back as it was. Deeper layers read what earlier,
    compressed ones made of the prompt, as in training and decoding. One layer's keys are looked at while it attends,
    so that memory is that of a forward pass; the result is 5 bytes a layer, head and token.

    Args:
        prompt: the text as the model is to read it; put it into the chat template before, if it is to be in one.
        add_special_tokens: the tokenizer's own, such as a BOS token; False where the text has them already.

    Raises:
        ValueError: an empty prompt, or a model that sparse attention cannot replace.
    """
    ids, tokens = _tokenize(tokenizer, prompt, add_special_tokens)
    config = model.config.get_text_config()
    if not ids:
        raise ValueError("the prompt is empty: give a text of at least one token")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (config.num_hidden_layers, heads, len(ids))
    kept, scores = np.ones(shape, dtype=bool), np.full(shape, np.nan, dtype=np.float32)
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind == "sliding_attention":  # not ours: it holds its window
            kept[layer, :, : max(0, len(ids) - config.sliding_window)] = False

    def look(inputs: LayerInputs) -> None:
        kept[inputs.layer_idx] = kept_by(inputs)[0].cpu().numpy()
        scores[inputs.layer_idx] = token_scores(inputs)[0].cpu().numpy()

    arguments = {"prompt_lengths": len(ids)} if attention.reads_prompt_lengths else {}
    input_ids = torch.tensor([ids], device=model.device)
    with evaluating(model, attention), torch.no_grad(), inspecting(look):
        model(input_ids=input_ids, logits_to_keep=1, use_cache=False, **arguments)
    ranked = np.asarray(~np.isnan(scores).all(axis=1))
    return KeptMap(tokens, np.asarray(ids), kept, scores, ranked, attention)


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool) -> tuple[list[int], list[str]]:
    """The ids, and the text of each; a special token that is not in the text by its name."""
    encoded = tokenizer(
        prompt,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # how long is too long is the model's to say
    )
    ids = list(encoded["input_ids"])
    if not tokenizer.is_fast:
        return ids, [tokenizer.decode([token]) for token in ids]
    pieces, shown = [], 0
    special = tokenizer.all_special_ids
    for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        if start == end and token in special:
            pieces.append(tokenizer.convert_ids_to_tokens(token))
            continue
        pieces.append(prompt[shown : max(shown, end)])  # from where the last one ended: some leave spaces out
        shown = max(shown, end)
    if pieces and shown < len(prompt):
        pieces[-1] += prompt[shown:]
    return ids, pieces
