"""What a run ran on: code version, packages, hardware. No hostname, no user name, no absolute path of the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "lrsa",
    "torch",
    "transformers",
    "lightning",
    "hydra-core",
    "datasets",
    "peft",
    "accelerate",
    "numpy",
    "wandb",
)
SOURCE = Path(__file__).resolve().parents[1]  # the lrsa package


def git_state(source: Path = SOURCE) -> dict[str, Any]:
    """`{commit, dirty}` of the checkout that tracks `source`; both None outside one (a wheel, or somebody else's
    checkout).
    """
    none: dict[str, Any] = {"commit": None, "dirty": None}
    if (
        _git(source, "ls-files", "--error-unmatch", "--", ".") is None
    ):  # site-packages inside another project's checkout
        return none
    commit = _git(source, "rev-parse", "HEAD")
    # only what a run depends on: an untracked result elsewhere does not make the code another one
    changes = _git(source, "status", "--porcelain", "--", ".", "../conf")
    return none if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def code_fingerprint(source: Path = SOURCE) -> str:
    """16 hex digits over the Python files of `source`: unlike a commit, the same until one of them is edited."""
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*.py")):
        digest.update(f"{file.relative_to(source).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Version of every package of `PACKAGES` that is installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Device name and count, its memory in bytes, CUDA version, CPU model and count, main memory in bytes.

    `devices` counts what is visible, 0 where there is no accelerator. torch is asked only if it is already imported.
    """
    facts: dict[str, Any] = {"device": "cpu", "devices": 0, "device_memory_bytes": None, "cuda": None}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return facts | {"cpu": _cpu_model(), "cpu_cores": cores, "memory_bytes": _memory(), "os": platform.system()}


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def portable(value: Any, run_folder: Path) -> Any:
    """`value` (nested lists, mappings, strings) with absolute paths of this machine replaced by what they stand for.

    `<run>` is the run folder, `<cwd>` the folder the command was started in, `<env>` the Python installation, `~` the
    home folder.
    """
    places = {
        str(run_folder.resolve()): "<run>",
        os.getcwd(): "<cwd>",
        sys.prefix: "<env>",
        sys.base_prefix: "<env>",
        str(Path.home()): "~",
    }
    known = sorted((place for place in places if len(Path(place).parts) > 1), key=len, reverse=True)
    if not known:
        return value
    # a path ends where a name ends: /data must not match inside /database or /mnt/data
    pattern = re.compile(r"(?<![\w./-])(" + "|".join(map(re.escape, known)) + r")(?![\w.-])")
    return _replaced(value, pattern, places)


def _replaced(value: Any, pattern: re.Pattern[str], places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: places[match.group(1)], value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, pattern, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, pattern, places) for item in value]
    return value
