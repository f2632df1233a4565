"""Sources of examples: hub data sets, one's own JSONL, questions made from their passages, and the synthetic tasks.

To add one: a function and a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf

from lrsa.config import ExamplesConf
from lrsa.data.adapters import read_hotpotqa, read_musique, read_narrativeqa, read_squad, read_two_wiki
from lrsa.data.cloze import CLOZE_ARGS, ask_cloze
from lrsa.data.continuation import CONTINUATION_ARGS, ask_continuation
from lrsa.data.examples import Document, Example, stream_rng
from lrsa.data.filler import read_books
from lrsa.data.folds import fold_of, split_and_fold
from lrsa.data.passages import Questions
from lrsa.data.rows import Row, locate, read_rows
from lrsa.data.synthetic import SYNTHETIC

SYNTHETIC_SAMPLES = 200  # contexts of a synthetic source whose `limit` is not set (a training stream never ends)

QA_INSTRUCTION = "Read the documents and answer the questions. Reply with the answer alone, in a few words."

# Arguments that decide how a sample is laid out; see lrsa.data.assembly.
LAYOUT_ARGS: dict[str, Any] = {"instruction": QA_INSTRUCTION, "depths": None}
# How a question is put, in addition to the prompt's own form, and what the answer is made to begin with.
WORDING_ARGS: dict[str, Any] = {"asked": "{question}", "answer_prefix": ""}
PASSAGES_ARGS: dict[str, Any] = {**LAYOUT_ARGS, "titles": False, "max_distractors": None}
DOCUMENT_ARGS: dict[str, Any] = {**PASSAGES_ARGS, **WORDING_ARGS}
HUB_ARGS: dict[str, Any] = {"config": None, "revision": None}
DOCUMENT_FIELDS = ("title", "text", "is_supporting")  # of one's own rows


@dataclass(frozen=True)
class Loaded:
    """Examples and the short name of where they came from; `documents` are all that they have, each once."""

    examples: Sequence[Example]
    origin: str
    documents: Sequence[Document] = ()

    def rows(self) -> list[str]:
        """What the examples follow from, for a fingerprint: all of them, or passages and the first few questions."""
        if isinstance(self.examples, Questions):
            return [repr(part) for part in (*self.documents, *self.examples[:3], len(self.examples))]
        return [repr(example) for example in self.examples]


@dataclass(frozen=True)
class Source:
    """`read` turns one row into an example, or `ask(documents, args, key of a random stream)` makes questions about the
    passages of another source, `args.over`; neither, and it is synthetic, or running text without questions (`prose`).
    `args` are the arguments the source takes, with their defaults.

    `reads` names the arguments that have a set of valid values; `read` takes them besides the row.
    """

    read: Callable[..., Example] | None
    args: dict[str, Any]
    path: str | None = None  # default
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ask: Callable[[Sequence[Document], dict[str, Any], tuple[object, ...]], Questions] | None = None
    prose: bool = False

    @property
    def synthetic(self) -> bool:
        """Whether its examples are drawn without any data."""
        return self.read is None and self.ask is None and not self.prose


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


PROSE = "Salesforce/wikitext:wikitext-2-raw-v1"
_ROWS: dict[str, Source] = {
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
}
_OVER = {"over": (*_ROWS, "prose")}
SOURCES: dict[str, Source] = {
    **_ROWS,
    "cloze": Source(None, {**PASSAGES_ARGS, **CLOZE_ARGS}, reads=_OVER, ask=ask_cloze),
    "continuation": Source(None, {**PASSAGES_ARGS, **CONTINUATION_ARGS}, reads=_OVER, ask=ask_continuation),
    "prose": Source(None, {"targets": 256}, PROSE, prose=True),
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
    if source_of(conf).synthetic and conf.path is not None:
        raise ValueError(f"source {conf.source!r} is synthetic and reads no path; got path={conf.path!r}")
    if "{question}" not in args.get("asked", "{question}"):
        raise ValueError(f"args.asked={args['asked']!r} lacks {{question}}, the place of the question")
    over = args.get("over")
    if over in SOURCES and not SOURCES[over].prose and (conf.path or SOURCES[over].path) is None:
        raise ValueError(f"args.over={over!r} needs a path: a hub name, a local folder or a file")
    if over == "prose" and conf.filler is not None:
        raise ValueError(
            f"filler={conf.filler!r} might repeat what source {conf.source!r} asks about: with args.over=prose set "
            "filler=null, for other books' paragraphs fill the context"
        )
    if source_of(conf).prose:
        _check_prose(conf, args)
    depths = args.get("depths")
    if depths is not None and not (depths and all(0 <= float(depth) <= 1 for depth in depths)):
        raise ValueError(f"args.depths={depths} must be a list of positions from 0 (start) to 1 (end)")
    return args


def _check_prose(conf: ExamplesConf, args: dict[str, Any]) -> None:
    if not isinstance(args["targets"], int) or args["targets"] < 1:
        raise ValueError(f"args.targets={args['targets']!r} must be a whole number of tokens, at least 1")
    if conf.questions != 1 or conf.filler is not None:
        raise ValueError(
            f"questions={conf.questions}, filler={conf.filler!r}: source 'prose' is running text alone, without "
            "questions or filler; set questions=1 and filler=null"
        )


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

    `split` names a file's split or, `train[fit]` and `train[dev]`, one side of it (`lrsa.data.folds`).

    Raises DataRowError (file, line, column) for a malformed row, ValueError for an unknown source, split or argument,
    ConnectionError when the hub cannot be reached, FileNotFoundError for a path that does not exist.
    """
    conf = plain_conf(conf)
    source, args = source_of(conf), source_args(conf)
    if source.prose:
        raise ValueError(f"source {conf.source!r} has no examples: it is for training, as data.parts.<name>")
    if source.ask is not None:
        passages = _passages(conf, args)
        questions = source.ask(passages.documents, args, (stream, conf.seed))
        return replace(passages, examples=questions)
    if source.read is None:
        count = SYNTHETIC_SAMPLES if conf.limit is None else conf.limit
        drawn = [example for index in range(count) for example in draw_context(conf, index, stream)]
        return Loaded(drawn, f"synthetic {conf.source}")
    split, fold = split_and_fold(conf.split)
    located = locate(conf.path or source.path, split)
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
    if fold is None:
        return Loaded(examples, located.origin, list(shared))
    chosen = fold_of(examples, fold)
    if not chosen:
        raise ValueError(f"{located.origin} has nothing for split={conf.split!r}: all its articles are one group")
    return Loaded(chosen, f"{located.origin} [{fold}]", list({d: d for e in chosen for d in e.documents}))


def _passages(conf: ExamplesConf, args: dict[str, Any]) -> Loaded:
    """Documents of the source `args.over`, each text once, all of them gold where they are asked about; no examples."""
    over, without = args["over"], args["without"]
    if over == "prose" and without is not None:
        raise ValueError(f"args.without={without!r} is a split of rows; of prose, split={conf.split!r} holds books out")
    if over == "prose":
        books, origin = read_books(f"{conf.path or PROSE}@{conf.split}")
        found = [Document(book.title, " ".join(paragraph)) for book in books for paragraph in book.paragraphs]
    else:
        loaded = load(ExamplesConf(source=over, path=conf.path, split=conf.split))
        found, origin = [replace(d, is_supporting=True) for d in loaded.documents], loaded.origin
        if without is not None:
            tested = {d.group for d in load(ExamplesConf(source=over, path=conf.path, split=without)).documents}
            found, origin = [d for d in found if d.group not in tested], f"{origin} without {without}'s articles"
    if not found:
        raise ValueError(f"{origin} has no documents to ask about")
    return Loaded([], origin, list({document.text: document for document in found}.values()))


def load_examples(conf: ExamplesConf) -> list[Example]:
    """The examples of `load`, without their origin."""
    return list(load(conf).examples)
