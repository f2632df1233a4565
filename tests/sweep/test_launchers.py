"""Jobs in processes of a launcher's own: each runs once, one failure stops no other, and what is finished stays."""

import importlib.util
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from lrsa.config import config_dir
from lrsa.sweep import devices
from tests.sweep.conftest import Sweeps, held_by_another, records, result

JOBLIB = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
SUBMITIT = ["hydra/launcher=slurm_local", "hydra.launcher.timeout_min=5"]
RAY = ["hydra/launcher=ray_cluster", "+hydra.launcher.init.num_cpus=2"]


def needs(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED: {package} is absent (pip install 'lrsa[{extra}]')")


def joblib_here() -> None:
    """Without the worker processes of a test before, which stand in that test's folder."""
    needs("hydra_plugins.hydra_joblib_launcher", "sweeps")
    loky = importlib.import_module("joblib.externals.loky")
    loky.get_reusable_executor().shutdown(wait=True)


def two_jobs(sweeps: Sweeps, *launcher: str) -> None:
    """Two jobs there, one of them finished here before; the same results as here."""
    sweeps.run("recipe=dense,lrsa_uniform", "hydra.sweep.dir=here")
    sweeps.run("recipe=dense", "hydra.sweep.dir=there")
    (before,) = records(Path("there")).values()
    sweeps.run("recipe=dense,lrsa_uniform", "resume=there", *launcher)
    here, there = records(Path("here")), records(Path("there"))
    assert here.keys() == there.keys() and len(there) == 2
    assert [result(record) for record in here.values()] == [result(record) for record in there.values()]
    assert there[before.folder.name].finished == before.finished


def one_fails(sweeps: Sweeps, capfd: pytest.CaptureFixture[str], *launcher: str) -> None:
    """For a reason that shows only when its data is read."""
    with pytest.raises(SystemExit):
        sweeps.run("data.length=320,190", "evaluation.length=320", "hydra.sweep.dir=mixed", *launcher)
    assert "failed: data.length=190: ContextTooLongError: " in capfd.readouterr().err
    assert sorted(record.status for record in records(Path("mixed")).values()) == ["failed", "finished"]


def test_joblib(sweeps: Sweeps) -> None:
    joblib_here()
    two_jobs(sweeps, *JOBLIB)


@pytest.mark.slow
def test_joblib_goes_on_after_a_failure(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    joblib_here()
    one_fails(sweeps, capfd, *JOBLIB)


@pytest.mark.slow
def test_submitit(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    needs("hydra_plugins.hydra_submitit_launcher", "sweeps")
    two_jobs(sweeps, *SUBMITIT)
    one_fails(sweeps, capfd, *SUBMITIT)


@pytest.mark.slow
def test_ray(sweeps: Sweeps, capfd: pytest.CaptureFixture[str]) -> None:
    needs("ray", "ray")
    two_jobs(sweeps, *RAY)
    one_fails(sweeps, capfd, *RAY)


@pytest.mark.parametrize(
    ("launcher", "broken", "extra"),
    [("ray_cluster", "ray", "ray"), ("processes", "JoblibLauncher", "sweeps")],
)
def test_what_is_not_installed_is_named(
    sweeps: Sweeps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launcher: str,
    broken: str,
    extra: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == broken else find(name, *rest))
    known = Plugins.instance().class_name_to_class
    for name in [name for name in known if name.endswith(f".{broken}")]:
        monkeypatch.delitem(known, name)
    with pytest.raises(SystemExit):
        sweeps.run(f"hydra/launcher={launcher}", "hydra.sweep.dir=runs")
    assert f"pip install 'lrsa[{extra}]'" in capsys.readouterr().err and not Path("runs").exists()


# ---------------------------------------------------------------- one process a GPU


def test_each_process_of_joblib_sees_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    joblib = OmegaConf.load(config_dir() / "hydra" / "launcher" / "processes.yaml")
    release = []
    for expected in ("0", "1"):
        with ExitStack() as held, monkeypatch.context() as patch:
            patch.setattr(devices, "_HELD", held)
            for _ in range(2):  # the process's second job
                devices.take_one_gpu(tmp_path, joblib)
                assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        del os.environ["CUDA_VISIBLE_DEVICES"]
        release.append(held_by_another(tmp_path / f"gpu-{socket.gethostname()}-{expected}")[1])
    with pytest.raises(RuntimeError, match=r"all 2 GPUs have a process .* set hydra\.launcher\.n_jobs=2"):
        devices.take_one_gpu(tmp_path, joblib)
    assert all(kill() for kill in release)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with ExitStack() as held, monkeypatch.context() as patch:
        patch.setattr(devices, "_HELD", held)
        devices.take_one_gpu(tmp_path, joblib)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    devices.take_one_gpu(tmp_path, OmegaConf.create({"_target_": "hydra.BasicLauncher"}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7", "one after another, jobs share what there is"


def test_workers_are_gpus_or_else_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert devices.workers() == 8
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices.workers() == len(os.sched_getaffinity(0))
