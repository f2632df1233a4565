"""Greedy answers: token-exact match, and what needs the text, normalised exact match, F1, ROUGE-L and string match.

B rows, T tokens. Token-exact match equals that of `scoring.score`, which decodes nothing. Every step is written out
here rather than left to `model.generate`, whose defaults come from the checkpoint (repetition penalties, sampling).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lrsa.attention import SparseAttentionConfig
from lrsa.cache import SparseKVCache, prefill
from lrsa.cache.graphed import GraphedStep
from lrsa.data import Sample
from lrsa.data.datamodule import pad_id_of
from lrsa.data.examples import JOINED_BY, target_text
from lrsa.evaluation.answers import exact_match, f1, rouge_l
from lrsa.evaluation.errors import EvaluationInputError
from lrsa.evaluation.journal import Finished
from lrsa.evaluation.measured import MeasuredCache, count_cache
from lrsa.evaluation.peers import prefill_under
from lrsa.evaluation.prefixes import ReadContexts, can_share, left_pad, plan
from lrsa.evaluation.scoring import answer_ids, autocast, evaluating
from lrsa.evaluation.string_match import string_match
from lrsa.models import full_attention, make_cache

MARGIN = 16  # tokens beyond the longest reference, for answers that take another wording
UNCAPTURED = 2  # tokens before the step is captured in a CUDA graph, which costs as much as four more
CAPTURES_ON = ("cuda",)
LISTED = 4  # more for each of several references that are all asked for: a number and a line of its own


@dataclass(frozen=True)
class Answer:
    """One generated answer under one compression, and how it compares with its references."""

    task: str
    id: str
    compression: float | None  # 1: full cache; None: without the context, the floor
    exact: bool  # the first reference token for token, its end of turn included
    tokens: int  # of that reference
    exact_match: bool  # normalised, with any reference
    f1: float  # best over the references
    rouge_l: float  # likewise
    string_match: float  # as RULER: share of the references found, or the best where one will do
    text: str
    generated_tokens: int  # the stop token included
    hit_limit: bool  # no stop token came within max_new_tokens
    context: str = "full"  # none: without it; gold: its gold documents alone
    depth: float | None = None  # `Sample.depth`


@dataclass(frozen=True)
class Answers:
    """`cache`: what the cache held after the prompts as measured, fields of `MeasuredCache.facts`."""

    outcomes: list[Answer]
    cache: dict[str, Any]
    max_new_tokens: int
    prefilled_tokens: int  # of prompts that were read; a shared context counts once


def stop_tokens(tokenizer: PreTrainedTokenizerBase, end: str = "") -> dict[int, str]:
    """Tokens that end an answer, id to text: the last one of `end` (`Prompt.end`, the prompt template's own end of
    turn), and EOS.

    Raises:
        ValueError: there is neither, so that no answer would ever end.
    """
    ids = tokenizer(end, add_special_tokens=False)["input_ids"][-1:] if end else []
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not ids:
        raise ValueError(
            "the tokenizer has no EOS token and the prompt template no end of turn: set tokenizer.eos_token"
        )
    return {int(index): str(tokenizer.convert_ids_to_tokens(int(index))) for index in ids}


def token_limit(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> int:
    """New tokens that suffice for every reference of `samples`, whichever wording is taken, and `MARGIN` more; for
    answers of several parts `LISTED` more a part."""
    spans = max((stop - start for sample in samples for start, stop in sample.answer_spans), default=0)
    others = list({text for sample in samples for answers in sample.answers for text in answers[1:]})
    encoded = tokenizer(others, add_special_tokens=False)["input_ids"] if others else []
    parts = max((len(answers) for sample in samples if sample.all_answers for answers in sample.answers), default=0)
    return max([spans, *map(len, encoded)]) + MARGIN + LISTED * parts


def generate_answers(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    attention: SparseAttentionConfig | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    batch_size: int,
    max_new_tokens: int | None = None,
    precision: str = "32-true",
    task: str = "",
    compression: float | None = 1,
    context: str = "full",
    block_size: int | None = None,
    press: Any = None,
    share_context: bool = True,
    on_batch: Callable[[int, int], None] | None = None,
    finished: Finished | None = None,
) -> Answers:
    """Answer every question of every sample greedily, in the order of `samples`.

    A question's prompt is the sample up to its answer span, earlier answers included as the references have them.
    Prompts of similar length share a batch, padded on the left. The model's own attention and its training mode are
    restored afterwards.

    Args:
        attention: of prompt and answer; None is the full cache, in a `SparseKVCache` whose layers are all dense.
        stop_ids: a row ends with the first of these (`stop_tokens`).
        max_new_tokens: an answer is cut there; None: `token_limit`.
        precision: 32-true, or bf16-mixed for bfloat16 autocast.
        task, compression, context: copied into the outcomes.
        block_size: tokens of the prompt read at once; None: all.
        press: of kvpress (`peers.build_press`), which compresses the context before the question is read; `attention`
            is then None.
        share_context: read a context that several questions have in common once, where `prefixes.can_share` allows it
            and without a press; the answers are the same, to rounding.
        on_batch: called with (answers, tokens read and written) after each batch that is not finished already.
        finished: batches of an earlier attempt, which are not computed again; gets those that are.

    Raises:
        EvaluationInputError: a limit below the longest reference, or a reference with a stop token before its end,
            which could not be generated.
        ValueError: a `batch_size`, `block_size` or `stop_ids` that make no sense.
    """
    for name, value in (("batch_size", batch_size), ("block_size", block_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if not stop_ids:
        raise ValueError("stop_ids is empty: no answer would end; take stop_tokens(tokenizer, prompt.end)")
    if press is not None and (attention is not None or batch_size != 1 or block_size is not None):
        raise ValueError("a press compresses dense attention, one prompt at a time, read at once: batch_size=1")
    limit = token_limit(tokenizer, samples) if max_new_tokens is None else max_new_tokens
    questions = [question for sample in samples for question in _questions(sample, tokenizer)]
    for question in questions:
        question.check(limit, stop_ids)
    finished = finished or Finished()
    outcomes: dict[int, Answer] = {}
    measured, prefilled, pad_id = MeasuredCache(), 0, pad_id_of(tokenizer)
    prompts, contexts = [question.prompt for question in questions], [question.context for question in questions]
    share = share_context and press is None and can_share(model, attention)
    used = full_attention(model) if attention is None and press is None else attention
    with evaluating(model, used), torch.no_grad(), autocast(model.device, precision):
        for job in plan(prompts, contexts, batch_size, share):
            room = max(len(prompts[index]) for indices in job.rounds for index in indices) + limit
            read = ReadContexts(model, job.contexts, pad_id, room, block_size)
            for number, indices in enumerate(job.rounds):
                done = finished.get(indices)
                if done is None:
                    rows = [prompts[index] for index in indices]
                    if job.contexts:
                        copy = read.copy([job.of[index] for index in indices], last=number == len(job.rounds) - 1)
                        prompt = _go_on(model, rows, *copy, pad_id, limit, block_size)
                    else:
                        prompt = _read(model, rows, pad_id, limit, block_size, press, contexts[indices[0]])
                    counts = count_cache(prompt.cache, [len(row) for row in rows])
                    written = _write(model, prompt, stop_ids, limit)
                    found = [
                        asdict(questions[index].outcome(ids, stop_ids, tokenizer, task, compression, context))
                        for index, ids in zip(indices, written, strict=True)
                    ]
                    tokens = job.tokens(number, prompts)
                    done = finished.add(indices, outcomes=found, cache=counts, prefilled=tokens)
                    if on_batch is not None:
                        on_batch(len(rows), tokens + sum(map(len, written)))
                measured.add(done["cache"])
                prefilled += done["prefilled"]
                outcomes |= {index: Answer(**found) for index, found in zip(indices, done["outcomes"], strict=True)}
    return Answers([outcomes[index] for index in range(len(questions))], measured.facts(), limit, prefilled)


@dataclass(frozen=True)
class _Question:
    id: str
    prompt: list[int]
    context: int  # tokens of the prompt before the first question
    reference: list[int]
    answers: tuple[str, ...]
    all_answers: bool = False
    joined_by: str = JOINED_BY
    depth: float | None = None

    def check(self, limit: int, stop_ids: Collection[int]) -> None:
        if len(self.reference) > limit:
            raise EvaluationInputError(
                f"max_new_tokens={limit} is below the {len(self.reference)} tokens of the reference of {self.id}: no "
                "answer could match it; raise it, or leave it null"
            )
        early = [token for token in self.reference[:-1] if token in stop_ids]
        if early:
            raise EvaluationInputError(
                f"the reference of {self.id} has the stop token {early[0]} before its end: generation would end there; "
                "take the example out, or correct its answer"
            )

    def outcome(
        self,
        ids: list[int],
        stop_ids: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        compression: float | None,
        context: str,
    ) -> Answer:
        ended = bool(ids) and ids[-1] in stop_ids
        text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        whole = (target_text(self.answers, True, self.joined_by),) if self.all_answers else self.answers
        return Answer(
            task,
            self.id,
            compression,
            # A reference that does not end with a stop token is matched as far as it goes, as parallel scoring does.
            exact=ids[: len(self.reference)] == self.reference,
            tokens=len(self.reference),
            exact_match=exact_match(text, whole),
            f1=f1(text, whole),
            rouge_l=rouge_l(text, whole),
            string_match=string_match(text, self.answers, self.all_answers),
            text=text,
            generated_tokens=len(ids),
            hit_limit=not ended,
            context=context,
            depth=self.depth,
        )


def _questions(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[_Question]:
    """One an answer span; a conversation's turns have no references but their own tokens."""
    named = len(sample.answers) == len(sample.answer_spans) and all(sample.answers)
    found = []
    for number, (name, (start, stop)) in enumerate(zip(answer_ids(sample), sample.answer_spans, strict=True)):
        reference = sample.input_ids[start:stop]
        texts = sample.answers[number] if named else (tokenizer.decode(reference, skip_special_tokens=True),)
        every = named and sample.all_answers
        prompt = sample.input_ids[:start]
        about = (every, sample.joined_by, sample.depth)
        found.append(_Question(name, prompt, sample.context_length, reference, texts, *about))
    return found


@dataclass(frozen=True)
class _Prompt:
    """A batch of prompts that was read: logits ``[B, V]`` after them, tokens of each ``[B]``, the mask of all columns
    with room for the answer, None without pads, and the number of columns read.
    """

    cache: Cache
    logits: Tensor
    lengths: Tensor
    mask: Tensor | None
    width: int


def _read(
    model: PreTrainedModel,
    prompts: list[list[int]],
    pad_id: int,
    room: int,
    block_size: int | None,
    press: Any,
    context: int,
) -> _Prompt:
    """Each prompt whole. ``context``: tokens that a press compresses."""
    input_ids, mask = left_pad(prompts, pad_id, room, model.device)
    width = input_ids.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    cache = make_cache(model, max_tokens=max(map(len, prompts)) + room)
    if press is None:
        logits = prefill(model, input_ids, cache, None if mask is None else mask[:, :width], block_size)
    else:
        logits = prefill_under(press, model, input_ids, cache, context)
    return _Prompt(cache, logits, lengths, mask, width)


def _go_on(
    model: PreTrainedModel,
    prompts: list[list[int]],
    cache: Cache,
    before: Tensor,
    pad_id: int,
    room: int,
    block_size: int | None,
) -> _Prompt:
    """What is left of prompts whose beginnings ``cache`` has read, ``before [B, columns]`` being its mask."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    rest = [prompt[length:] for prompt, length in zip(prompts, before.sum(-1).tolist(), strict=True)]
    input_ids, mask = left_pad(rest, pad_id, room, model.device)
    width = before.shape[1] + input_ids.shape[1]
    if mask is None:
        mask = torch.ones((len(rest), input_ids.shape[1] + room), dtype=torch.long, device=model.device)
    whole = torch.cat([before, mask], 1)
    seen = None if bool(whole.all()) else whole
    logits = prefill(model, input_ids, cache, None if seen is None else seen[:, :width], block_size)
    return _Prompt(cache, logits, lengths, seen, width)


def _write(model: PreTrainedModel, prompt: _Prompt, stop_ids: Collection[int], limit: int) -> list[list[int]]:
    """Greedy continuations, a stop token included, at most `limit` tokens each."""
    stop = torch.tensor(sorted(stop_ids), device=model.device)
    done = torch.zeros(len(prompt.lengths), dtype=torch.bool, device=model.device)
    written: list[Tensor] = []
    logits = prompt.logits
    with contextlib.ExitStack() as stack:
        captured: GraphedStep | None = None
        while True:
            # What a finished row goes on with is cut off below.
            written.append(logits.argmax(-1))
            done |= torch.isin(written[-1], stop)
            if len(written) == limit or bool(done.all()):
                break
            if len(written) == UNCAPTURED and _can_capture(prompt.cache, model.device):
                captured = stack.enter_context(GraphedStep(model, prompt.cache))
            logits = captured(written[-1]) if captured else _step(model, prompt, written[-1], len(written) - 1)
    return [_until(row, stop_ids) for row in torch.stack(written, 1).tolist()]


def _step(model: PreTrainedModel, prompt: _Prompt, tokens: Tensor, fed: int) -> Tensor:
    """Logits ``[B, V]`` after ``tokens [B]``, to which the prompt and ``fed`` tokens came before."""
    return model(
        input_ids=tokens[:, None],
        attention_mask=None if prompt.mask is None else prompt.mask[:, : prompt.width + fed + 1],
        position_ids=(prompt.lengths + fed)[:, None],
        past_key_values=prompt.cache,
        use_cache=True,
    ).logits[:, -1]


def _can_capture(cache: Cache, device: torch.device) -> bool:
    return device.type in CAPTURES_ON and isinstance(cache, SparseKVCache) and cache.static_obstacle() is None


def _until(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """Up to the first stop token, which stays."""
    first = next((number for number, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: first + 1]
