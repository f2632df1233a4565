"""Checks of how many processes train a model together."""

from __future__ import annotations

from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lrsa.config import TrainerConf
from lrsa.training.sharded import FSDP, processes

STRATEGIES = ("auto", FSDP)


def problems_of(conf: TrainerConf) -> Iterator[str]:
    """Of `trainer.strategy` and `trainer.devices`, and of what `torchrun` started."""
    started = processes()
    if conf.strategy not in STRATEGIES:
        yield f"trainer.strategy={conf.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}"
    elif conf.devices < 1:
        yield f"trainer.devices={conf.devices}: at least 1"
    elif conf.strategy != FSDP and (conf.devices != 1 or started != 1):
        yield (
            f"trainer.devices={conf.devices} in {started} process(es), trainer.strategy={conf.strategy}: one process "
            "trains on one device; run arms side by side on several, or share a model out with trainer=fsdp"
        )
    elif conf.strategy == FSDP and started != conf.devices:
        yield (
            f"trainer.strategy=fsdp trains in a process a device, but trainer.devices={conf.devices} and {started} "
            f"process(es) were started: torchrun --nproc-per-node {conf.devices} -m lrsa.train ..."
        )
    elif conf.strategy == FSDP and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        yield "trainer.strategy=fsdp: the processes leave each other after one run; start each arm by its own torchrun"
