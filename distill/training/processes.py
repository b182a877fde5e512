"""One process or several started by ``torchrun``, and the few collective operations of the training loop.

Control messages (stop, save) use a separate gloo group, so that they never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robx.distill.batches.loader import Share
from robx.errors import DeviceError, InputError, first_line


@dataclass(frozen=True)
class Processes:
    """This process and its place among those of the run."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # the gloo group

    @property
    def share(self) -> Share:
        """This process's part of each batch."""
        return Share(self.rank, self.world)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process; the result is the same in all of them."""
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

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor on this process's device by its sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` in every process with the values of the first one."""
        if self.world == 1:
            return
        for tensor in tensors:
            held = tensor.detach().cpu()
            dist.broadcast(held, src=0, group=self.control)
            tensor.copy_(held)

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def parallel(self, net: nn.Module) -> nn.Module:
        """The network in DistributedDataParallel; its BatchNorm is synchronised on GPUs."""
        if self.world == 1:
            return net
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.synchronised(net), device_ids=ids)

    def synchronised(self, net: nn.Module) -> nn.Module:
        """The network with BatchNorm statistics over all processes, on GPUs only: torch does not support it on CPUs."""
        if self.world == 1 or self.device.type != "cuda":
            return net
        found: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return found


@contextlib.contextmanager
def join_processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run as a single one.

    `device` is "cpu", "cuda", "cuda:1" ...; None uses a GPU if one is available.

    Raises:
        InputError: no such device, or several processes that torchrun did not start.
        DeviceError: raised inside the block if another process ended first.
    """
    world, rank, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    place = pick_device(device, local=local)
    if place.type == "cpu":
        keep_freed_memory()
    if world == 1:
        yield Processes(0, 1, place)
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {world} and MASTER_ADDR is not set: start the processes with torchrun")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store_of_attempt(), rank=rank, world_size=world)
    try:
        yield Processes(rank, world, place, control=dist.new_group(backend="gloo"))
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        # The other process printed why it ended; a traceback of this one would only hide it.
        why = first_line(error)
        raise DeviceError(
            f"another process of the run ended before this one, {rank} of {world} ({why}): see its message; "
            "run the same command to resume from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def pick_device(name: str | None, *, local: int = 0) -> torch.device:
    """The device of this process: `name`, or a GPU if one is available; "cuda" alone is the GPU numbered `local`.

    Raises:
        InputError: torch does not know the device, or this machine does not have it.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = _why_not(kind, error)
        raise InputError(f"--device {kind} cannot be used ({why}): give cpu, cuda or cuda:N") from error
    return place


def _why_not(kind: str, error: BaseException) -> str:
    """Why a device cannot be used; torch's own message for a missing driver has a paragraph of advice and a URL."""
    if kind.startswith("cuda") and not torch.cuda.is_available():
        return "no usable NVIDIA GPU or driver on this machine"
    return first_line(error)


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next tensor; returns whether the C library supports it.

    By default glibc maps fresh pages for every large tensor and unmaps them when it is freed, so the kernel has to zero
    the pages of every activation in every step. Peak memory stays about the same, but is not returned to the system.
    Results do not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))


def _store_of_attempt() -> Any:
    """torchrun's store with a prefix for this restart attempt; None lets torch create its own.

    A restarted attempt shares the store of the one that died, finds the dead processes' addresses there, and cannot
    connect (github.com/pytorch/pytorch/issues/135712). Only within one node do all processes count attempts alike.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]


_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
# Of <malloc.h>. Setting either turns off glibc's own adjustment of both thresholds.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # mallopt takes an int
