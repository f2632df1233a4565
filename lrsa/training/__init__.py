"""Post-training: one LightningModule, whatever is trained (weights, adapters) and under whatever attention."""

from lrsa.training.checkpoint import find_checkpoint, save_model
from lrsa.training.fit import TrainingResult, fit, micro_batches, resolve_device
from lrsa.training.module import NonFiniteLoss, PostTraining

__all__ = [
    "NonFiniteLoss",
    "PostTraining",
    "TrainingResult",
    "find_checkpoint",
    "fit",
    "micro_batches",
    "resolve_device",
    "save_model",
]
