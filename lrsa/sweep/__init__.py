"""Sweeps: a grid of jobs that is checked before it starts, survives being killed, and runs no job twice.

`GridSweeper` plans and launches (`hydra/sweeper=grid`, the default of `lrsa-train -m` and `lrsa-eval -m`), `run_once`
is around each job under any sweeper and launcher. What has happened is read from the jobs' folders alone.
"""

import sys
from pathlib import Path

from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from lrsa.sweep.devices import workers
from lrsa.sweep.job import job_id, sweep_folder
from lrsa.sweep.once import run_once

__all__ = ["job_id", "register_sweeps", "run_once"]

PLUGINS = str(Path(__file__).parent / "plugins")


def register_sweeps() -> None:
    """Make known to Hydra what `conf/hydra` names: the plugins, and `${lrsa.*:}`."""
    if PLUGINS not in sys.path:
        sys.path.append(PLUGINS)
    known = Plugins.instance()  # which looks for them; if somebody else has asked before, it did not find these
    from hydra_plugins.lrsa_sweep import GridSweeper, RayLauncher

    for plugin in (GridSweeper, RayLauncher):
        known.register(plugin)
    for name, resolver in (("job_id", job_id), ("sweep_folder", sweep_folder), ("workers", workers)):
        OmegaConf.register_new_resolver(f"lrsa.{name}", resolver, replace=True)
