"""A sweep's worth of realistic records, written as files without running anything."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np

RATIOS = {1: 1.0, 2: 1.88, 4: 3.38, 8: 5.6, 16: 8.35}


def write_many(folder: Path, examples: dict[str, int], jobs: int, seeds: int, columns: int = 6) -> None:
    """`jobs` runs of a grid of lag x top-K, `seeds` of each setting; `examples` by task, the same ids in every run."""
    rng = np.random.default_rng(7)
    for number, seed in itertools.product(range(jobs // seeds), range(seeds)):
        run = folder / f"{number:03d}-seed{seed}"
        run.mkdir(parents=True)
        lag, top_k = 16 * (1 + number % 12), 4 * (1 + number // 12)
        cells, lines = [], []
        for task, n in examples.items():
            for compression in [None, *RATIOS][:columns]:
                right = rng.random(n) < (0.05 if compression is None else 0.9 / (1 + 0.002 * lag * compression))
                nll = rng.gamma(2.0, 0.5, n).round(6)
                cells.append(
                    {"task": task, "compression": compression, "n": n, "exact": float(right.mean()), "exact_low": 0.0,
                     "exact_high": 1.0, "nll": float(nll.mean()), "measured_ratio": RATIOS.get(compression or 0),
                     "slots": 1000.0, "kv_bytes_per_layer": [4096] * 30, "data_fingerprint": f"{task}-f"}
                )  # fmt: skip
                head = f'"compression": {json.dumps(compression)}, "task": "{task}", "tokens": 5'
                lines += [
                    f'{{{head}, "id": "{task}-{i:05d}", "exact": {"true" if ok else "false"}, "nll": {value}}}\n'
                    for i, (ok, value) in enumerate(zip(right.tolist(), nll.tolist(), strict=True))
                ]
        config = {
            "run": {"seed": seed, "study": "many", "arm": f"lag{lag}-top{top_k}", "output_dir": "<run>"},
            "attention": {"scorer": "lag_relative", "lag_size": lag, "top_k": top_k, "keep_ratio": None},
            "recipe": {"name": "lrsa", "learning_rate": 2e-4, "compressions": [4]},
            "data": {"length": 4096, "parts": {name: {"source": name, "weight": 0.5} for name in ("squad", "needles")}},
        }
        record = {
            "schema": 1, "id": f"{number:08x}{seed:08x}", "status": "finished", "attempt": 1, "command": "lrsa-train",
            "study": "many", "arm": config["run"]["arm"], "seed": seed, "started": "2026-11-22T00:00:00Z",
            "finished": "2026-11-22T00:10:00Z", "wall_s": 600.0, "config": config, "overrides": [],
            "git": {"commit": "0" * 40, "dirty": False}, "versions": {"torch": "2.13"}, "hardware": {}, "data": [],
            "training": {"steps": 300, "loss_curve": {"step": list(range(200)), "loss": [1.0] * 200}},
            "metrics": {}, "cells": cells, "error": None,
        }  # fmt: skip
        (run / "record.json").write_text(json.dumps(record))
        with gzip.open(run / "outcomes.jsonl.gz", "wt", compresslevel=1) as out:
            out.writelines(lines)
