"""The suite drawn again: in other processes, under other Pythons, from the cache; the same to the bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lrsa.data import SampleSet, build_samples, content_hash
from lrsa.data.tokens import digest
from tests.data.test_suite import SYNTHETIC, task

# Drawn texts need nothing but the standard library; `lrsa` and `lrsa.data` import more, so stand-ins lead to their
# modules. argv: folder of the package, tasks as {name: [source, args, sizes]}.
DRAWS = """
import hashlib, json, random, sys, types
for name in ("lrsa", "lrsa.data"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
from lrsa.data.examples import stream_rng
from lrsa.data.synthetic import SYNTHETIC
found = {}
for name, (source, args, seed) in json.loads(sys.argv[2]).items():
    task = SYNTHETIC[source]
    drawn = []
    for index in range(5):
        for size in ([None] if task.least is None else [task.least, 3 * task.least + 40]):
            rng = stream_rng("evaluation", seed, source, "draw", index)
            more = {} if size is None else {"size": size, "depth": rng.random()}
            drawn += task.draw({"depths": None, **task.args, **args}, 1, rng, source, **more)
    text = json.dumps([[str(part) for part in vars(example).values()] for example in drawn])
    found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
print(json.dumps([sys.version_info[:2], hash("lrsa"), found]))
"""
# What the texts were when they were written. They may change with the tasks alone: then raise `assembly.RULE`.
KNOWN = json.loads((Path(__file__).parent / "suite_draws.json").read_text(encoding="utf-8"))


def drawn_by(
    python: str, repository: Path, seed: int = 0, hash_seed: str = "0"
) -> tuple[list[int], int, dict[str, str]]:
    tasks = {}
    for name in SYNTHETIC:
        conf = task(name)
        tasks[name] = [conf.source, {key: value for key, value in conf.args.items() if key != "depths"}, seed]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-I", "-c", DRAWS, str(repository), json.dumps(tasks)]
    if hash_seed != "0":
        command.remove("-I")  # which reads no PYTHONHASHSEED
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, hashed, found = json.loads(done.stdout)
    return version, hashed, found


def other_pythons() -> list[str]:
    """Interpreters >= 3.11 other than this one: on the path, or pyenv's."""
    names = [f"python3.{minor}" for minor in range(11, 16)]
    places = [shutil.which(name) for name in names]
    places += [str(path) for name in names for path in sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}"))]
    found: dict[str, str] = {}
    for place in filter(None, places):
        said = subprocess.run([place, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() != str(sys.version_info[:2]):
            found.setdefault(said.stdout, place)
    return list(found.values())


def test_texts_are_known_and_do_not_depend_on_the_hash_seed(repository) -> None:
    version, first_hash, first = drawn_by(sys.executable, repository, hash_seed="1")
    _, second_hash, second = drawn_by(sys.executable, repository, hash_seed="2")
    assert tuple(version) == sys.version_info[:2] and first_hash != second_hash, "the processes did hash differently"
    assert first == second == KNOWN, "drawn elsewhere, the suite was another one: see KNOWN"
    _, _, other = drawn_by(sys.executable, repository, seed=1)
    assert not set(other.values()) & set(first.values()), "another seed draws other texts"


def test_texts_do_not_depend_on_the_python(repository) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python >= 3.11 on this machine: the suite's texts were compared under this one alone")
    for python in pythons:
        version, _, found = drawn_by(python, repository)
        assert tuple(version) != sys.version_info[:2] and found == KNOWN, python


SAMPLES = """
import json, sys
from lrsa.data import SampleSet, content_hash
from tests.data.conftest import byte_level
from tests.data.test_suite import SYNTHETIC, task
found = {}
for name in SYNTHETIC:
    data = SampleSet(task(name, limit=2), byte_level(), 2100)
    found[name] = [data.fingerprint, content_hash(list(data))]
print(json.dumps([hash("lrsa"), found]))
"""


def test_samples_are_the_same_in_another_process(repository, tmp_path, capsys) -> None:
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    env["LRSA_CACHE"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SAMPLES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    hash_there, there = json.loads(done.stdout)
    exec(SAMPLES, {})
    hash_here, here = json.loads(capsys.readouterr().out)
    assert here == there and hash_here != hash_there
    assert len({content for _, content in here.values()}) == len(SYNTHETIC)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", ["ruler_niah_multiquery", "kv_retrieval", "babi_qa2"])
def test_samples_are_built_once(name, bytes_tokenizer, tmp_path, monkeypatch, caplog) -> None:
    data = SampleSet(task(name, limit=3), bytes_tokenizer, 1500, cache_dir=tmp_path)
    seen: list[tuple[int, int]] = []
    built = build_samples(data, lambda *found: seen.append(found))
    assert built == list(data) and seen == [(1, 1500)] * 3
    (file,) = tmp_path.glob("samples/*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(SampleSet, "sample", lambda *_: pytest.fail("built again"))
        again = build_samples(SampleSet(task(name, limit=3), bytes_tokenizer, 1500, cache_dir=tmp_path))
    assert again == built and content_hash(again) == content_hash(built) and not caplog.records

    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["ids"][700] += 1
    np.savez(file, **arrays)
    assert build_samples(data) == built and "its content is not what was written" in caplog.text
    caplog.clear()
    file.write_bytes(file.read_bytes()[:200])
    assert build_samples(data) == built and "building them again" in caplog.text
    assert len(list(tmp_path.glob("samples/*.npz"))) == 1
    build_samples(SampleSet(task(name, limit=2), bytes_tokenizer, 1500, cache_dir=tmp_path))
    assert len(list(tmp_path.glob("samples/*.npz"))) == 2, "other settings, another file"


def test_edited_code_reads_no_old_samples(bytes_tokenizer, tmp_path, monkeypatch) -> None:
    from lrsa.data import built

    data = SampleSet(task("babi_qa1", limit=1), bytes_tokenizer, 1500, cache_dir=tmp_path)
    build_samples(data)
    monkeypatch.setattr(built, "_code", lambda: digest(["another"]))
    build_samples(data)
    assert len(list(tmp_path.glob("samples/*.npz"))) == 2


def test_content_hash_sees_everything(bytes_tokenizer) -> None:
    from dataclasses import fields, replace

    (sample,) = SampleSet(task("ruler_vt", limit=1), bytes_tokenizer, 1500)
    changes = {
        "id": "x",
        "input_ids": [5, *sample.input_ids[1:]],
        "answer_spans": [(0, 1)],
        "question_ids": ("x",),
        "answers": (("x",),),
        "gold_depth": (0.5,),
        "length": 1,
        "context_length": 1,
        "all_answers": not sample.all_answers,
        "joined_by": "x",
    }
    assert set(changes) == {field.name for field in fields(sample)}
    hashes = {content_hash([replace(sample, **{name: value})]) for name, value in changes.items()}
    assert len(hashes | {content_hash([sample])}) == len(changes) + 1
    assert re.fullmatch("[0-9a-f]{64}", content_hash([sample]))
