"""What pyproject.toml, constraints.txt, the wheel and the Makefile promise."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lrsa import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([s.operator for s in r.specifier] == ["=="] for r in found), "constraints.txt pins exact versions only"
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in found}


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_constraints_pin_each_dependency(text: str) -> None:
    requirement = Requirement(text)
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is not pinned in constraints.txt"
    assert requirement.specifier.contains(pinned), f"constraints.txt pins {pinned}, pyproject.toml says {requirement}"


def test_constraints_pin_what_they_pull_in() -> None:
    """Everything installed that lrsa needs, direct or not, is in constraints.txt."""
    missing, queue, seen = set(), [Requirement(t) for t in PROJECT["dependencies"]], set()
    while queue:
        name = canonicalize_name(queue.pop().name)
        if name in seen:
            continue
        seen.add(name)
        if name not in pins():
            missing.add(name)
        needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        queue += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    # a CUDA build of torch brings its libraries, at the versions that it names itself
    assert {n for n in missing if not n.startswith(("nvidia-", "cuda-", "triton"))} == set()


@pytest.mark.parametrize(("command", "target"), PROJECT["scripts"].items())
def test_commands_exist(command: str, target: str) -> None:
    module, function = target.split(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert path.is_file(), f"{command} points to {module}, which does not exist"
    assert f"def {function}(" in path.read_text()


def test_wheel_carries_configs_assets_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"lrsa-{__version__}-py3-none-any.whl"
    for folder in ("conf", "lrsa/assets"):
        for path in (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            assert f"lrsa/{folder.removeprefix('lrsa/')}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "lrsa/conf/train.yaml" in names
    assert {"lrsa/evaluation/tasks/_lrsa_yaml", "lrsa/evaluation/tasks/lrsa_needles.yaml"} <= set(names)
    assert {f"lrsa/results/report/page.{suffix}" for suffix in ("html", "css", "js")} <= set(names)
    assert "lrsa/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "conf/", "experiments/"))]
    assert wheel.stat().st_size < 10e6


@pytest.mark.parametrize("command", ["train", "evaluate", "table", "report"])
def test_commands_run_from_the_wheel_in_any_folder(command: str, wheel: Path, tmp_path: Path) -> None:
    """Unpacked ahead of the editable install, so that neither the checkout's code nor its conf/ is found."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = (
        f"import sys, lrsa; assert lrsa.__file__.startswith({str(tmp_path)!r}), lrsa.__file__; "
        f"from lrsa.{command} import main; sys.argv = ['lrsa-{command}', '--help']; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Powered by Hydra" in result.stdout or "== Config" in result.stdout, result.stdout
    assert not list((tmp_path / "elsewhere").iterdir()), "--help left files behind"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("target", ["demo", "test", "check", "model", "bundle"])
def test_make_targets_build_the_environment_first(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "-n", target, f"PYTHON={sys.executable}"]
    planned = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    lines = planned.splitlines()
    (install,) = [i for i, line in enumerate(lines) if "-e '.[dev]'" in line]
    uses = [
        i
        for i, line in enumerate(lines)
        if re.search(r"(^|\s)\.venv/bin/", line) and not re.search("pip install|test -x", line)
    ]
    assert "-c constraints.txt" in lines[install]
    assert uses and min(uses) > install


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_says_which_python_is_too_old(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 'error: Python >= 3.11 is needed, python3.9 is 3.9' >&2\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "venv", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "Python >= 3.11 is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()
