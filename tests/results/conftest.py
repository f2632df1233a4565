"""Synthetic runs: an arm answers a fixed set of examples right, by task and compression."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrsa.results import Record, bootstrap_mean

RATIOS = {1: 1.0, 2: 1.9, 4: 3.37, 8: 5.56}
# (task, compression, or "gold") -> right or wrong, by example
Outcomes = Mapping[tuple[str, float | str | None], np.ndarray]
MakeRun = Callable[..., Record]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        arm: str,
        outcomes: Outcomes,
        *,
        seed: int = 0,
        folder: str | None = None,
        fingerprint: str = "f",
        loss: bool = False,
        knob: int = 0,
        attention: Mapping[str, Any] | None = None,
    ) -> Record:
        run = tmp_path / "runs" / (folder or f"{arm}-seed{seed}")
        config: dict[str, Any] = {"recipe": {"name": arm, "knob": knob}, "run": {"seed": seed, "output_dir": str(run)}}
        if attention is not None:  # that of the evaluation
            config["evaluation"] = {"attention": dict(attention)}
        record = Record.start(run, command="lrsa-train", study="synthetic", arm=arm, seed=seed, config=config)
        cells, rows = [], []
        for (task, column), right in outcomes.items():
            compression = 1 if column == "gold" else column
            context = {"context": "gold"} if column == "gold" else {}  # records from before say none
            interval = bootstrap_mean(right, 500)
            cells.append(
                {
                    "task": task,
                    "compression": compression,
                    "n": interval.n,
                    "exact": interval.mean,
                    "exact_low": interval.low,
                    "exact_high": interval.high,
                    "nll": 0.5,
                    "measured_ratio": None if compression is None or context else RATIOS[int(compression)],
                    **context,
                    "data_fingerprint": f"{fingerprint}-{task}-{compression is None}",
                }
            )
            rows += [
                {
                    "task": task,
                    "id": f"{task}-{i}",
                    "compression": compression,
                    "exact": bool(v),
                    "nll": 0.5 + i / 100,
                    "tokens": 3,
                    **context,
                }
                for i, v in enumerate(right)
            ]
        training = {"steps": 3, "loss_curve": {"step": [1, 2, 3], "loss": [2.0, 1.0, 0.5]}} if loss else None
        record.finish({"exact": 0.5}, cells, rows, training)
        return record

    return make


def share(right: int, n: int = 100) -> np.ndarray:
    """The first `right` of n examples are right."""
    return np.arange(n) < right
