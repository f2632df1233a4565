"""pip as a subprocess: the wheel of one distribution, for another machine than this one."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lrsa.bundle.target import Target

Runner = Callable[[list[str]], "subprocess.CompletedProcess[str]"]

_NO_WHEEL = ("No matching distribution found", "Could not find a version that satisfies")


class PipError(RuntimeError):
    """pip failed; the message ends with what it printed."""


def run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's pip with `arguments`; output is captured, the exit status is left to the caller."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _take(result: subprocess.CompletedProcess[str], made: Path, folder: Path, what: str) -> Path:
    """Move the one wheel in `made` to `folder`; PipError unless there is exactly one."""
    wheels = sorted(made.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last = "\n".join(result.stderr.strip().splitlines()[-8:])
        raise PipError(f"pip could not get {what} (exit status {result.returncode}):\n{last}")
    return Path(shutil.move(wheels[0], folder / wheels[0].name))


def fetch_wheel(requirement: str, target: Target, folder: Path, runner: Runner = run_pip) -> Path:
    """Put the wheel of `requirement` ("name==1.2") that runs on `target` into `folder` and return its path.

    A project that publishes only an sdist is built here; the result must be pure Python, since a compiled one would
    fit this machine rather than the target (PipError).
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = Path(name)
        download = ["download", "--no-deps", "--only-binary=:all:", "--dest", name, "--implementation", "cp"]
        download += ["--python-version", target.python]
        download += [option for tag in target.platform_tags for option in ("--platform", tag)]
        result = runner([*download, requirement])
        if result.returncode != 0 and any(words in result.stderr for words in _NO_WHEEL):
            result = runner(["wheel", "--no-deps", "--wheel-dir", name, requirement])
            impure = [wheel.name for wheel in made.glob("*.whl") if not wheel.stem.endswith("-none-any")]
            if impure:
                raise PipError(
                    f"{requirement} has no wheel for Python {target.python} on {target.platform}, and its sdist builds "
                    f"to {impure[0]}, which fits this machine only; build it on the target's kind of machine"
                )
        return _take(result, made, folder, requirement)


def fetch_any(requirement: str, folder: Path, runner: Runner = run_pip) -> Path:
    """Put the wheel of `requirement` into `folder`, whatever this machine is: for wheels that only carry files."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        result = runner(["download", "--no-deps", "--only-binary=:all:", "--dest", name, requirement])
        return _take(result, Path(name), folder, requirement)


def build_project(root: Path, folder: Path, runner: Runner = run_pip) -> Path:
    """Build the wheel of the checkout at `root` into `folder` and return its path."""
    if not (root / "pyproject.toml").is_file():
        raise PipError(f"no pyproject.toml in {root}: a bundle is made from a checkout (make bundle)")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        arguments = ["wheel", "--no-deps", "--wheel-dir", name]
        if importlib.util.find_spec("hatchling") is not None:  # then no build environment need be downloaded
            arguments.append("--no-build-isolation")
        return _take(runner([*arguments, str(root)]), Path(name), folder, f"the wheel of {root}")
