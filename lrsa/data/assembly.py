"""Examples + filler -> samples of exactly T tokens, with the answers' token ranges and the depth of the gold passages.

    head instruction | block block ... block | question tail lead answer end | turn question tail lead answer end ...
                     '------- context -------'

The rule: every piece is tokenised on its own, without special tokens, with its separator in front, and the ids are
joined. A context of documents holds the gold passages, then as many other passages as fit (the example's own ones
first, then passages of other articles of the same split), then filler prose, its last block trimmed to the token. A
synthetic context holds the needles between sentences of filler, in their order where the source has one; or it is the
source's own, of the largest size that fits, after what little filler is then missing. A gold passage goes to the gap
between blocks that is nearest to its drawn depth; what is recorded is where it came to stand. Nothing else is ever cut:
what does not fit is a ContextTooLongError. A sample depends on (stream, conf.seed, index) alone.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lrsa.config import ExamplesConf
from lrsa.data.examples import NEW_PARAGRAPH, Document, Example, Whitespace, stream_rng, target_text
from lrsa.data.filler import Filler
from lrsa.data.placement import Joiner, largest_size, place, shuffled
from lrsa.data.prompts import conversation_pieces, make_prompt
from lrsa.data.sample import ContextTooLongError, Sample
from lrsa.data.sources import SYNTHETIC_SAMPLES, Loaded, draw_context, load, plain_conf, source_args, source_of
from lrsa.data.synthetic import SYNTHETIC
from lrsa.data.tokens import Ids, default_cache_dir, digest, token_store

RULE = "1"  # of assembly; raise it when the same inputs give other samples, so that fingerprints tell
_DRAWS = 3  # contexts of a synthetic source that its fingerprint looks at
_MISSES = 16  # passages in a row that are too long for what is left, before filler takes over


class SampleSet(Dataset[Sample]):
    """Map-style data set of samples. `[i]`, i < len, for evaluation; `sample(i)` goes on for ever, reshuffled an epoch.

    length: tokens of every sample with documents, T; None: no filler, as long as the example is. Conversations and
    prompt-answer rows keep their own length, at most T.
    context=False: the questions alone, without instruction or documents (the no-context floor), under the same ids.
    gold_only=True: the supporting documents alone, without other passages, needles or filler (the ceiling); as long as
    they are, whatever `length`.
    stream: name of the random stream; training uses `train/<part>/<run seed>`, evaluation `evaluation`, and every draw
    is keyed by it, so equal seeds never give equal draws.
    Iterating and `len` follow `conf.limit`; None means every question once (200 contexts of a synthetic source).
    cache_dir: of tokenised texts, and of a task's samples (`built.build_samples`); None: $LRSA_CACHE or ~/.cache/lrsa.
    """

    def __init__(
        self,
        conf: ExamplesConf,
        tokenizer: PreTrainedTokenizerBase,
        length: int | None,
        context: bool = True,
        *,
        gold_only: bool = False,
        stream: str = "evaluation",
        cache_dir: Path | None = None,
        loaded: Loaded | None = None,
    ) -> None:
        conf = plain_conf(conf)
        self.conf, self.context, self.stream = conf, context, stream
        self.gold_only, self.length = gold_only, length if context and not gold_only else None
        self.args = source_args(conf)
        if conf.questions < 1:
            raise ValueError(f"questions={conf.questions} must be at least 1")
        if conf.limit is not None and conf.limit < 1:
            raise ValueError(f"limit={conf.limit} must be at least 1, or null for everything")
        self.synthetic = source_of(conf).synthetic
        self.task = SYNTHETIC[conf.source] if self.synthetic else None
        self.loaded = loaded or (Loaded([], f"synthetic {conf.source}") if self.synthetic else load(conf, stream))
        self.examples = self.loaded.examples
        self.cache_dir = cache_dir or default_cache_dir()
        self.store = token_store(tokenizer, self.cache_dir)
        prompt = make_prompt(conf.prompt, tokenizer)
        asked, prefix = self.args.get("asked", "{question}"), self.args.get("answer_prefix", "")
        self.prompt = replace(prompt, question=prompt.question.replace("{question}", asked), prefix=prefix)
        self.bare = not self.synthetic and not self.examples[0].documents
        if self.bare and conf.questions != 1:
            raise ValueError(f"questions={conf.questions}: rows without documents share no context; set questions: 1")
        have = len(self.examples)
        if not self.synthetic and conf.questions > have:
            raise ValueError(f"questions={conf.questions} a context, but {self.loaded.origin} has only {have}")
        self.pool = list({d.text: d for d in self.loaded.documents}.values()) if context else []
        self.store.preload(self.piece(d) for d in self.loaded.documents if context)
        with_filler = self.length is not None and not self.bare
        self.space = self.task.space if self.task else Whitespace()
        self.filler = Filler(conf.filler, self.store, self.space.noise) if with_filler else None
        self.in_noise = self.filler is not None and self.filler.repeats
        self.before_question = self.space.after_noise if self.in_noise else self.space.question
        self._order: tuple[int, list[int]] = (-1, [])
        self.template = self._template()
        self.fingerprint = self._fingerprint()

    # ---- what there is

    @property
    def epoch(self) -> int:
        """Samples until every question has been asked once."""
        return SYNTHETIC_SAMPLES if self.synthetic else -(-len(self.examples) // self.conf.questions)

    def __len__(self) -> int:
        if self.conf.limit is None:
            return self.epoch
        return self.conf.limit if self.synthetic else min(self.conf.limit, self.epoch)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index)

    def examples_of(self, index: int) -> list[Example]:
        """The questions of sample `index`: the next ones of the epoch's shuffled order, or a synthetic draw."""
        if self.synthetic:
            return draw_context(self.conf, index, self.stream, self._size(index))
        epoch, within = divmod(index, self.epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            self._rng("order", epoch).shuffle(order)
            self._order = (epoch, order)
        chosen = self._order[1][within * self.conf.questions : (within + 1) * self.conf.questions]
        return [self.examples[number] for number in chosen]

    def describe(self) -> dict[str, Any]:
        """For the record: origin, fingerprint, number of samples, template, length."""
        return {
            "source": self.conf.source,
            "origin": self.loaded.origin,
            "filler": self.filler.origin if self.filler else None,
            "fingerprint": self.fingerprint,
            "n": len(self),
            "questions": self.conf.questions,
            "length": self.length,
            "context": self.context,
            "gold_only": self.gold_only,
            "template": self.template,
            "truncation": "none",
        }

    def _template(self) -> str:
        if self.bare and self.examples[0].messages:
            return "messages, through the tokenizer's chat template"
        with_context = self.context and not self.bare
        gap = f"{self.args['instruction']}{{documents}}{self.before_question}" if with_context else ""
        return self.prompt.template(gap, self.conf.questions > 1 and not self.conf.apart)

    def _fingerprint(self) -> str:
        """Over what decides the samples; not over paths: the same rows from the hub or a folder are the same data."""
        said = {k: v for k, v in asdict(self.conf).items() if k not in ("weight", "path", "split", "filler", "args")}
        if not self.conf.apart:
            del said["apart"]  # fingerprints are older than the field
        # asked, answer_prefix: in the template
        said |= {
            "args": {k: v for k, v in self.args.items() if k not in ("config", "revision", "asked", "answer_prefix")}
        }
        said |= {"length": self.length, "context": self.context, "stream": self.stream}
        said |= {"gold_only": True} if self.gold_only else {}
        said |= {"space": asdict(self.space)} if self.space != Whitespace() else {}
        filler = self.filler.fingerprint if self.filler else ""
        parts = [RULE, json.dumps(said, sort_keys=True, default=str), self.store.fingerprint, self.template, filler]
        hashed = self.task is not None and self.task.hash_draws
        first = [draw_context(self.conf, index, self.stream) for index in range(_DRAWS)] if hashed else []
        drawn = [json.dumps(asdict(example), sort_keys=True) for examples in first for example in examples]
        return digest([*parts, digest(drawn or self.loaded.rows())])

    def _rng(self, *key: object) -> random.Random:
        return stream_rng(self.stream, self.conf.seed, self.conf.source, *key)

    # ---- one sample

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 of the endless stream. ContextTooLongError when it does not fit T."""
        examples = self.examples_of(index)
        joiner = Joiner()
        depths: list[float] = []
        if examples[0].messages:
            self._conversation(examples[0], joiner)
        else:
            depths = self._questions(examples, joiner, index)
        return Sample(
            id=_name(examples),
            input_ids=joiner.ids(),
            answer_spans=joiner.spans,
            question_ids=tuple(example.id for example in examples),
            answers=tuple(example.answers for example in examples),
            gold_depth=tuple(depths),
            length=joiner.size,
            context_length=joiner.context,
            all_answers=examples[0].all_answers,
            joined_by=examples[0].joined_by,
        )

    def asked(self, index: int) -> list[Sample]:
        """Sample `index` as evaluation asks it: itself; or, with `conf.apart`, a sample a question, each the first one
        after the same context, which leaves room for all of them: such samples are shorter than T.
        """
        sample = self.sample(index)
        if not self.conf.apart:
            return [sample]
        examples, size = self.examples_of(index), sample.context_length
        needed = [d.text for e in examples for d in e.documents if d.is_supporting]
        depths = dict(zip(needed if self.synthetic else dict.fromkeys(needed), sample.gold_depth, strict=bool(size)))
        found = []
        for example in examples:
            joiner = Joiner()
            joiner.add(np.array(sample.input_ids[:size], dtype=np.int64))
            question, *answer = self.store.encode(self._texts([example]))[-3:]
            joiner.add(question)
            joiner.add(*answer, target=True)
            found.append(
                replace(
                    sample,
                    id=example.id,
                    input_ids=joiner.ids(),
                    answer_spans=joiner.spans,
                    question_ids=(example.id,),
                    answers=(example.answers,),
                    gold_depth=tuple(depths[d.text] for d in example.documents if d.is_supporting and size),
                    length=joiner.size,
                )
            )
        return found

    def check(self, count: int) -> None:
        """Raise ContextTooLongError now if one of the first `count` samples would not fit, rather than hours later."""
        if self.length is None:
            return
        if self.synthetic or self.bare:
            count = min(count, 1 if self.synthetic else self.epoch)
            for index in range(count):
                self.sample(index)
            return
        for index in range(count):
            examples = self.examples_of(index)
            texts = self._texts(examples)
            # no tokenizer makes more tokens than bytes (plus one a piece): most samples pass without being built
            gold = sum(len(ids) for ids in self._documents(examples)[0])
            if gold + len(texts) + sum(len(text.encode()) for text in texts) > self.length:
                self._check_size(examples, gold + sum(map(len, self.store.encode(texts))))

    def _conversation(self, example: Example, joiner: Joiner) -> None:
        """Loss on what the assistant writes, each answer with its end of turn."""
        try:
            pieces = conversation_pieces(self.store.tokenizer, example.messages)
        except ValueError as error:
            raise ValueError(f"example {example.id} of {self.loaded.origin}: {error}") from error
        for texts, target in pieces:
            joiner.add(*self.store.encode(texts), target=target)
        self._check_size([example], joiner.size)

    def _texts(self, examples: list[Example]) -> list[str]:
        """What goes around the context: the opening (with a context), then three pieces a question."""
        prompt, with_context = self.prompt, self.context and not self.bare
        opening = examples[0].opening or str(self.args["instruction"])
        before_noise = self.space.before_noise if self.in_noise else ""
        texts = [prompt.head + opening + before_noise] if with_context else []
        for number, example in enumerate(examples):
            asked = prompt.ask(example.question, example.answer_prefix)
            before = prompt.turn if number else self.before_question if with_context else prompt.head
            answer = target_text(example.answers, example.all_answers, example.joined_by)
            texts += [before + asked, (" " if example.answer_prefix else prompt.lead) + answer, prompt.end]
        return texts

    def _size(self, index: int) -> int | None:
        """Units of context `index` of a source that draws its whole context: as many as fit T; None of other sources.

        Without a length the least will do, for question and answer are the same.
        """
        if self.task is None or self.task.least is None or self.length is None:
            return None

        def tokens(size: int) -> int:
            examples = draw_context(self.conf, index, self.stream, size)
            return sum(map(len, self.store.encode(self._texts(examples)) + self._documents(examples)[0]))

        return largest_size(tokens, self.task.least, self.length)

    def _questions(self, examples: list[Example], joiner: Joiner, index: int) -> list[float]:
        pieces = self.store.encode(self._texts(examples))
        depths: list[float] = []
        if len(pieces) % 3:
            joiner.add(pieces.pop(0))
            blocks, depths = self._context(examples, joiner.size + sum(map(len, pieces)), index)
            joiner.add(*blocks)
            joiner.context = joiner.size
        for number in range(0, len(pieces), 3):
            joiner.add(pieces[number])
            joiner.add(pieces[number + 1], pieces[number + 2], target=True)
        self._check_size(examples, joiner.size)
        return depths

    # ---- its context

    def _context(self, examples: list[Example], fixed: int, index: int) -> tuple[list[Ids], list[float]]:
        """All blocks between instruction and question, T - fixed tokens together, and the gold passages' depths."""
        rng = self._rng("context", index)
        gold, others = self._documents(examples)
        if self.task is not None and self.task.least is not None:
            return self._whole(examples, gold, fixed, rng)
        taken = fixed + sum(map(len, gold))
        if self.length is None:
            background = others
            rng.shuffle(background)
        else:
            self._check_size(examples, taken)
            assert self.filler is not None
            background = [] if self.synthetic else self._passages(examples, others, self.length - taken, rng)
            left = self.length - taken - sum(map(len, background))
            background += self.filler.blocks(rng, left, by_sentence=self.synthetic)
            if not self.synthetic:
                rng.shuffle(background)
        grid = self.args["depths"]
        wanted = [float(grid[(index + k) % len(grid)]) if grid else rng.random() for k in range(len(gold))]
        if self.task is not None and self.task.ordered:
            wanted.sort()
        blocks, fell = place(background, gold, wanted, apart=self.in_noise)
        return blocks, [fell[k] for k in self._asked(examples)]

    def _whole(
        self, examples: list[Example], drawn: list[Ids], fixed: int, rng: random.Random
    ) -> tuple[list[Ids], list[float]]:
        """A context that its source drew whole, after the filler that is missing."""
        self._check_size(examples, fixed + sum(map(len, drawn)))
        missing = 0 if self.length is None else self.length - fixed - sum(map(len, drawn))
        before = self.filler.blocks(rng, missing, by_sentence=True) if self.filler else []
        starts = np.cumsum([missing, *map(len, drawn)])
        return before + drawn, [float(starts[k] / starts[-1]) for k in self._asked(examples)]

    def _documents(self, examples: list[Example]) -> tuple[list[Ids], list[Ids]]:
        """Ids of what must be in the context (gold; all needles), and of the examples' own other passages."""
        if self.synthetic:
            held = {d.text for e in examples for d in e.documents if d.is_supporting or not self.gold_only}
            needles = [d for d in examples[0].documents if d.text in held]
            return self.store.encode([self.piece(d, k == 0) for k, d in enumerate(needles)]), []
        supporting = dict.fromkeys(d.text for e in examples for d in e.documents if d.is_supporting)
        unique = {d.text: d for e in examples for d in e.documents}
        gold = [self.store.get(self.piece(unique[text])) for text in supporting]
        others = () if self.gold_only else unique.items()
        return gold, [self.store.get(self.piece(d)) for text, d in others if text not in supporting]

    def _asked(self, examples: list[Example]) -> list[int]:
        """Positions, in the gold list, of the passages that the questions need."""
        if self.synthetic and not self.gold_only:
            return [k for e in examples for k, d in enumerate(e.documents) if d.is_supporting]
        return list(range(len({d.text for e in examples for d in e.documents if d.is_supporting})))

    def _passages(self, examples: list[Example], own: list[Ids], room: int, rng: random.Random) -> list[Ids]:
        """The examples' own other passages, then passages of other articles, as many as fit `room` tokens."""
        most = self.args["max_distractors"]
        groups = {document.group for example in examples for document in example.documents}
        texts = {document.text for example in examples for document in example.documents}
        others = (self.pool[number] for number in shuffled(len(self.pool), rng))
        fresh = (self.store.get(self.piece(d)) for d in others if d.group not in groups and d.text not in texts)
        found: list[Ids] = []
        misses = 0
        rng.shuffle(own)
        for candidates in (own, fresh):
            for ids in candidates:
                if misses >= _MISSES or (most is not None and len(found) >= most):
                    break
                if len(ids) > room:
                    misses += 1
                    continue
                found.append(ids)
                room -= len(ids)
                misses = 0
        return found

    def piece(self, document: Document, first: bool = False) -> str:
        """A document of the context as it is tokenised; `first`: of a synthetic one."""
        if not self.synthetic:
            titled = self.args["titles"] and document.title
            return NEW_PARAGRAPH + (f"{document.title}\n" if titled else "") + document.text
        text = (self.space.in_noise if self.in_noise else self.space.statement).format(document.text)
        opens = first and self.task is not None and self.task.least is not None  # a context of its own
        return self.space.whole + text.lstrip() if opens else text

    def _check_size(self, examples: list[Example], size: int) -> None:
        if self.length is None or size <= self.length:
            return
        several = f", ask fewer than questions={self.conf.questions} a context" if len(examples) > 1 else ""
        raise ContextTooLongError(
            f"example {_name(examples)} of {self.loaded.origin}: its prompt, gold passages and answers take {size} "
            f"tokens, {size - self.length} more than length={self.length}; nothing is cut: raise the length{several}, "
            "or take the example out"
        )


def _name(examples: list[Example]) -> str:
    more = f"+{len(examples) - 1}" if len(examples) > 1 else ""
    return examples[0].id + more
