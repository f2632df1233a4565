"""The suite's wording is RULER's, as lm-eval has it: read from its sources, for importing them wants the network."""

import ast
import importlib.util
import random
import re
from pathlib import Path

import pytest

from lrsa.data import SampleSet
from lrsa.data.wordlists import REPEATED_NOISE
from tests.data.test_suite import parts, task


@pytest.fixture(scope="module")
def ruler() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-eval is not installed (extra `eval`): its wording of RULER was not compared")
    return Path(found.origin).parent / "tasks" / "ruler"


def constants(file: Path) -> dict:
    """Literals assigned at the top of a module."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def words(text: str) -> str:
    return " ".join(text.split())


def asked(name: str, tokenizer, **changes) -> tuple[str, str, str, dict]:
    """Text before the haystack begins, the question with the answer's beginning, the context, and the source's args."""
    data = SampleSet(task(name, limit=1, **changes), tokenizer, 2100)
    context, question, _ = parts(data[0], tokenizer)
    said = question.replace("<|im_end|>\n<|im_start|>assistant\n", " ")
    return words(data.examples_of(0)[0].opening or data.args["instruction"]), words(said), context, data.args


@pytest.mark.parametrize(
    ("name", "kind", "single"),
    [
        ("ruler_niah_single_1", "numbers", True),
        ("ruler_niah_multikey_3", "uuids", True),
        ("ruler_niah_multivalue", "numbers", False),
        ("ruler_niah_multiquery", "numbers", False),
    ],
)
def test_needles(name: str, kind: str, single: bool, ruler: Path, bytes_tokenizer) -> None:
    template = constants(ruler / "niah_utils.py")["TEMPLATE"]
    source = (ruler / "prepare_niah.py").read_text(encoding="utf-8")
    if single:  # what prepare_niah.py does to it
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            assert f'template.replace("{old}", "{new}")' in source
            template = template.replace(old, new)
    before, question = template.format(
        type_needle_v=kind.removesuffix("s") if single else kind, context="|", query="QUERY"
    ).split("|")
    opening, said, context, _ = asked(name, bytes_tokenizer)
    query = said.rpartition(" mentioned in")[0].rpartition(" for ")[2]
    assert opening == words(before)
    verb = "is" if single else "are"
    assert f'for {{query}} mentioned in the provided text {verb}"' in source
    kind = kind.removesuffix("s") if single else kind
    prefix = f"The special magic {kind} for {query} mentioned in the provided text {verb}"
    assert said == f"{words(question).replace('QUERY', query)} {prefix}"
    needle = constants(ruler / "prepare_niah.py")["NEEDLE"]
    assert needle.format(type_needle_v="|", key="|", value="|") == "One of the special magic | for | is: |."
    assert "One of the special magic " in context
    assert (REPEATED_NOISE in source) and (REPEATED_NOISE in context) == (name == "ruler_niah_single_1")


def test_variable_tracking(ruler: Path, bytes_tokenizer) -> None:
    theirs = constants(ruler / "vt_utils.py")["CONFIG"]["variable_tracking"]
    opening, said, context, _ = asked("ruler_vt", bytes_tokenizer)
    value = said.partition("the value ")[2].partition(" ")[0]
    before, question = theirs["template"].format(context="|", query=value).split("|")
    assert opening.startswith(words(before)) and opening.endswith(words(before)), "once for the worked example"
    assert said == words(f"{question} {theirs['answer_prefix'].format(num_v=5, query=value)}")
    assert REPEATED_NOISE in context


@pytest.mark.parametrize(("name", "file"), [("ruler_cwe", "cwe_utils.py"), ("ruler_fwe", "fwe_utils.py")])
def test_words(name: str, file: str, ruler: Path, bytes_tokenizer) -> None:
    theirs = constants(ruler / file)["CONFIG"]
    before, question = theirs["template"].format(context="|", query="").split("|")
    opening, said, _, _ = asked(name, bytes_tokenizer)
    assert opening.endswith(words(before))
    assert said == words(f"{question} {theirs['answer_prefix']}")


def test_question_answering(ruler: Path, bytes_tokenizer, squad_folder) -> None:
    theirs = constants(ruler / "qa_utils.py")["CONFIG"]
    before, question = theirs["template"].format(context="|", query="QUERY").split("|")
    opening, said, _, args = asked("ruler_qa_1", bytes_tokenizer, path=str(squad_folder))
    query = said.rpartition("Question: ")[2].removesuffix(f" {theirs['answer_prefix']}")
    assert opening == words(before) and args["answer_prefix"] == theirs["answer_prefix"]
    assert said == f"{words(question).replace('QUERY', query)} {theirs['answer_prefix']}"


def masked(text: str) -> str:
    """What is drawn as one sign each: names of variables, numbers, keys of two words, UUIDs."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uuid>", text)
    text = re.sub(r"\b[A-Z]{3}\b(?<!VAR)|\b[A-Z]{5}\b", "<name>", text)
    return re.sub(r"\b[a-z]+-[a-z]+\b", "<key>", re.sub(r"\b\d{5,}\b", "<number>", text))


def written(name: str, tokenizer, length: int, **args) -> str:
    """The user's turn to the blank, and after a bar what the answer begins with."""
    sample = SampleSet(task(name, limit=1, args=args), tokenizer, length)[0]
    text = tokenizer.decode(sample.input_ids[: sample.answer_spans[0][0]])
    return text.partition("user\n")[2].replace("<|im_end|>\n<|im_start|>assistant\n", "|")


def test_variable_tracking_to_the_blank(ruler: Path, bytes_tokenizer) -> None:
    """Against the text that lm-eval's own code writes. Ours is filled up to T with the end of a line of noise."""
    pytest.importorskip("lm_eval.tasks.ruler.vt_utils")
    from lm_eval.tasks.ruler import vt_utils

    random.seed(0)
    shot, shot_names = vt_utils.generate_input_output(10, 1, 4, is_icl=True)
    text, _ = vt_utils.generate_input_output(30, 1, 4, is_icl=False)
    worked = shot + " " + " ".join(shot_names) + "\n\n"  # as sys_vartrack_w_noise_random has it
    user, prefix = (worked + "\n\n" + text).rsplit(" Answer:", 1)
    ours, begun = written("ruler_vt", bytes_tokenizer, 5000).split("|")
    assert masked(begun) == masked("Answer:" + prefix.rstrip())
    mine, theirs = (masked(one).rsplit("Memorize and track", 1) for one in (ours, user))
    assert sorted(mine[0].split("\n")) == sorted(theirs[0].split("\n")), "the worked example, wherever its names stand"
    lines, expected = (one[1].split("\n") for one in (mine, theirs))
    first = lines.index("") + 1
    assert f" {REPEATED_NOISE}".endswith(lines[first]) or f"{REPEATED_NOISE}".endswith(lines[first].lstrip())
    del lines[first], expected[first]
    assert set(lines) == set(expected) and lines[-2:] == expected[-2:] and lines[:first] == expected[:first]


@pytest.mark.parametrize("name", ["ruler_niah_single_1", "ruler_niah_multikey_2", "ruler_niah_multikey_3"])
def test_needles_to_the_blank(name: str, ruler: Path, bytes_tokenizer) -> None:
    """A line a needle or a line of noise, as `"\\n".join(sentences)` has it, between the template's line breaks."""
    assert 'context = "\\n".join(sentences)' in (ruler / "prepare_niah.py").read_text(encoding="utf-8")
    kind = "uuid" if name.endswith("3") else "number"
    template = constants(ruler / "niah_utils.py")["TEMPLATE"]
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template = template.replace(old, new)
    ours, begun = written(name, bytes_tokenizer, 3000).split("|")
    first, *lines, question = masked(ours).split("\n")
    key = "<uuid>" if name.endswith("3") else "<key>"
    given = template.format(type_needle_v=kind, context="...", query=key).split("\n")
    assert (first, question) == (given[0], given[2])
    assert begun == f"The special magic {kind} for {masked_back(begun)} mentioned in the provided text is"
    needle = f"One of the special magic {kind}s for {key} is: <{kind}>."
    allowed = {needle} | ({REPEATED_NOISE} if name == "ruler_niah_single_1" else set())
    start = next(number for number, line in enumerate(lines) if line in allowed)
    assert start <= 3 and sum(map(len, lines[:start])) < 130, "what fills up to T"
    assert set(lines[start:]) == allowed


def masked_back(begun: str) -> str:
    return begun.partition(" for ")[2].partition(" mentioned")[0]


def test_labels_are_said_once_in_a_plain_prompt(bytes_tokenizer) -> None:
    data = SampleSet(task("ruler_vt", limit=1, prompt="plain"), bytes_tokenizer, 2100)
    sample = data[0]
    text = bytes_tokenizer.decode(sample.input_ids[sample.context_length : sample.answer_spans[0][0]])
    assert text.lstrip().startswith("Question: Find all") and text.count("Question:") == text.count("Answer:") == 1
