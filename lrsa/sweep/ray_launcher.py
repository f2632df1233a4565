"""Hydra jobs on Ray: a local cluster, or one that runs already.

hydra-ray-launcher 1.2.2 would do this too, but requires cloudpickle < 3 (constraints.txt: 3.1.2), and boto3.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


class RayLauncher(Launcher):
    """A Ray task a job (`conf/hydra/launcher/ray.yaml`).

    Args:
        init: of `ray.init`: `{address: auto}` for a running cluster, `{num_cpus: 2}` for one on this machine.
        task: of `ray.remote`, what a job needs: `{num_gpus: 1}`; Ray then lets it see that GPU alone.
    """

    def __init__(self, init: Mapping[str, Any], task: Mapping[str, Any]) -> None:
        self.init: dict[Any, Any] = OmegaConf.to_container(OmegaConf.create(dict(init)))  # type: ignore[assignment]
        self.task: dict[Any, Any] = OmegaConf.to_container(OmegaConf.create(dict(task)))  # type: ignore[assignment]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook. Raises CompactHydraException without Ray."""
        if importlib.util.find_spec("ray") is None:
            raise CompactHydraException("error: hydra/launcher=ray_cluster needs Ray: pip install 'lrsa[ray]'")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The jobs' returns, when all have ended.

        Raises:
            ray.exceptions.RayError: a worker died under its job; the others have gone on.
        """
        import ray

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        started = not ray.is_initialized()
        if started:
            ray.init(**self.init)
        try:
            remote = ray.remote(**self.task)(_run) if self.task else ray.remote(_run)
            shared = ray.put((self.hydra_context, self.task_function, self.config, Singleton.get_state()))
            waiting = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                waiting.append(remote.remote(shared, number, list(overrides)))
            ray.wait(waiting, num_returns=len(waiting))  # before a crashed worker's error leaves here
            return list(ray.get(waiting))
        finally:
            if started:
                ray.shutdown()


def _run(
    shared: tuple[HydraContext, TaskFunction, DictConfig, dict[Any, Any]], number: int, job: list[str]
) -> JobReturn:
    """In the worker."""
    hydra_context, task_function, config, singletons = shared
    setup_globals()
    Singleton.set_state(singletons)
    composed = hydra_context.config_loader.load_sweep_config(config, job)
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    return run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
