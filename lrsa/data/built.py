"""A task's samples, built once: kept under the cache folder by fingerprint, and checked by a hash of their content."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lrsa.data.assembly import SampleSet
from lrsa.data.sample import Sample
from lrsa.data.tokens import digest, write_arrays

log = logging.getLogger(__name__)


def content_hash(samples: Sequence[Sample]) -> str:
    """sha256 of everything that the samples hold: equal on every machine on which the same data were built."""
    ids = (np.asarray(sample.input_ids, dtype="<i4").tobytes().hex() for sample in samples)
    return digest([json.dumps([_facts(sample) for sample in samples], sort_keys=True), *ids])


@lru_cache(maxsize=1)
def _code() -> str:
    """Of the modules that build samples: what an edited rule left in the cache is not read."""
    return digest(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))


def _facts(sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in vars(sample).items() if name != "input_ids"}


def build_samples(data: SampleSet, advance: Callable[[int, int], None] | None = None) -> list[Sample]:
    """The samples that evaluation asks, in order; from the cache folder where they were built before. An unreadable or
    altered file is built anew.

    advance: called with (1, tokens) after each sample that is built.
    """
    file = data.cache_dir / "samples" / f"{digest([data.fingerprint, _code()])}.npz"
    found = _read(file)
    if found is not None:
        return found
    samples = []
    for index in range(len(data)):
        asked = data.asked(index)
        samples += asked
        if advance is not None:
            advance(1, sum(sample.length for sample in asked))
    _write(file, samples)
    return samples


def _write(file: Path, samples: list[Sample]) -> None:
    text = json.dumps({"content": content_hash(samples), "samples": [_facts(sample) for sample in samples]})
    ids = [np.asarray(sample.input_ids, dtype=np.int32) for sample in samples]
    write_arrays(
        file,
        ids=np.concatenate(ids),
        ends=np.cumsum([len(part) for part in ids]),
        facts=np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8),
    )


def _read(file: Path) -> list[Sample] | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, ends, text = stored["ids"], stored["ends"], stored["facts"].tobytes().decode("utf-8", "surrogatepass")
        facts = json.loads(text)
        parts = np.split(ids, ends[:-1])
        samples = [_sample(part.tolist(), one) for part, one in zip(parts, facts["samples"], strict=True)]
        if content_hash(samples) != facts["content"]:
            raise ValueError("its content is not what was written")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        log.warning("samples %s are unreadable (%s): building them again", file, error)
        return None
    return samples


def _sample(input_ids: list[int], facts: dict[str, Any]) -> Sample:
    """JSON knows no tuples."""
    facts["answer_spans"] = [(start, stop) for start, stop in facts["answer_spans"]]
    facts["question_ids"] = tuple(facts["question_ids"])
    facts["answers"] = tuple(tuple(answers) for answers in facts["answers"])
    facts["gold_depth"] = tuple(facts["gold_depth"])
    return Sample(input_ids=input_ids, **facts)
