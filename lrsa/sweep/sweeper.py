"""Hydra's grid, checked before it starts, and continued after whatever stopped it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lrsa.sweep.job import State, state_of
from lrsa.sweep.listing import show_jobs, show_left_out, show_outcome, shown
from lrsa.sweep.plan import Plan, check_continued, expand, plan_jobs
from lrsa.sweep.predict import Measured
from lrsa.validation import bad_input_without_traceback

log = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """The product of `params` and the command line's lists (`conf/hydra/sweeper/grid.yaml`).

    Combinations that the config's checks refuse are left out and reported, with `dry_run=true` the others are listed;
    otherwise those that are not finished are launched. One that fails stops no other, and makes the command fail.

    Args:
        params: override key -> values, as on the command line.
        measured: folders of records from which the dry run predicts.
    """

    def __init__(self, params: Mapping[str, str], measured: Sequence[str]) -> None:
        self.params = dict(params)
        self.measured = list(measured)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook."""
        self.context, self.config = hydra_context, config
        try:
            self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)
        except RuntimeError as error:
            raise CompactHydraException(f"error: hydra/launcher: {error}; pip install 'lrsa[sweeps]'") from error

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """The launched jobs' returns.

        Raises:
            CompactHydraException: nothing can run, or not all jobs are finished or in other hands; lists them.
        """
        setup_globals()
        config, loader, console = self.config, self.context.config_loader, Console()
        params = [f"{key}={values}" for key, values in self.params.items()]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *arguments])
        folder = Path(config.hydra.sweep.dir)
        elsewhere = config.dry_run or str(config.hydra.launcher._target_).endswith(("SlurmLauncher", "RayLauncher"))
        with bad_input_without_traceback():
            grid = expand(overrides)
            with console.status(f"checking {len(grid)} combinations"):
                plan = plan_jobs(lambda job: loader.load_sweep_config(config, job), grid, elsewhere)
            if config.resume is not None:
                check_continued(plan, folder)
            show_left_out(plan, console)
            if config.dry_run:
                show_jobs(plan, Measured([*self.measured, folder]), console)
                return []
        plan.write(folder)
        OmegaConf.save(config, folder / "multirun.yaml")
        return self._launch(plan, folder, console)

    def _launch(self, plan: Plan, folder: Path, console: Console) -> list[JobReturn]:
        todo = [job.overrides for job in plan.jobs if state_of(job.folder) != State.FINISHED]
        if len(todo) < len(plan.jobs):
            log.info("%d of %d jobs are finished", len(plan.jobs) - len(todo), len(plan.jobs))
        returns: list[JobReturn] = []
        trouble = []
        try:
            returns = list(self.launcher.launch(todo, initial_job_idx=0)) if todo else []
        except Exception as error:  # a worker that was killed, for one: the folders say what is finished all the same
            log.exception("the launcher failed")
            trouble.append(f"the launcher failed, as shown above: {type(error).__name__}")
        trouble += show_outcome(plan, console)
        console.print(f"sweep: {shown(folder)}", highlight=False, soft_wrap=True)
        if trouble:
            again = f"error: not all jobs finished; the same command with resume={shown(folder)} tries these again:"
            raise CompactHydraException("\n".join([again, *(f"  - {line}" for line in trouble)]))
        return returns
