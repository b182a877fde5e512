"""Measured upper bound on a run's speed, and its actual speed.

The bound is the speed of the computation alone on tensors in memory, without data loading, optimiser or logging:

    images/s <= 1 / (1 / teacher forward + 1 / student step)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from robx.distill.batches.views import Targets, Views
from robx.distill.recipes import Recipe
from robx.distill.training.learner import Learner, autocast

Item = TypeVar("Item")
MEASURE_SECONDS = 8.0
_REPEATS = 3  # of the largest part, the first of which is a warm-up


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


@dataclass(frozen=True)
class Measured:
    """A speed bound, and the last views and targets that it was measured on."""

    bound: SpeedBound
    views: Views
    targets: Sequence[Targets | None]


def measure_bound(
    learners: Sequence[Learner],
    views: Views,
    targets_of: Callable[[Views], Sequence[Targets | None]],
    *,
    recipe: Recipe,
    seconds: float = MEASURE_SECONDS,
    any_process: Callable[[bool], bool] = bool,
) -> Measured:
    """Time the computation, first of one image, then of more as long as `seconds` allow; restores the learners' state.

    One image alone may take longer on a slow machine with a large teacher; it is then the whole measurement.

    Args:
        learners: of this process.
        views: all images that may be measured.
        targets_of: returns one Targets per learner, or None where they come from the student's own forward.
        recipe: of the run.
        seconds: for everything.
        any_process: whether any process of the run says yes; processes exchange gradients and have to stop together.
    """
    began, device, total = time.perf_counter(), views.globals.device, views.globals.shape[1]
    # BatchNorm needs two crops of each size.
    images, times = (
        min(total, 2 if 1 in (len(views.globals), len(views.locals)) else 1),
        list[tuple[float, float]](),
    )  # (teacher, student) of so many images
    while True:
        part = views.first(images)
        started = _now(device)
        with autocast(recipe, device):
            targets = targets_of(part)
        between = _now(device)
        for learner, target in zip(learners, targets, strict=True):
            _learn_and_restore(learner, part, target)
        ended = _now(device)
        times.append((between - started, ended - between))
        following = min(4 * images, total)
        late = ended - began + (ended - started) * following / images > seconds
        if any_process(late or (images == total and len(times) == _REPEATS)):
            break
        if following > images:
            images, times = following, []
    teacher, student = (max(min(column), 1e-9) for column in zip(*times, strict=True))
    own = all(target is None for target in targets)
    return Measured(SpeedBound(None if own else images / teacher, images / student), part, targets)


def _learn_and_restore(learner: Learner, views: Views, targets: Targets | None) -> None:
    buffers = {name: buffer.clone() for name, buffer in learner.trained.named_buffers()}
    learner.learn(views, targets, draw=0, observe=False)
    learner.optimizer.zero_grad(set_to_none=True)
    for name, buffer in learner.trained.named_buffers():
        buffer.copy_(buffers[name])


class TimedFeed(Iterator[Item]):
    """An iterator, and the seconds that its caller has waited for it."""

    def __init__(self, feed: Iterator[Item]) -> None:
        self._feed, self.waited = feed, 0.0

    def __next__(self) -> Item:
        """The next item."""
        began = time.perf_counter()
        try:
            return next(self._feed)
        finally:
            self.waited += time.perf_counter() - began


class Rate:
    """Steps per second over the last steps, excluding pauses, and the share of that time spent waiting for images."""

    def __init__(self, *, window: int = 50) -> None:
        """Average over at most `window` steps. The first step, which waits for the loader to start, is excluded."""
        self._window, self._ends = window, list[tuple[float, float]]()

    def tick(self, *, waited: float = 0.0) -> None:
        """Record the end of a step; `waited`: the seconds since the start of the run in which images were missing."""
        self._ends = [*self._ends[-self._window :], (time.perf_counter(), waited)]

    def pause(self, seconds: float) -> None:
        """Exclude the time of a checkpoint or an evaluation."""
        self._ends = [(moment + seconds, waited) for moment, waited in self._ends]

    def steps_per_s(self) -> float:
        """The mean over the window; 0 before the second step."""
        return (len(self._ends) - 1) / self._passed() if len(self._ends) > 1 else 0.0

    def waiting(self) -> float:
        """The share of the window's time, 0 to 1, in which the step waited for the loader."""
        return (self._ends[-1][1] - self._ends[0][1]) / self._passed() if len(self._ends) > 1 else 0.0

    def _passed(self) -> float:
        return max(self._ends[-1][0] - self._ends[0][0], 1e-9)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
