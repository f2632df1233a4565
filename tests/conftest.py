"""Test session: no network, few threads, and a loud word when the shared data folder is absent."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers or wandb is imported: each reads its variables once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.pop("LRSA_DATA", None)  # a stand-in for hub data sets: tests name their data
# One thread a pytest-xdist worker; OMP_NUM_THREADS in the environment wins.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from absl import logging as absl_logging

# rouge-score brings absl, whose log handler closes its stream when Hydra sets logging up anew: pytest's own, where a
# test was the first to import it. The process's standard error it leaves open.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

ROOT = Path(__file__).resolve().parents[1]
SHARED_ABSENT = "shared data absent"
BROWSER_ABSENT = "no browser"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with `data/` and `conformance/`: $LRSA_SHARED, or `shared` beside the checkout; skips without it."""
    named = os.environ.get("LRSA_SHARED")
    if named and not Path(named).is_dir():
        pytest.fail(f"LRSA_SHARED={named} is not a folder", pytrace=False)
    folder = Path(named) if named else ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{SHARED_ABSENT}: no {folder}, and LRSA_SHARED is not set")
    return folder


@pytest.fixture
def hydra_configs() -> Iterator[None]:
    """`hydra.compose` finds `conf/`, and nothing of it stays behind."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lrsa.config import config_dir, register_configs

    register_configs()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base=None):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's cache."""
    os.environ["LRSA_CACHE"] = str(tmp_path_factory.mktemp("lrsa-cache"))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how much was not tested for want of the shared data or a browser: skips alone are easily overlooked."""
    unseen = [r for r in terminalreporter.stats.get("skipped", []) if BROWSER_ABSENT in str(r.longrepr)]
    if unseen:
        terminalreporter.write_line(
            f"WARNING: {len(unseen)} tests of the HTML report were SKIPPED because there is no Chromium to open it "
            "(apt-get install chromium chromium-driver; pip install selenium)",
            yellow=True,
            bold=True,
        )
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if SHARED_ABSENT in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"WARNING: {len(skipped)} tests were SKIPPED because the shared data folder is absent "
            "(put it beside the checkout as `shared`, or set LRSA_SHARED)",
            yellow=True,
            bold=True,
        )
