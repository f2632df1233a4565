"""Rows of hub data sets to examples, one function a schema: columns, nested ones too, as `datasets` gives them.

To add one: a function here, a line in `lrsa.data.sources.SOURCES`, a YAML in `conf/task`; see the table in README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrsa.data.examples import Document, Example
from lrsa.data.rows import Row


def read_squad(row: Row) -> Example:
    """A row of `rajpurkar/squad`: id, title (optional), context, question, answers{text}."""
    title = row.text("title", default="").replace("_", " ")
    document = Document(title, row.text("context"))
    answers = tuple(dict.fromkeys(answer.strip() for answer in row.texts("answers.text")))
    return Example(row.text("id"), row.text("question").strip(), answers, (document,), document.group)


def read_hotpotqa(row: Row) -> Example:
    """A row of `hotpotqa/hotpot_qa`: id, question, answer, supporting_facts{title}, context{title, sentences}."""
    # its sentences bring the space before them along
    return _titled_sentences(row, row.text("id"), "".join)


def read_two_wiki(row: Row) -> Example:
    """A row of `framolfese/2WikiMultihopQA` (Ho et al. 2020, arXiv 2011.01060): HotpotQA's columns; id or _id.

    Its sentences have no space between them, which is put there. The test split hides its answers.
    """
    return _titled_sentences(row, row.text("_id" if "_id" in row.data else "id"), " ".join)


def _titled_sentences(row: Row, identity: str, join: Callable[[Sequence[str]], str]) -> Example:
    titles = row.texts("context.title")
    sentences = row.data["context"].get("sentences")
    well_formed = isinstance(sentences, list) and all(
        isinstance(one, list) and all(isinstance(sentence, str) for sentence in one) for one in sentences
    )
    if not well_formed or len(sentences) != len(titles):
        row.fail("context.sentences", f"expected one list of strings for each of {len(titles)} titles")
    supporting = set(row.texts("supporting_facts.title"))
    texts = [join(one).strip() for one in sentences]
    found = {title for title, text in zip(titles, texts, strict=True) if text}
    if not supporting <= found:
        row.fail("supporting_facts.title", f"{sorted(supporting - found)} is not among context.title, or has no text")
    documents = tuple(
        Document(title, text, title in supporting) for title, text in zip(titles, texts, strict=True) if text
    )
    return Example(identity, row.text("question").strip(), (row.text("answer").strip(),), documents)


def read_musique(row: Row) -> Example:
    """A row of `dgslibisey/MuSiQue` (Trivedi et al. 2022, arXiv 2108.00573): id, question, answer, answer_aliases,
    answerable, paragraphs[{title, paragraph_text, is_supporting}].

    Unanswerable rows, of MuSiQue-Full, are refused: what they need has been taken out of their paragraphs.
    """
    if row.data.get("answerable") is False:
        row.fail("answerable", "is false, so no paragraph holds the answer: keep the answerable rows (MuSiQue-Ans)")
    documents = []
    for entry in row.objects("paragraphs"):
        supporting = entry.data.get("is_supporting")
        if not isinstance(supporting, bool):
            entry.fail("is_supporting", f"expected true or false, got {supporting!r:.60}")
        documents.append(Document(entry.text("title").strip(), entry.text("paragraph_text").strip(), supporting))
    if not any(document.is_supporting for document in documents):
        row.fail("paragraphs", "none has is_supporting: true")
    aliases = row.texts("answer_aliases") if row.data.get("answer_aliases") else []
    answers = tuple(dict.fromkeys(answer.strip() for answer in (row.text("answer"), *aliases)))
    return Example(row.text("id"), row.text("question").strip(), answers, tuple(documents))


def read_narrativeqa(row: Row, text: str) -> Example:
    """A row of `deepmind/narrativeqa` (Kočiský et al. 2018, arXiv 1712.07040): document{id, text,
    summary{text, title}}, question{text}, answers[{text}].

    text: `document`, the whole book or film script (some 60,000 words on average), or its `summary`. Either is one gold
    document, which is never cut: one that does not fit T tokens is an error.
    """
    story = row.inside("document")
    summary = story.inside("summary")
    source = summary if text == "summary" else story
    document = Document(summary.text("title", default="").strip(), source.text("text").strip())
    answers = tuple(dict.fromkeys(entry.text("text").strip() for entry in row.objects("answers")))
    # a question has no id of its own
    identity = f"{story.text('id')}-{row.line}"
    return Example(identity, row.text("question.text").strip(), answers, (document,), document.group)
