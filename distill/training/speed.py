"""Measured upper bound on a run's speed, and its actual speed.

The bound is the speed of the computation alone on tensors in memory, without data loading, optimiser or logging:

    images/s <= 1 / (1 / teacher forward + 1 / student step)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from robx.distill.batches.views import Targets, Views
from robx.distill.recipes import Recipe
from robx.distill.training.learner import Learner, autocast


@dataclass(frozen=True)
class SpeedBound:
    """Images per second of each part alone, for this process."""

    teacher: float | None  # forward of the target branch; None if the student's own scores are the targets
    student: float  # forward and backward of all students

    @property
    def images_per_s(self) -> float:
        """Both parts together."""
        return 1 / ((1 / self.teacher if self.teacher else 0.0) + 1 / self.student)

    @property
    def parts(self) -> str:
        """Both parts as text."""
        teacher = "no target branch" if self.teacher is None else f"target branch alone {self.teacher:.1f}"
        return f"{teacher}, students alone {self.student:.1f}"


def measure_bound(
    learners: Sequence[Learner],
    views: Views,
    targets_of: Callable[[Views], Sequence[Targets | None]],
    *,
    recipe: Recipe,
    repeats: int = 2,
) -> SpeedBound:
    """Time the computation of one micro-batch; the learners' state is restored, bit for bit.

    `targets_of` returns one Targets per learner, or None where they come from the student's own forward.
    """
    device, images = views.globals.device, views.globals.shape[1]
    teacher = student = float("inf")
    for _ in range(repeats + 1):  # the first is a warm-up
        started = _now(device)
        with autocast(recipe, device):
            targets = targets_of(views)
        between = _now(device)
        for learner, target in zip(learners, targets, strict=True):
            buffers = {name: buffer.clone() for name, buffer in learner.net.named_buffers()}
            learner.learn(views, target, draw=0, observe=False)
            learner.optimizer.zero_grad(set_to_none=True)
            for name, buffer in learner.net.named_buffers():
                buffer.copy_(buffers[name])
        ended = _now(device)
        teacher, student = min(teacher, between - started), min(student, ended - between)
    own = all(target is None for target in targets)
    return SpeedBound(None if own else images / max(teacher, 1e-9), images / max(student, 1e-9))


class Rate:
    """Steps per second over the last steps, excluding pauses."""

    def __init__(self, *, window: int = 50) -> None:
        """Average over at most `window` steps. The first step, which waits for the loader to start, is excluded."""
        self._window, self._times = window, list[float]()

    def tick(self) -> None:
        """Record the end of a step."""
        self._times = [*self._times[-self._window :], time.perf_counter()]

    def pause(self, seconds: float) -> None:
        """Exclude the time of a checkpoint or an evaluation."""
        self._times = [moment + seconds for moment in self._times]

    def steps_per_s(self) -> float:
        """The mean over the window; 0 before the second step."""
        if len(self._times) < 2:
            return 0.0
        passed = self._times[-1] - self._times[0]
        return (len(self._times) - 1) / max(passed, 1e-9)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
