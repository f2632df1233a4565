"""`lrsa-cost`: what an `lrsa-train` of these settings would cost, computed and not run.

lrsa-cost experiment=qwen2_5_7b
lrsa-cost experiment=llama3_1_8b trainer.devices=4 data.length=16384
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrsa.benchmark.cost import H100_FLOPS, Cost, Utilisation, measured_utilisations, most_alike, predict
from lrsa.config import TrainConf, config_dir, register_configs
from lrsa.results.record import Record
from lrsa.results.study import FOLDER
from lrsa.validation import attention
from lrsa.validation.problems import report as refuse

ASSUMED = 0.4  # where nothing was measured: what well-tuned training of such models reports


def read(overrides: Sequence[str]) -> TrainConf:
    """The config that `lrsa-train` would run with these overrides."""
    register_configs()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base=None):
        conf = OmegaConf.to_object(compose("train", [*overrides, "run.output_dir=unused"]))
    assert isinstance(conf, TrainConf)
    return conf


def report(conf: TrainConf, cost: Cost, utilisations: Sequence[Utilisation]) -> RenderableType:
    """Parameters, arithmetic, memory a GPU, and hours at each utilisation."""
    shape, memory = cost.shape, Table("memory a GPU, estimated", "GiB", box=box.SIMPLE_HEAD, show_footer=True)
    for part, amount in cost.memory.items():
        memory.add_row(part, f"{amount / 2**30:.1f}")
    memory.add_row("together", f"{sum(cost.memory.values()) / 2**30:.1f}", style="bold")
    times = Table("utilisation", "that of", f"hours on {cost.devices} H100", box=box.SIMPLE_HEAD)
    for share, what in [*((one.share, one.what) for one in utilisations), (ASSUMED, "assumed, not measured")]:
        times.add_row(f"{share:.1%}", Text(what), f"{cost.hours(share):.2f}")
    trained = f"{shape.adapters:,} train (LoRA)" if shape.adapters else "all train"
    return Group(
        Text(f"{conf.model.name}: {shape.parameters:,} parameters, {trained}", style="bold"),
        Text(
            f"{conf.recipe.steps} steps x {conf.recipe.batch_size} x {conf.data.length:,} tokens = {cost.tokens:,}; "
            f"{cost.flops:.3g} FLOP of training, peak {H100_FLOPS / 1e12:.0f} TFLOP/s a GPU; evaluation is not in it"
        ),
        memory,
        times,
    )


def main() -> None:
    console, errors = Console(), Console(stderr=True)
    if {"-h", "--help"} & set(sys.argv[1:]):
        console.print((__doc__ or "").strip(), highlight=False, markup=False)
        return
    try:
        conf = read(sys.argv[1:])
        refuse(attention.of_training(conf))
        cost = predict(conf)
        files = sorted(FOLDER.glob("*/records/*/record.json"))
        found = [one for file in files for one in measured_utilisations(Record.load(file))]
    except (ValueError, HydraException) as error:
        errors.print(Text(f"error: {error}", style="red"))
        raise SystemExit(1) from error
    console.print(report(conf, cost, most_alike(found, cost)))


if __name__ == "__main__":
    main()
