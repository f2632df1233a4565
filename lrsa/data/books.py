"""Running text by book: a folder (or file) of `.txt` or `.txt.gz`, or a hub data set with a `text` column.

A name is a path, or `owner/name` or `owner/name:config` on the hub; `@train` or `@validation` after it takes a part. On
the hub that is the split. In a folder whole books are held out by name: `validation` is the files called `validation*`
and those in `HELD_OUT`, `train` all others. Without a part: everything in a folder, and the split `train` on the hub.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from lrsa.data.rows import hub_rows, stand_in

SUFFIXES = (".txt", ".txt.gz")
PARTS = ("train", "validation")
# Of the stand-in for wikitext: one novel, one book of stories, one of essays, by authors of whom nothing else is there.
HELD_OUT = (
    "arthur-conan-doyle_the-adventures-of-sherlock-holmes",
    "mary-shelley_frankenstein",
    "ralph-waldo-emerson_essays",
)


def read_texts(name: str) -> tuple[list[tuple[str, str]], str]:
    """(title, text) of each book, by name, and the short name of where they are from.

    Raises:
        FileNotFoundError: `name` is neither on disk nor a hub id, or there is no text in its folder.
        ConnectionError: the hub cannot be reached; it names the local alternative.
        ValueError: a part that the folder does not have.
    """
    base, part = name, ""
    if not Path(name).expanduser().exists() and "@" in name:
        base, _, part = name.rpartition("@")
    path = Path(base).expanduser()
    hub, _, config = base.partition(":")
    entry = None if path.exists() else stand_in(hub)
    if entry:
        path = entry[0]
    if path.exists():
        files = _part(path, _files(path, name), part)
        texts = []
        for file in files:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as handle:
                texts.append((_title(file), handle.read()))
        folder = path.resolve().name + (f" [{part}]" if part else "")
        return texts, f"{folder} in place of {hub}" if entry else folder
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise FileNotFoundError(f"text {name!r} is neither a folder of *.txt(.gz) nor a hub id (owner/name:config)")
    try:
        rows = hub_rows(hub, part or "train", config or None, None)
    except ConnectionError as error:
        raise ConnectionError(
            f"the hub's text {hub!r} cannot be loaded ({error.__cause__}). Without the hub, set path or filler=/folder "
            "of *.txt(.gz), LRSA_DATA=/folder that holds prose/, or filler=null for the built-in sentences"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(f"text {name!r} needs a column `text`; it has {', '.join(rows.column_names)}")
    return [(hub, "\n\n".join(rows["text"]))], name


def _title(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".txt")


def _files(path: Path, name: str) -> list[Path]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"text {name!r}: no *.txt or *.txt.gz in {path}")
    return files


def _part(path: Path, files: Sequence[Path], part: str) -> Sequence[Path]:
    if not part:
        return files
    if part not in PARTS:
        raise ValueError(f"{path} has no part {part!r}; valid: {', '.join(PARTS)}")
    held = [file for file in files if _title(file) in HELD_OUT or file.name.startswith("validation")]
    found = held if part == "validation" else [file for file in files if file not in held]
    if path.is_file() or not found:
        raise ValueError(
            f"{path} has nothing for {part!r}: validation takes the files called validation* and {', '.join(HELD_OUT)} "
            f"of a folder, train the others; there is {', '.join(file.name for file in files)}"
        )
    return found
