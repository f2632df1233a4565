"""A JSON file beside a run's record, for what a mode of lrsa-eval finds besides cells and outcomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrsa.results.record import RecordError, write_atomically


def write_found(file: Path, found: Mapping[str, Any]) -> None:
    """Replace ``file`` by what was found; a number that JSON has no word for is an error."""
    write_atomically(file, (json.dumps(found, allow_nan=False) + "\n").encode())


def read_found(file: Path, mode: str) -> dict[str, Any]:
    """The same back; ``mode`` of lrsa-eval writes it.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{file}: {error} (lrsa-eval mode={mode} writes it)") from error
    return found
