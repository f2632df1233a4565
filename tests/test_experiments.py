"""The committed tables are what the committed records say, and the README quotes them to the letter."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLES = sorted(path for name in ("table", "retention_*") for path in (ROOT / "experiments").glob(f"*/{name}.md"))
ENTRIES = {"lrsa-table": "lrsa.table", "lrsa-bench": "lrsa.bench"}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_its_own_command_rebuilds_a_table_byte_for_byte(table: Path, tmp_path: Path) -> None:
    found = re.match(r"<!-- Generated, do not edit\. Rebuild: (.*) -->\n", table.read_text())
    assert found, f"{table} does not name its command"
    command, *arguments = shlex.split(found.group(1))
    if command == "lrsa-table":
        # `rebuild` keeps the header the same although this run writes elsewhere.
        quoted = found.group(1).replace("\\", "\\\\").replace("'", "\\'")
        arguments += [f"output={tmp_path}", "figure=false", "formats=[markdown]", f"rebuild='{quoted}'"]
        rebuilt = tmp_path / table.name
    else:
        rebuilt = tmp_path / arguments.pop().split("=", 1)[1]
        arguments += [f"table={rebuilt}", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", ENTRIES[command], *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    body = slice(1, None) if command == "lrsa-bench" else slice(None)  # its header names where it wrote
    assert rebuilt.read_text().splitlines()[body] == table.read_text().splitlines()[body]


def test_the_readme_quotes_the_tables() -> None:
    generated = {line for table in TABLES for line in table.read_text().splitlines()}
    quoted = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| [^|]*\|.*\d\.\d", line)]
    assert len(quoted) >= 5
    for line in quoted:
        assert line in generated, line
