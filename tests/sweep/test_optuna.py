"""Optuna chooses by the returned score; continued, it chooses the same again and computes none of it anew."""

import importlib.util
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lrsa.results.summary import headline
from tests.sweep.conftest import Sweeps, records

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="NOT TESTED: hydra_optuna_sweeper is absent (pip install 'lrsa[optuna]')",
)


def test_the_best_score_is_found_and_a_stopped_search_goes_on(
    sweeps: Sweeps, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["sweep=tune", "model=recall_tiny", "recipe.warmup_steps=0"]
    sweeps.run(*search, "hydra.sweeper.n_trials=2", "hydra.sweep.dir=runs")
    before = records(Path("runs"))
    assert len(before) == 2
    sweeps.run(*search, "hydra.sweeper.n_trials=3", "resume=runs")
    after = records(Path("runs"))
    assert len(after) == 3 and before.items() <= after.items(), "as they were"
    best = OmegaConf.load("runs/optimization_results.yaml")
    assert best.best_value == max(headline(record.cells) or 0.0 for record in after.values())

    with pytest.raises(SystemExit):
        sweeps.run(*search, "hydra.sweeper.n_trials=1", "hydra.sweep.dir=dry", "dry_run=true")
    assert "dry_run=true lists a grid, but this sweeper" in capsys.readouterr().out and not records(Path("dry"))
