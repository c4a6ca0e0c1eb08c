"""The processes that train together: one alone, or those that torchrun started."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from . import Refused


@dataclass(frozen=True)
class Team:
    """rank: this process among `world`; device: where it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """`value` of every process, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def copy_from_first_(self, tensors: Iterator[torch.Tensor]) -> None:
        """Overwrite the tensors with rank 0's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def team(device: str) -> Iterator[Team]:
    """Joins the others, over NCCL on GPUs and gloo on CPUs. device: auto, cpu or cuda."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun's
    world = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, local)
    if world > 1:
        on_gpu = chosen.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
    yield Team(rank, world, chosen)
    # Not after an exception: NCCL would wait for the others, which wait for this process.
    if world > 1:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refused("--device cuda: PyTorch finds no GPU; --device cpu trains without")
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise Refused(f"--nproc-per-node: at most one process a GPU, and there are {gpus}; --device cpu needs none")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def seed(number: int, rank: int) -> None:
    """Seeds the generators that code in a training loop might draw from (dropout, say), of each process differently."""
    random.seed(number + rank)
    np.random.seed((number + rank) % 2**32)
    torch.manual_seed(number + rank)
