"""Sources of examples: hub data sets, one's own JSONL, and the synthetic tasks. To add one: a function and a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from lrsa.config import ExamplesConf
from lrsa.data.adapters import read_hotpotqa, read_musique, read_narrativeqa, read_squad, read_two_wiki
from lrsa.data.examples import Document, Example, stream_rng
from lrsa.data.rows import Row, locate, read_rows
from lrsa.data.synthetic import SYNTHETIC

SYNTHETIC_SAMPLES = 200  # contexts of a synthetic source whose `limit` is not set (a training stream never ends)

QA_INSTRUCTION = "Read the documents and answer the questions. Reply with the answer alone, in a few words."

# Arguments that decide how a sample is laid out; see lrsa.data.assembly.
LAYOUT_ARGS: dict[str, Any] = {"instruction": QA_INSTRUCTION, "depths": None}
# How a question is put, in addition to the prompt's own form, and what the answer is made to begin with.
WORDING_ARGS: dict[str, Any] = {"asked": "{question}", "answer_prefix": ""}
DOCUMENT_ARGS: dict[str, Any] = {**LAYOUT_ARGS, **WORDING_ARGS, "titles": False, "max_distractors": None}
HUB_ARGS: dict[str, Any] = {"config": None, "revision": None}
DOCUMENT_FIELDS = ("title", "text", "is_supporting")  # of one's own rows


@dataclass(frozen=True)
class Loaded:
    """Examples and the short name of where they came from."""

    examples: list[Example]
    origin: str


@dataclass(frozen=True)
class Source:
    """`read` turns one row into an example; `args` are the arguments the source takes, with their defaults.

    `reads` names the arguments that `read` takes besides the row, each with its valid values.
    """

    read: Callable[..., Example] | None  # None: synthetic
    args: dict[str, Any]
    path: str | None = None  # default
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _messages(row: Row) -> tuple[tuple[str, str], ...]:
    messages = row.data["messages"]
    if not isinstance(messages, list) or not messages:
        row.fail("messages", "expected a list of {role, content}")
    pairs: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str) or not role or not content.strip():
            row.fail(f"messages[{index}]", f"expected role and content as strings, got {message!s:.80}")
        pairs.append((role, content))
    if "assistant" not in [role for role, _ in pairs] or pairs[0][0] == "assistant":
        row.fail("messages", "an assistant's message must follow the first one: there is nothing to learn from")
    return tuple(pairs)


def _documents(row: Row) -> tuple[Document, ...]:
    given = row.data["documents"]
    if not isinstance(given, list):
        row.fail("documents", f"expected a list, got {type(given).__name__}")
    documents = []
    for index, item in enumerate(given):
        entry = {"text": item} if isinstance(item, str) else item
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
            row.fail(f"documents[{index}]", "expected a text, or an object with title, text and is_supporting")
        unknown = [name for name in entry if name not in DOCUMENT_FIELDS]
        if unknown:  # a misspelt is_supporting would make every document a supporting one
            row.fail(f"documents[{index}]", f"unknown {', '.join(unknown)}; valid: {', '.join(DOCUMENT_FIELDS)}")
        title, supporting = entry.get("title") or "", entry.get("is_supporting", True)
        if not isinstance(title, str) or not isinstance(supporting, bool):
            row.fail(f"documents[{index}]", "title must be a string and is_supporting true or false")
        documents.append(Document(title, entry["text"].strip(), supporting))
    if documents and not any(document.is_supporting for document in documents):
        row.fail("documents", "is_supporting is false for all: the answer must be in one, which is never left out")
    return tuple(documents)


def read_jsonl(row: Row) -> Example:
    """One's own row: `messages`; or `prompt` and `answer` (`response`, `completion`); or these with `documents`.

    `question` is another name of `prompt`, `answers` a list of references, the first one the target. A document is a
    text, or {title, text, is_supporting}. README.md in this folder has the format with examples.
    """
    identity = str(row.data.get("id") or f"row-{row.line}")
    if row.data.get("messages") is not None:
        return Example(identity, "", (), messages=_messages(row))
    asked = next((name for name in ("prompt", "question") if row.data.get(name) is not None), None)
    if asked is None:
        row.fail("messages", f"missing, as are prompt and question (the row has {', '.join(row.data) or 'nothing'})")
    column = next((n for n in ("answers", "answer", "response", "completion") if row.data.get(n) is not None), "answer")
    if isinstance(row.data.get(column), list):
        answers = tuple(row.texts(column))
    else:
        answers = (row.text(column),)
    documents = _documents(row) if row.data.get("documents") is not None else ()
    group = next((document.group for document in documents if document.is_supporting), "")
    return Example(identity, row.text(asked).strip(), tuple(answer.strip() for answer in answers), documents, group)


SOURCES: dict[str, Source] = {
    "squad": Source(read_squad, {**DOCUMENT_ARGS, **HUB_ARGS}, "rajpurkar/squad"),
    "hotpotqa": Source(
        read_hotpotqa, {**DOCUMENT_ARGS, **HUB_ARGS, "titles": True, "config": "distractor"}, "hotpotqa/hotpot_qa"
    ),
    "two_wiki": Source(read_two_wiki, {**DOCUMENT_ARGS, **HUB_ARGS, "titles": True}, "framolfese/2WikiMultihopQA"),
    "musique": Source(read_musique, {**DOCUMENT_ARGS, **HUB_ARGS, "titles": True}, "dgslibisey/MuSiQue"),
    "narrativeqa": Source(
        read_narrativeqa,
        {**DOCUMENT_ARGS, **HUB_ARGS, "text": "document"},
        "deepmind/narrativeqa",
        reads={"text": ("document", "summary")},
    ),
    "jsonl": Source(read_jsonl, {**DOCUMENT_ARGS, **HUB_ARGS}),
    **{name: Source(None, {**LAYOUT_ARGS, **task.args}) for name, task in SYNTHETIC.items()},
}


def plain_conf(conf: ExamplesConf) -> ExamplesConf:
    """A copy of `conf` as a plain dataclass, checked against the schema where it comes from Hydra."""
    if not OmegaConf.is_config(conf):
        return deepcopy(conf)
    checked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ExamplesConf), conf))
    assert isinstance(checked, ExamplesConf)
    return checked


def source_of(conf: ExamplesConf) -> Source:
    """The source that `conf` names; ValueError lists the valid ones."""
    if conf.source not in SOURCES:
        raise ValueError(f"unknown source {conf.source!r}; valid: {', '.join(SOURCES)}")
    return SOURCES[conf.source]


def source_args(conf: ExamplesConf) -> dict[str, Any]:
    """`conf.args` over the source's defaults; ValueError for a name that the source does not know."""
    defaults = source_of(conf).args
    unknown = [name for name in conf.args if name not in defaults]
    if unknown:
        raise ValueError(f"source {conf.source!r} has no args {unknown}; valid: {', '.join(defaults)}")
    args = {**defaults, **conf.args}
    for name, valid in source_of(conf).reads.items():
        if args[name] not in valid:
            raise ValueError(
                f"args.{name}={args[name]!r} is unknown to source {conf.source!r}; valid: {', '.join(valid)}"
            )
    if source_of(conf).read is None and conf.path is not None:
        raise ValueError(f"source {conf.source!r} is synthetic and reads no path; got path={conf.path!r}")
    if "{question}" not in args.get("asked", "{question}"):
        raise ValueError(f"args.asked={args['asked']!r} lacks {{question}}, the place of the question")
    depths = args["depths"]
    if depths is not None and not (depths and all(0 <= float(depth) <= 1 for depth in depths)):
        raise ValueError(f"args.depths={depths} must be a list of positions from 0 (start) to 1 (end)")
    return args


def draw_context(conf: ExamplesConf, index: int, stream: str, size: int | None = None) -> list[Example]:
    """Context `index` of a synthetic source: `conf.questions` examples that share their documents.

    size: units of a source that draws its whole context; None: the least it can have.
    """
    task, args = SYNTHETIC[conf.source], source_args(conf)
    rng = stream_rng(stream, conf.seed, conf.source, "draw", index)
    prefix = f"{conf.source}-{index:05d}"
    if task.least is None:
        return task.draw(args, conf.questions, rng, prefix)
    grid = args["depths"]
    depth = float(grid[index % len(grid)]) if grid else rng.random()
    return task.draw(args, conf.questions, rng, prefix, size=task.least if size is None else size, depth=depth)


def load(conf: ExamplesConf, stream: str = "evaluation") -> Loaded:
    """All examples of `conf`, in the order of the file, and their origin; `limit` contexts of a synthetic source.

    Raises DataRowError (file, line, column) for a malformed row, ValueError for an unknown source, split or argument,
    ConnectionError when the hub cannot be reached, FileNotFoundError for a path that does not exist.
    """
    conf = plain_conf(conf)
    source, args = source_of(conf), source_args(conf)
    if source.read is None:
        count = SYNTHETIC_SAMPLES if conf.limit is None else conf.limit
        drawn = [example for index in range(count) for example in draw_context(conf, index, stream)]
        return Loaded(drawn, f"synthetic {conf.source}")
    located = locate(conf.path or source.path, conf.split)
    examples: list[Example] = []
    shared: dict[Document, Document] = {}  # a paragraph's questions share one object
    for row in read_rows(located, args["config"], args["revision"]):
        example = source.read(row, **{name: args[name] for name in source.reads})
        if examples and bool(example.documents) != bool(examples[0].documents):
            row.fail("documents", "some rows have documents and others none: put them into separate files (parts)")
        if example.messages and (args["asked"], args["answer_prefix"]) != ("{question}", ""):
            row.fail(
                "messages", "a conversation is worded as it is: args.asked and args.answer_prefix are of questions"
            )
        documents = tuple(shared.setdefault(document, document) for document in example.documents)
        examples.append(replace(example, documents=documents, answer_prefix=args["answer_prefix"]))
    if not examples:
        raise ValueError(f"{located.origin} has no rows")
    return Loaded(examples, located.origin)


def load_examples(conf: ExamplesConf) -> list[Example]:
    """The examples of `load`, without their origin."""
    return load(conf).examples
