"""`lrsa-train`, with every checkpoint kept as `<step>.ckpt` beside the last one: run by a process of the tests."""

import shutil

from lightning.pytorch import Trainer

from lrsa import train
from lrsa.training.checkpoint import LastCheckpoint

if __name__ == "__main__":
    write = LastCheckpoint.save

    def save(self: LastCheckpoint, trainer: Trainer) -> None:
        write(self, trainer)
        if trainer.is_global_zero:
            shutil.copy(self.path, self.path.with_name(f"{trainer.global_step}.ckpt"))

    LastCheckpoint.save = save  # type: ignore[method-assign]
    train.main()
