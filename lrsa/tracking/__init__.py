"""A run's record, the journal of its evaluation, and the W&B run beside it. Results never depend on W&B."""

from lrsa.tracking.run import finish, journalled, plain, recorded, task_overrides
from lrsa.tracking.wandb_run import WandbRun, start_wandb

__all__ = ["WandbRun", "finish", "journalled", "plain", "recorded", "start_wandb", "task_overrides"]
