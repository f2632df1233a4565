"""One job of a sweep: which one it is, and how far it came, as its folder has it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lrsa.config import EvalConf, TrainConf
from lrsa.results import Record
from lrsa.results.environment import portable
from lrsa.results.record import RECORD_FILE, config_id
from lrsa.sweep.lock import owner

COMMANDS: Mapping[type, str] = {TrainConf: "lrsa-train", EvalConf: "lrsa-eval"}
LOCKS = ".locks"  # beside the job folders: what reads all of a run folder must not touch, and so drop, a lock


class State(StrEnum):
    """How far a job came."""

    FINISHED = "finished"
    RUNNING = "running"  # now, by a process that lives
    STOPPED = "stopped"  # half done, its process was killed
    FAILED = "failed"
    NEW = "new"


def task_config(whole: DictConfig, output_dir: str) -> DictConfig:
    """The config that the command is given, less Hydra's own; its run folder is not asked of Hydra, which may not know
    it yet.
    """
    config = copy.deepcopy(whole)
    with read_write(config), open_dict(config):
        config.pop("hydra", None)
        config.run.output_dir = output_dir
    return config


def job_id(*, _root_: DictConfig) -> str:
    """`${lrsa.job_id:}`: the `id` that the record of a run with this config has."""
    plain = OmegaConf.to_container(task_config(_root_, "<run>"), resolve=True)
    return config_id(COMMANDS[OmegaConf.get_type(_root_) or dict], portable(plain, Path("<run>")))


def sweep_folder(study: str, time: str, *, _root_: DictConfig) -> str:
    """`${lrsa.sweep_folder:...}`: that of the sweep that goes on, `resume`, or a new one."""
    return str(_root_.resume or f"multirun/{study}/{time}")


def lock_of(folder: Path) -> Path:
    """The file whose lock the process at work in `folder` holds."""
    return folder.parent / LOCKS / folder.name


def state_of(folder: Path) -> State:
    """That of the job in `folder`. Not to be asked inside `locked`: a glance at one's own lock drops it."""
    if owner(lock_of(folder)) is not None:
        return State.RUNNING
    if not (folder / RECORD_FILE).exists():
        return State.NEW
    status = Record.load(folder).status
    return State.STOPPED if status == "running" else State(status)
