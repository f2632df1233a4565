"""Token-exact match of the greedy answer, without decoding.

The greedy answer equals the reference token for token iff the arg-max at every answer position, given the reference
before it, is the reference: where they first differ, greedy decoding has read the same tokens. So one forward pass over
prompt and reference scores an example, at any compression, and gives the reference's likelihood as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.config import ONCE
from lrsa.data import Sample, collate
from lrsa.evaluation.journal import Finished
from lrsa.models import get_attention, set_attention, target_logits


@dataclass(frozen=True)
class Outcome:
    """One reference answer under one compression. `nll` is in nats a token, mean over the answer's `tokens`."""

    task: str
    id: str
    compression: float | None  # 1: full cache; None: without the context, the floor
    exact: bool
    nll: float
    tokens: int
    context: str = "full"  # none: without it; gold: its gold documents alone
    depth: float | None = None  # `Sample.depth`


def score(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    attention: SparseAttentionConfig | None,
    *,
    batch_size: int,
    pad_id: int,
    precision: str = "32-true",
    task: str = "",
    compression: float | None = 1,
    context: str = "full",
    on_batch: Callable[[int, int], None] | None = None,
    finished: Finished | None = None,
) -> list[Outcome]:
    """Score every answer of every sample, in the order of `samples`.

    Samples of similar length share a batch, padded on the right where lengths differ. The model's own attention and its
    training mode are restored afterwards.

    Args:
        attention: used for these forward passes; None is the full cache.
        precision: 32-true, or bf16-mixed for bfloat16 autocast.
        task, compression, context: copied into the outcomes.
        on_batch: called with (samples, tokens) after each batch that is not finished already.
        finished: batches of an earlier attempt, which are not computed again; gets those that are.

    Raises:
        ValueError: a sample with several answers under schedule ``prefill_once``.
    """
    if attention is not None and attention.schedule == ONCE:
        for sample in samples:
            _check_one_prompt(sample)
    finished = finished or Finished()
    outcomes: dict[int, list[Outcome]] = {}
    # Not inference_mode: tensors that attention caches here (positions, masks) may meet a training step later.
    with evaluating(model, attention), torch.no_grad(), autocast(model.device, precision):
        for indices in batches_of_similar_length([len(sample.input_ids) for sample in samples], batch_size):
            rows = [samples[index] for index in indices]
            done = finished.get(indices)
            if done is None:
                scored = _score_batch(model, rows, pad_id, task, compression, context)
                done = finished.add(indices, outcomes=[[asdict(outcome) for outcome in found] for found in scored])
                if on_batch is not None:
                    on_batch(len(rows), sum(len(sample.input_ids) for sample in rows))
            for index, found in zip(indices, done["outcomes"], strict=True):
                outcomes[index] = [Outcome(**outcome) for outcome in found]
    return [outcome for index in sorted(outcomes) for outcome in outcomes[index]]


def _score_batch(
    model: PreTrainedModel, rows: list[Sample], pad_id: int, task: str, compression: float | None, context: str
) -> list[list[Outcome]]:
    """The outcomes of each row."""
    batch, device = collate(rows, pad_id), model.device
    document_ids = batch["document_ids"]
    logits, targets = target_logits(
        model,
        batch["input_ids"].to(device),
        batch["answer_mask"],
        None if document_ids is None else document_ids.to(device),
    )
    nll = F.cross_entropy(logits, targets, reduction="none")
    # One copy from the device a batch: [2, N], N target tokens in row-major order.
    is_right, nll = torch.stack([(logits.argmax(-1) == targets).to(nll.dtype), nll]).cpu()
    start = 0
    outcomes: list[list[Outcome]] = []
    for sample in rows:
        outcomes.append([])
        for name, (first, stop) in zip(answer_ids(sample), sample.answer_spans, strict=True):
            answer = slice(start, start + stop - first)
            start = answer.stop
            exact = bool(is_right[answer].all())
            outcomes[-1].append(
                Outcome(task, name, compression, exact, float(nll[answer].mean()), stop - first, context, sample.depth)
            )
    if start != targets.numel():
        raise ValueError(f"{targets.numel()} target tokens in the mask, {start} in the answer spans of {batch['ids']}")
    return outcomes


def _check_one_prompt(sample: Sample) -> None:
    if len(sample.answer_spans) != 1:
        raise ValueError(
            f"sample {sample.id} has {len(sample.answer_spans)} answers, but schedule={ONCE!r} compresses at the end "
            "of the prompt, and it has no one end: score one question a sample (questions=1), or generate the answers, "
            "each from a prompt of its own (lrsa-eval mode=generate)"
        )


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The autocast context that `precision` names, for `device`."""
    if precision == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if precision == "32-true":
        return contextlib.nullcontext()
    raise ValueError(f"precision={precision!r} is unknown here; choose 32-true or bf16-mixed")


@contextlib.contextmanager
def evaluating(model: PreTrainedModel, attention: SparseAttentionConfig | None) -> Iterator[None]:
    """`model` with `attention` and in evaluation mode; both as they were afterwards, whatever happens inside."""
    before, was_training = get_attention(model), model.training
    try:
        set_attention(model, attention)
        model.eval()
        yield
    finally:
        set_attention(model, before)
        model.train(was_training)


def batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of `lengths`, longest first (an out-of-memory error comes at once), at most `batch_size` together."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_ids(sample: Sample) -> tuple[str, ...]:
    """One name an answer span; the turns of a conversation have no ids of their own."""
    spans = len(sample.answer_spans)
    if spans == 1:
        return (sample.id,)
    if len(sample.question_ids) == spans:
        return sample.question_ids
    return tuple(f"{sample.id}/{turn}" for turn in range(spans))
