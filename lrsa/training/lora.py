"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, for models whose full fine-tuning does not fit."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lrsa.config import LoraConf


def add_lora(model: PreTrainedModel, conf: LoraConf) -> PeftModel:
    """Freeze `model` and inject adapters into it, in place.

    The returned wrapper knows how to save and merge them; `model` itself keeps working as before, adapters included,
    so training and evaluation never see the wrapper.

    Raises:
        ValueError: a name in `conf.target_modules` is no linear layer of the model; lists those that are.
    """
    linear = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    unknown = sorted(set(conf.target_modules) - set(linear))
    if unknown:
        raise ValueError(
            f"model.lora.target_modules names {unknown}, which this model lacks; its linear layers: {linear}"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=conf.rank,
        lora_alpha=conf.alpha,
        lora_dropout=conf.dropout,
        target_modules=list(conf.target_modules),
    )
    wrapper = get_peft_model(model, config)
    assert isinstance(wrapper, PeftModel)
    return wrapper


def merge_lora(wrapper: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights that they adapt and remove them: a plain model again, in place."""
    merged: PreTrainedModel = wrapper.merge_and_unload()
    return merged
