"""What the host reads of a step: losses, gradient norms, statistics, and whether all of it is finite.

On a CPU the values of a step are judged before its update. A GPU runs behind the host: reading a value at once would
make the host wait, and then the GPU for its next kernels. So the values are copied while the next step is prepared, and
judged then: the one synchronisation of a step. A step that is not finite is found one step late, and nothing of it is
saved: the loop judges what is pending (``settle``) before it writes a checkpoint, evaluates, or checks for collapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robx.distill.objectives.base import Stats
from robx.distill.training.collapse import not_finite, targets_not_finite


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """One step's values on its device; one entry per student."""

    step: int
    index: Sequence[Tensor]  # of the images, by micro-batch, on the CPU
    targets_finite: Tensor  # 0-dim bool
    losses: Sequence[Tensor]  # 0-dim
    norms: Sequence[Tensor]  # 0-dim, of the gradients before clipping
    stats: Sequence[Stats]
    logs: bool  # whether they go into the metrics


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """The same on the host, and finite."""

    step: int
    losses: list[float]
    norms: list[float]
    stats: list[dict[str, float]]
    logs: bool


def reads_late(device: torch.device) -> bool:
    """Whether the host reads a step's values while the next one is computed."""
    return device.type == "cuda"


class Readings:
    """The steps whose values are on their way to the host: none on a CPU, at most one on a GPU."""

    def __init__(self, *, late: bool, key: Callable[[int], str], scaled: bool) -> None:
        """`key` names an image by its index; with a loss scaler (`scaled`) gradients may be infinite."""
        self._late, self._key, self._scaled = late, key, scaled
        self._pending: tuple[StepTensors, HostCopy] | None = None

    def put(self, tensors: StepTensors) -> list[StepValues]:
        """Start reading a step's values; returns those that have arrived, of this step or of the one before it.

        Raises:
            NotFinite: a value of the step that arrived is NaN or infinite; the message names the step and its images.
        """
        earlier = self._pending
        self._pending = tensors, HostCopy(_flat(tensors))
        if not self._late:
            return self.settle()
        return [] if earlier is None else [self._judged(*earlier)]

    def settle(self) -> list[StepValues]:
        """Wait for what is pending and return it.

        Raises:
            NotFinite: as ``put``.
        """
        pending, self._pending = self._pending, None
        return [] if pending is None else [self._judged(*pending)]

    def _judged(self, tensors: StepTensors, copy: HostCopy) -> StepValues:
        flat = iter(copy.values())
        targets_finite = bool(next(flat))
        values = StepValues(
            step=tensors.step,
            losses=[next(flat) for _ in tensors.losses],
            norms=[next(flat) for _ in tensors.norms],
            stats=[{name: next(flat) for name in stats} for stats in tensors.stats],
            logs=tensors.logs,
        )
        if not targets_finite:
            raise targets_not_finite(step=values.step, images=self._images(tensors))
        for name, found in (("loss", values.losses), ("gradient", [] if self._scaled else values.norms)):
            for value in found:
                if not math.isfinite(value):
                    raise not_finite(name, value, step=values.step, images=self._images(tensors))
        return values

    def _images(self, tensors: StepTensors) -> list[str]:
        return [self._key(index) for part in tensors.index for index in part.tolist()]


class HostCopy:
    """Scalars on their way to the host."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        """Start the copy of 0-dim tensors of one device; it does not wait for them to be computed."""
        stacked = torch.stack([scalar.detach().double() for scalar in scalars])
        self._host, self._done = stacked, None
        if stacked.is_cuda:
            self._host = torch.empty(len(stacked), dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(stacked.device))

    def values(self) -> list[float]:
        """The scalars, once they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        found: list[float] = self._host.tolist()
        return found


def _flat(tensors: StepTensors) -> list[Tensor]:
    statistics = [value for stats in tensors.stats for value in stats.values()]
    return [tensors.targets_finite, *tensors.losses, *tensors.norms, *statistics]
