"""One process or many: what ``torchrun`` says, and the few collective calls of the loop.

Control messages (stop, save) go over a gloo group of their own, so that the loop never waits for a GPU because of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robx.distill.loader import Share


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # the gloo group

    @property
    def share(self) -> Share:
        """This process's part of a batch."""
        return Share(self.rank, self.world)

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process raised it; all processes get the same answer."""
        if self.world == 1:
            return flags
        votes = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def parallel(self, net: nn.Module) -> nn.Module:
        """The net whose gradients are averaged over processes; its BatchNorm is synchronised on GPUs."""
        if self.world == 1:
            return net
        if self.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
            return DistributedDataParallel(net, device_ids=[self.device.index])
        return DistributedDataParallel(net)


@contextlib.contextmanager
def join_processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one.

    `device` is "cpu", "cuda", "cuda:1" ...; None takes a GPU when there is one.
    """
    world, rank, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        kind = f"cuda:{local}"
    place = torch.device(kind)
    if world == 1:
        yield Processes(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        control = dist.new_group(backend="gloo")
        yield Processes(rank, world, place, control)
    finally:
        dist.destroy_process_group()


_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
