"""Weights shared out over several devices (FSDP2, arXiv 2304.11277), a process each, through Lightning's
ModelParallelStrategy; `torchrun` starts the processes.

An optimiser step sees the same samples as on one device: micro-batches go to the processes in turn.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lrsa.training.compiling import decoder_layers

FSDP = "fsdp"


def processes() -> int:
    """How many were started together, by `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this one writes the record, the checkpoints and the model."""
    return int(os.environ.get("RANK", "0")) == 0


def make_strategy(name: str, devices: int) -> Any:
    """Lightning's strategy of that name; `fsdp`: every device holds 1/`devices` of weights and optimiser state, and a
    checkpoint is one file with all of them.
    """
    if name != FSDP:
        return name
    return ModelParallelStrategy(
        data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
    )  # fmt: skip


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the model's weights in place: each decoder layer is gathered when it runs, the rest with the model.

    Raises ValueError for a model without transformers' decoder layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers that trainer.strategy=fsdp could share out")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Their norm, over all processes where they are shared out."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The parts that this process holds."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def summed(values: Tensor) -> Tensor:
    """Their sum over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """All weights, on the CPU of the first process; nothing on the others. Every process has to call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def leave() -> None:
    """The end of working together: what follows is the first process's alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
