"""A bundle on disk: files copied in, the manifest of their hashes, and the split into parts for narrow channels."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from lrsa.bundle import install

PART_PREFIX = "lrsa-bundle.tar."


def copy_into(source: Path, folder: Path) -> Path:
    """Copy a file or folder into `folder` under its own name; ValueError when it is not there or the name is taken."""
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    destination = folder / source.resolve().name
    if destination.exists():
        raise ValueError(f"two things named {destination.name}: rename one of them")
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, destination)
    else:
        shutil.copy2(source, destination)
    return destination


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{path relative to folder: {"bytes", "sha256"}}` of every file below it, sorted, the manifest itself left out."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (install.MANIFEST, install.PARTS))
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": install.sha256(p)} for p in paths}


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put `install.py` and `manifest.json` into the folder; returns the manifest: `facts`, and `files` with hashes."""
    shutil.copyfile(install.__file__, folder / "install.py")
    manifest = {"schema": 1, **facts, "files": describe_files(folder)}
    (folder / install.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


class _PartWriter(io.RawIOBase):
    """A write-only stream that starts a new file every `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._room = 0
        self._file: io.BufferedWriter | None = None
        self.paths: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for_later = view
        while len(for_later):
            if self._room == 0 or self._file is None:
                self.close_part()
                self.paths.append(self._folder / f"{PART_PREFIX}{len(self.paths):03d}")
                self._file, self._room = self.paths[-1].open("wb"), self._limit
            self._file.write(for_later[: self._room])
            written = min(self._room, len(for_later))
            self._room -= written
            for_later = for_later[written:]
        return len(view)

    def close_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def split(folder: Path, limit: int) -> list[Path]:
    """Replace the folder's content by parts of at most `limit` bytes each, `install.py` and `parts.json`.

    The parts are one uncompressed tar, cut: wheels and quantised weights do not shrink any further.
    """
    if limit < 1 << 20:
        raise ValueError(f"parts of {limit} bytes: at least 1 MiB")
    digest = install.sha256(folder / install.MANIFEST)
    names = [*describe_files(folder), install.MANIFEST]  # the manifest last: a mark that all of it was unpacked
    parts = _PartWriter(folder, limit)
    with tarfile.open(fileobj=parts, mode="w|") as archive:
        for name in names:
            archive.add(folder / name, arcname=name, filter=_without_owner)
    parts.close_part()
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry not in parts.paths and entry.name != "install.py":
            entry.unlink()
    files = {p.name: {"bytes": p.stat().st_size, "sha256": install.sha256(p)} for p in parts.paths}
    listed = {"schema": 1, "manifest_sha256": digest, "files": files}
    (folder / install.PARTS).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return parts.paths
