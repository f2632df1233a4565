"""`lrsa-report` from the command line, on the committed records."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrsa.config import ReportConf
from lrsa.report import write_report


def lrsa_report(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrsa.report", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_command_writes_one_file_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    records = repository / "experiments/demo/records"
    done = lrsa_report(tmp_path, f"records=[{records}]", "title=The demo", "bootstrap=200", "output=pages/demo.html")
    assert done.returncode == 0, done.stderr
    assert re.match(r"wrote pages/demo\.html \(\d+ KiB\)", done.stdout)
    assert [path.name for path in tmp_path.rglob("*")] == ["pages", "demo.html"]
    page = (tmp_path / "pages/demo.html").read_text(encoding="utf-8")
    assert "<title>The demo</title>" in page and page.endswith("</html>\n")
    assert len(page) < 1_000_000


def test_what_is_not_there_is_said_without_a_traceback(tmp_path: Path) -> None:
    done = lrsa_report(tmp_path, "study=absent")
    assert done.returncode == 1 and "error: there is no folder experiments/absent/records" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    for message, conf in {
        "name the records to read": ReportConf(),
        "names='x' is not a mapping": ReportConf(study="s", names="x"),
        "reference=3: name an arm": ReportConf(study="s", reference=3),
    }.items():
        with pytest.raises(ValueError, match=message):
            write_report(conf)


@pytest.mark.parametrize("study", ["demo", "smollm2_scorers", "smollm2_rate", "benchmark", "generation"])
def test_committed_records_make_a_page(study: str, repository: Path, tmp_path: Path) -> None:
    """Those of lrsa-bench too, which measure no task: what was run and where is shown all the same."""
    records = repository / f"experiments/{study}/records"
    path = write_report(ReportConf(records=[str(records)], bootstrap=20, output=str(tmp_path / "r.html")))
    page = path.read_text(encoding="utf-8")
    runs = len(list(records.glob("*/record.json")))
    assert len(re.findall(r'<details class="run card"', page)) == runs and "There is no table" not in page
    assert ("gain</th>" in page) == (study in ("benchmark", "generation")), "speed has tables of its own"
    assert "No finished run measured anything." not in page
