"""The built-in suite: every answer follows from its context, by a solver of each task's own, at any length."""

import json
import re
from collections import Counter

import pytest
from omegaconf import OmegaConf

from lrsa.config import ExamplesConf, config_dir
from lrsa.data import ContextTooLongError, DataRowError, SampleSet
from lrsa.data.babi import LEFT, MOVED, TOOK
from lrsa.data.examples import target_text
from lrsa.data.placement import largest_size
from lrsa.data.sources import draw_context, load
from lrsa.evaluation.string_match import string_match
from tests.data.conftest import squad_rows, write_rows

TASKS = config_dir() / "task"
QA = ("ruler_qa_1", "ruler_qa_2")
SUITE = [name for group in ("ruler", "suite") for name in OmegaConf.load(TASKS / f"{group}.yaml").defaults]
SYNTHETIC = [name for name in SUITE if name not in (*QA, "ruler")]


def task(name: str, **changes) -> ExamplesConf:
    """The YAML's task, in built-in sentences where it asks for the hub's prose."""
    conf = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ExamplesConf), OmegaConf.load(TASKS / f"{name}.yaml"))
    )
    assert isinstance(conf, ExamplesConf)
    conf.filler = conf.filler if conf.filler == "repeat" else None
    if name == "ruler_cwe":
        conf.args |= {"common_repeats": 6, "uncommon_repeats": 1}  # RULER's below 4,096 tokens
    conf.args |= changes.pop("args", {})
    for key, value in changes.items():
        setattr(conf, key, value)
    return conf


def parts(sample, tokenizer) -> tuple[str, str, str]:
    """Context, question with the answer's beginning, and target, as text."""
    (start, stop), whole = sample.answer_spans[0], sample.input_ids
    pieces = (whole[: sample.context_length], whole[sample.context_length : start], whole[start:stop])
    context, question, target = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in pieces)
    return context, question, target


# ---------------------------------------------------------------- a solver a kind of task: text -> the answers


def solve_needles(context: str, question: str) -> list[str]:
    asked = re.search(r"special magic \w+ for (.*) mentioned", question)[1]
    keys = asked.replace(", and ", ", ").split(", ")
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
    return [value for key in keys for name, value in found if name == key]


def solve_vt(context: str, question: str) -> list[str]:
    """Reads in order: a chain out of order, or the worked example's names, would not be found."""
    value = re.search(r"assigned the value (\d+)", question)[1]
    holds: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", context):
        holds[name] = source if source.isdigit() else holds[source]
    return [name for name, held in holds.items() if held == value]


def solve_cwe(context: str, question: str) -> list[str]:
    listed = re.findall(r"(\d+)\. (\S+)", context.rpartition("the ones that appear most often.")[2])
    assert [int(number) for number, _ in listed] == [*range(1, len(listed) + 1)]
    counts = Counter(word for _, word in listed).most_common()
    assert {count for _, count in counts[:10]} == {6} and {count for _, count in counts[10:]} == {1}
    return [word for word, _ in counts[:10]]


def solve_fwe(context: str, question: str) -> list[str]:
    counts = Counter(context.rpartition("\n\n")[2].split()).most_common()
    assert counts[0][0] == "..." and counts[3][1] > counts[4][1], "the third of the words is clear of the fourth"
    return [word for word, _ in counts[1:4]]


def solve_kv(context: str, question: str) -> list[str]:
    return [json.loads(context[context.index("{") :])[re.search(r'Key: "(\S+)"', question)[1]]]


def solve_passkey(context: str, question: str) -> list[str]:
    return [re.search(r"The pass key is (\d{64})\. Remember it", context)[1]]


def solve_babi(context: str, question: str) -> list[str]:
    """Follows people and things through the story, with no memory of how it was drawn."""
    verbs = {"move": MOVED, "take": TOOK, "leave": LEFT}
    kinds = {verb: kind for kind, group in verbs.items() for verb in group}
    place: dict[str, str] = {}
    held: dict[str, str] = {}
    seen: dict[str, list[str]] = {}
    told = re.findall(rf"(Mary|John|Sandra|Daniel) ({'|'.join(map(re.escape, kinds))}) the (\w+)\.", context)
    for who, verb, what in told:
        if kinds[verb] == "move":
            place[who] = what
        elif kinds[verb] == "take":
            assert what not in held, "nobody takes what another holds"
            assert not seen.get(what) or seen[what][-1] == place[who], "nor what is elsewhere"
            held[what] = who
        else:
            assert held.pop(what) == who
        for thing, holder in held.items():
            if seen.setdefault(thing, [""])[-1] != place[holder]:
                seen[thing].append(place[holder])
    if match := re.search(r"Where was the (\w+) before the (\w+)\?", question):
        assert seen[match[1]].count(match[2]) == 1, "one before"
        return [seen[match[1]][seen[match[1]].index(match[2]) - 1]]
    what = re.search(r"Where is (?:the )?(\w+)\?", question)[1]
    return [place[what] if what in place else seen[what][-1]]


SOLVERS = {
    "ruler_vt": solve_vt,
    "ruler_cwe": solve_cwe,
    "ruler_fwe": solve_fwe,
    "kv_retrieval": solve_kv,
    "passkey64": solve_passkey,
    **{f"babi_qa{number}": solve_babi for number in (1, 2, 3)},
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_answer_follows_from_its_context(name: str, bytes_tokenizer) -> None:
    length = 2100
    data = SampleSet(task(name, limit=4), bytes_tokenizer, length)
    seen = set()
    for sample in data:
        assert len(sample.input_ids) == sample.length == length == sample.answer_spans[0][1]
        assert len(sample.gold_depth) >= 1 and all(0 <= depth <= 1 for depth in sample.gold_depth)
        context, question, target = parts(sample, bytes_tokenizer)
        (answers,) = sample.answers
        solved = SOLVERS.get(name, solve_needles)(context, question)
        assert solved == list(answers) if name != "ruler_cwe" else sorted(solved) == sorted(answers)
        copied = target.removesuffix("<|im_end|>").strip()
        assert copied == target_text(answers, sample.all_answers, sample.joined_by)
        assert string_match(copied, answers, sample.all_answers) == 1
        assert string_match("", answers, sample.all_answers) == 0
        seen.add(tuple(sample.input_ids))
    assert len(seen) == 4


@pytest.mark.parametrize("length", [1500, 1777, 3000])
@pytest.mark.parametrize(
    "name", ["ruler_niah_single_1", "ruler_niah_multikey_3", "ruler_fwe", "babi_qa2", "kv_retrieval"]
)
def test_any_length_is_met_to_the_token(name: str, length: int, bytes_tokenizer) -> None:
    assert {len(sample.input_ids) for sample in SampleSet(task(name, limit=2), bytes_tokenizer, length)} == {length}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_floor_asks_the_same_without_the_context(name: str, bytes_tokenizer) -> None:
    conf = task(name, limit=2)
    full, floor = SampleSet(conf, bytes_tokenizer, 2100), SampleSet(conf, bytes_tokenizer, None, context=False)
    for with_context, without in zip(full, floor, strict=True):
        assert (without.id, without.answers, without.context_length) == (with_context.id, with_context.answers, 0)
        (start, stop), (first, last) = with_context.answer_spans[0], without.answer_spans[0]
        assert with_context.input_ids[start:stop] == without.input_ids[first:last]
        (value, *_), text = with_context.answers[0], bytes_tokenizer.decode(without.input_ids[:first])
        assert value not in text, "nothing of the context is left, nor of its worked example"


@pytest.mark.parametrize("name", SYNTHETIC)
def test_other_seeds_and_streams_give_other_data(name: str, bytes_tokenizer) -> None:
    base = SampleSet(task(name), bytes_tokenizer, 2100)
    for other in (
        SampleSet(task(name, seed=1), bytes_tokenizer, 2100),
        SampleSet(task(name), bytes_tokenizer, 2100, stream="train/x/0"),
    ):
        assert other.fingerprint != base.fingerprint and other[0].input_ids != base[0].input_ids
        assert name.startswith("babi") or other[0].answers != base[0].answers


@pytest.mark.parametrize("source", ["niah_haystack", "cwe", "fwe", "kv"])
def test_a_sized_context_is_as_large_as_fits(source: str, bytes_tokenizer) -> None:
    """One unit more would not have fitted, and what is missing to T is filler: less than a unit of it."""
    data = SampleSet(ExamplesConf(source=source, limit=2), bytes_tokenizer, 6000)
    for index in range(2):
        size = data._size(index)
        draws = [draw_context(data.conf, index, data.stream, size + more) for more in (0, 1)]
        fitted, larger = (
            sum(map(len, data.store.encode(data._texts(examples)) + data._documents(examples)[0])) for examples in draws
        )
        assert fitted <= 6000 < larger
        assert [example.question for example in draws[0]] == [example.question for example in draws[1]]
        assert draws[0][0].answers == draws[1][0].answers == draw_context(data.conf, index, data.stream)[0].answers


@pytest.mark.parametrize("least", [1, 16])
@pytest.mark.parametrize("unit", [1, 7, 50])
def test_largest_size(least: int, unit: int) -> None:
    asked: list[int] = []

    def tokens(size: int) -> int:
        asked.append(size)
        return 100 + unit * size + size % 3  # about linear

    for room in range(0, 3000, 37):
        asked.clear()
        found = largest_size(tokens, least, room)
        if found == least:
            assert tokens(least + 1) > room or tokens(least) > room
        else:
            assert tokens(found) <= room < tokens(found + 1)
        assert len(asked) < 40, "it is slow to ask"


@pytest.mark.parametrize("name", ["ruler_niah_single_1", "ruler_niah_multikey_2", "kv_retrieval", "passkey64"])
def test_depths_are_followed(name: str, bytes_tokenizer) -> None:
    grid = [0.0, 0.5, 1.0]
    data = SampleSet(task(name, args={"depths": grid}, limit=6), bytes_tokenizer, 3000)
    for index, sample in enumerate(data):
        assert sample.gold_depth[0] == pytest.approx(grid[index % 3], abs=0.06)


@pytest.mark.parametrize("name", ["ruler_vt", "babi_qa3", "ruler_niah_multivalue"])
def test_statements_stand_in_their_order(name: str, bytes_tokenizer) -> None:
    data = SampleSet(task(name, limit=3, args={"chains": 3} if name == "ruler_vt" else {}), bytes_tokenizer, 2100)
    for index, sample in enumerate(data):
        context, _, _ = parts(sample, bytes_tokenizer)
        texts = [document.text for document in data.examples_of(index)[0].documents]
        at = -1
        for text in texts:  # a fact may be told twice
            at = context.index(text, at + 1)
        assert list(sample.gold_depth) == sorted(sample.gold_depth)


def test_several_keys_and_values_are_all_asked_for(bytes_tokenizer) -> None:
    expected = {
        "ruler_niah_multivalue": ("What are all the special magic numbers for", 4),
        "ruler_niah_multiquery": ("What are all the special magic numbers for", 4),
        "ruler_niah_multikey_1": ("What is the special magic number for", 1),
        "ruler_niah_single_3": ("What is the special magic uuid for", 1),
    }
    for name, (wording, count) in expected.items():
        (sample,) = SampleSet(task(name, limit=1), bytes_tokenizer, 2100)
        context, question, _ = parts(sample, bytes_tokenizer)
        assert wording in question and len(set(sample.answers[0])) == count
        assert question.endswith(" is" if count == 1 else " are")
        assert ("A special magic" in context) == (count == 1)


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_ruler_question_answering(prompt: str, squad_folder, tmp_path, bytes_tokenizer) -> None:
    row = {
        "id": "h1",
        "question": "Which is {older}?",
        "answer": "Alpha",
        "supporting_facts": {"title": ["A"], "sent_id": [0]},
        "context": {"title": ["A", "B"], "sentences": [["Alpha is old."], ["Beta."]]},
    }
    write_rows(tmp_path / "validation.jsonl", [row])
    wording = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    for name, folder in zip(QA, (squad_folder, tmp_path), strict=True):
        data = SampleSet(task(name, path=str(folder), limit=1, prompt=prompt), bytes_tokenizer, 1200)
        (sample,) = data
        context, question, target = parts(sample, bytes_tokenizer)
        asked = data.examples_of(0)[0].question
        assert wording + "\n\nThe following are given documents." in context
        assert f"{wording}\n\nQuestion: {asked}" in question and question.endswith("Answer:")
        assert target == f" {sample.answers[0][0]}<|im_end|>" and not sample.all_answers
        assert f"{wording}\n\nQuestion: {{question}}" in data.template and "Answer: {answer}" in data.template
    names = {row["id"] for row in squad_rows()}
    plain = SampleSet(ExamplesConf(source="squad", path=str(squad_folder), prompt=prompt), bytes_tokenizer, 1200)
    assert plain[0].id in names and "Answer: {answer}" not in plain.template.replace("\nAnswer: ", "")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        *(
            (name, {"questions": 2}, "questions=2: a context of .* set questions: 1")
            for name in ("niah", "vt", "kv", "cwe")
        ),
        ("cwe", {"args": {"depths": [0.5]}}, r"args\.depths=\[0\.5\]: .* no one place"),
        ("fwe", {"args": {"depths": [0.5]}}, r"args\.depths=\[0\.5\]: .* no one place"),
        ("fwe", {"args": {"alpha": 1.0}}, r"args\.alpha=1\.0 must be at least 1\.5"),
        ("cwe", {"args": {"uncommon_repeats": 30}}, r"common_repeats=30 must exceed args\.uncommon_repeats=30"),
        ("niah", {"args": {"value_type": "digits"}}, "value_type='digits' is unknown; valid: words, numbers, uuids"),
        ("niah", {"args": {"keys": 0}}, r"args\.keys=0 must be a whole number, at least 1"),
        ("niah", {"args": {"keys": 10**6}}, r"args\.keys=1000000: there are \d+ words; .*uuids"),
        ("vt", {"args": {"shots": 2}}, r"args\.shots=2: 0 or 1"),
        ("vt", {"args": {"hops": 2.5}}, r"args\.hops=2\.5 must be a whole number"),
        ("babi", {"args": {"supporting": 4}}, r"args\.supporting=4 must be 1, 2 or 3"),
        ("babi", {"args": {"supporting": 3, "facts": 5}}, r"args\.facts=5 must be a whole number, at least 6"),
        ("squad", {"args": {"asked": "Question:"}}, r"args\.asked='Question:' lacks \{question\}"),
    ],
)
def test_what_cannot_be_drawn_is_refused(source: str, changes: dict, message: str, bytes_tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSet(ExamplesConf(source=source, **changes), bytes_tokenizer, 2000)


def test_conversations_are_not_reworded(tmp_path) -> None:
    messages = [{"role": "user", "content": "The sky?"}, {"role": "assistant", "content": "Is clear."}]
    file = write_rows(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataRowError, match=r"line 1, column 'messages': .*args\.answer_prefix"):
        load(ExamplesConf(source="jsonl", path=str(file), args={"answer_prefix": "Answer:"}))


def test_words_that_run_out_and_lists_that_do_not_fit(bytes_tokenizer) -> None:
    with pytest.raises(ContextTooLongError, match=r"example cwe-00000-0 .*more than length=1000"):
        SampleSet(ExamplesConf(source="cwe"), bytes_tokenizer, 1000).check(1)
    for source in ("niah_haystack", "cwe"):
        with pytest.raises(ValueError, match=r"this length takes \d+ .*there are \d+"):
            draw_context(ExamplesConf(source=source), 0, "evaluation", 10**6)
