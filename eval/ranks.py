"""Evaluation under torchrun: all processes embed a share of the images and search for a share of the queries.

Every process ends up with all features; the first one alone reads and writes the cache and the records.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from robx.errors import DeviceError, InputError, first_line
from robx.eval.neighbours import nearest
from robx.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `size`; `local` of them are on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The images, of `count`, that this process embeds: every size-th, so that all have like ones."""
        return range(self.rank, count, self.size)

    def gather(self, mine: np.ndarray | None) -> np.ndarray | None:
        """The rows (N_r, ...) of all processes in the order of their ranks, on every process; None adds none.

        None where no process has any. All processes have to call it, with rows of one shape and dtype.
        """
        if self.size == 1:
            return mine
        import torch
        from torch import distributed

        described: list[tuple[tuple[int, ...], str] | None] = [None] * self.size
        distributed.all_gather_object(described, None if mine is None else (mine.shape, mine.dtype.str))
        parts = []
        for rank, description in enumerate(described):
            if description is not None:
                shape, dtype = description
                rows = np.empty(shape, dtype) if mine is None or rank != self.rank else np.ascontiguousarray(mine)
                if rows.size:
                    distributed.broadcast(torch.from_numpy(rows), src=rank)
                parts.append(rows)
        return np.concatenate(parts) if parts else None

    def all_rows(self, mine: np.ndarray) -> np.ndarray:
        """As `gather`, where every process has rows, if only none of them (0, ...)."""
        found = self.gather(mine)
        return mine if found is None else found

    def nearest(
        self, bank: np.ndarray, queries: np.ndarray, k: int, *, device: str = "cpu", progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `robx.eval.neighbours.nearest`, with the queries split among the processes."""
        if self.size == 1:
            return nearest(bank, queries, k, device=device, progress=progress)
        mine = np.array_split(queries, self.size)[self.rank]
        found, numbers = nearest(bank, mine, k, device=device, progress=progress)
        return self.all_rows(found), self.all_rows(numbers)


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The processes that torchrun started, joined for the duration of the block; without torchrun this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {size} and MASTER_ADDR is not set: start the processes with torchrun")
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        yield Ranks(rank=distributed.get_rank(), size=size, local=local)
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise DeviceError(f"another process ended ({first_line(error)}): see its message") from error
    finally:
        distributed.destroy_process_group()
