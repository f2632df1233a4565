"""Install from this folder, without a network:  python install.py [options of `pip install`, e.g. --target DIR]

Joins and unpacks the parts of a split bundle, checks every file against manifest.json, installs the wheels into the
Python that runs this script, and checks that what the bundle expects of this machine is there. `--check` stops before
installing. Model and data stay where they are; `. ./env.sh`, written here, tells the commands where that is.
"""

# This file travels alone: the standard library only, and nothing of lrsa.
from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
PARTS = "parts.json"


class InstallError(RuntimeError):
    """Something is missing, damaged, or made for another machine; the message says what."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, expected: dict[str, dict]) -> None:
    """Compare size and hash of each file; InstallError lists up to ten that differ or are missing."""
    wrong = []
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            wrong.append(f"{name}: sha256 differs")
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InstallError("the bundle is incomplete or damaged:\n  " + "\n  ".join(wrong[:10]) + more)


class _Joined(io.RawIOBase):
    """Files read one after the other, as one stream."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = (path.open("rb") for path in paths)
        self._current = next(self._files, None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while self._current is not None:
            count = self._current.readinto(buffer)
            if count:
                return count
            self._current.close()
            self._current = next(self._files, None)
        return 0


def unpack_parts(folder: Path) -> None:
    """Unpack a split bundle into `folder`; nothing to do when this very one was unpacked before."""
    listed = json.loads((folder / PARTS).read_text(encoding="utf-8"))
    parts, manifest = listed["files"], folder / MANIFEST
    if manifest.is_file() and sha256(manifest) == listed["manifest_sha256"]:
        return
    check_files(folder, parts)
    print(f"unpacking {len(parts)} parts")
    stream = io.BufferedReader(_Joined(folder / name for name in sorted(parts)), 1 << 20)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        # the manifest is the last member: it is there only when all the rest is
        archive.extractall(folder, filter="data")


def check_machine(manifest: dict) -> None:
    """The Python that runs this must be the one the wheels are for."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != manifest["python_version"]:
        raise InstallError(
            f"this bundle is for Python {manifest['python_version']}, {sys.executable} is Python {here}: run "
            f"install.py with python{manifest['python_version']}, or make a bundle with PYTHON_VERSION={here}"
        )


def check_assumed(assumed: dict[str, str]) -> None:
    """What the bundle leaves out because the target was said to have it."""
    # pip carries its own copy: `packaging` itself may be one of the wheels
    from pip._vendor.packaging.specifiers import SpecifierSet

    wrong = []
    for name, specifier in assumed.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name}{specifier}: not installed")
            continue
        if not SpecifierSet(specifier).contains(version, prereleases=True):
            wrong.append(f"{name}{specifier}: version {version} is installed")
    if wrong:
        raise InstallError(
            "this machine lacks packages that the bundle was told it has:\n  "
            + "\n  ".join(wrong)
            + "\nmake the bundle again with HAVE=<this machine's `pip list --format=freeze`>"
        )


def write_environment(folder: Path, variables: dict[str, str]) -> Path:
    """Write `env.sh`, which exports each variable as the absolute path of a folder of the bundle; returns its path."""
    lines = [f"export {name}={shlex.quote(str(folder / relative))}" for name, relative in variables.items()]
    path = folder / "env.sh"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str]) -> None:
    """Unpack, check, install; raises InstallError."""
    folder = Path(__file__).resolve().parent
    if (folder / PARTS).is_file():
        unpack_parts(folder)
    if not (folder / MANIFEST).is_file():
        raise InstallError(f"no {MANIFEST} and no {PARTS} in {folder}")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    check_machine(manifest)
    check_files(folder, manifest["files"])
    check_assumed(manifest["assumed"])
    wheels = [str(folder / name) for name in manifest["files"] if name.startswith("wheels/")]
    print(f"{len(manifest['files'])} files checked, {len(wheels)} wheels")
    if "--check" in arguments:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *arguments, *wheels]
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(
            "pip failed, see above; in a system Python, make a virtual environment first: "
            "python -m venv --system-site-packages .venv"
        )
    environment = write_environment(folder, manifest["environment"])
    print(f"installed lrsa {manifest['lrsa']}; model and data: . {environment}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        main(sys.argv[1:])
    except InstallError as error:
        sys.exit(f"error: {error}")
