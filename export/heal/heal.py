"""Heal a student: fine-tune it with int8 simulated until it gives the float student's embeddings, without labels.

The loss is the squared error of the embedding, relative to the variance of the float embeddings: 0 is perfect, and the
mean embedding, whatever the image, has a loss of 1. The healed weights are for int8 alone: in float they are farther
from the student than before. Every float model is therefore made from the student's own weights, and the gate compares
with these.

A step is a function of (settings, images, step), so a resumed healing equals an uninterrupted one, bit for bit on a
CPU, as long as it was planned with the same number of steps.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from robx.errors import ArtifactError, InputError, counted
from robx.export.cache import Cache
from robx.export.heal.images import HealingImages, read_healing_images
from robx.export.image_splits import Splits
from robx.int8_simulation import Int8Simulation, LayerRange, Rounding
from robx.interrupts import deferred
from robx.progress import Fact, Progress, silent
from robx.records import Healing, Json, Preprocessing, Student, from_json, to_json
from robx.store.files import sha256_bytes

DEFAULT_MINUTES = 10.0
MAX_STEPS = 1000  # whatever the budget
USUAL_STEPS = 200  # whose cost is estimated if healing was not asked for
_FEW_STEPS, _HELPFUL_STEPS = 20, 120  # fewer hardly help; as many helped in docs/gate.md
_REVISION = 3  # increment when the training changes: older results are then ignored
_WARM_UP = 0.05  # share of the schedule
_TAILS = 1e-4  # share of an activation's values that its range may clip
_MUCH_CLOSER = 0.8  # clip only if that leaves less than this share of the error
_RANGE_RATE = 0.003  # peak learning rate of an activation range, as a share of its width
_SAVE_SECONDS = 20.0
_MOST_MINUTES = 10_080  # a week
_RANGE_IMAGES = 256  # images that the ranges start from, and images of the probe
_PACE_STEPS = 10  # recent steps that speed and loss are averaged over
_FIRST_PACE_STEPS = 3  # after these, the pace is compared with the budget for the first time
_EVAL_BATCH = 32
_NET, _ADAM = "network.", "adam."  # prefixes of the stored tensors


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """How a student is healed, and for how long."""

    minutes: float = DEFAULT_MINUTES  # of training; reading the images is not included
    batch: int = 32
    lr: float = 1e-4  # peak, of Adam
    steps: int | None = None  # None: as many as fit into the minutes, and at most 1,000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.minutes <= _MOST_MINUTES:
            raise InputError(
                f"--heal must be a positive number of minutes, at most {_MOST_MINUTES}, got {self.minutes:g}: give 10"
            )
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise InputError(f"batch and steps must be at least 1, got {self.batch} and {self.steps}")


@dataclass(frozen=True)
class Healed:
    """A healed network, and the record of its training."""

    trunk: nn.Module  # plain weights, in eval mode
    record: Healing
    sha256: str  # of its weights
    ranges: tuple[LayerRange, ...]  # of the activations, trained with the weights


def heal(
    trunk: nn.Module,
    student: Student,
    splits: Splits,
    settings: HealSettings,
    *,
    cache: Cache,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Healed:
    """Train a copy of `trunk` until int8 gives its embeddings; a finished healing is reused, an unfinished one resumed.

    Args:
        trunk: the fp32 student in its exported form: pixels (n, 3, H, W) -> embeddings (n, D). It is not changed.
        student: its record.
        splits: the images of the export; those that calibrate, screen and judge are not used.
        settings: how it is trained, and for how long.
        cache: holds the state during the training, and the result afterwards.
        progress: called after each step.
        say: called with a line if the plan is shortened, or a healing is resumed or reused.

    Raises:
        InputError: too few images.
        ArtifactError: the training diverged.
    """
    name = f"heal-{_key(student, splits, settings)}.safetensors"
    stored = cache.read(name)
    if stored is not None and "healing" in (kept := load(stored)):
        say(Fact(f"healed weights of {student.timm_name} are reused from the export cache"))
        return _load_result(trunk, kept)
    images = read_healing_images(splits, student.preprocessing, progress=progress)
    probe = splits.calibration.normalised(student.preprocessing, slice(_RANGE_IMAGES))
    trainer = _Trainer(trunk, images, probe, settings)
    if stored is None:
        trainer.plan = Plan(left=settings.steps or _steps_that_fit(settings.minutes, _seconds_per_step(trainer), say))
    else:
        trainer.restore(load(stored))
        say(Fact(f"healing continues after step {trainer.plan.step} of {trainer.plan.steps}"))
    _train(trainer, lambda: cache.write(name, save(trainer.state())), progress, say)
    kept = _result_tensors(trainer.network, trainer.record(student, splits.source), trainer.simulation.trained_ranges())
    cache.write(name, save(kept))
    return _load_result(trunk, kept)


def _steps_that_fit(minutes: float, pace: float, say: Callable[[str], None]) -> int:
    """How many steps of `pace` seconds are planned for the minutes; warns if they are too few to help."""
    fits = max(1, int(60 * minutes / pace))
    if fits < _FEW_STEPS:
        needed = math.ceil(_HELPFUL_STEPS * pace / 60)
        say(
            f"warning: {minutes:g} minutes are {counted(fits, 'step')} of healing here, which hardly help: "
            f"{_HELPFUL_STEPS} steps would take about {needed} minutes (--heal {needed})"
        )
    return min(fits, MAX_STEPS)


def minutes_needed(trunk: nn.Module, splits: Splits, preprocessing: Preprocessing) -> float:
    """Minutes that 200 steps of 32 images would take on this machine, from one measured step of 8 images."""
    small = 8
    probe = splits.calibration.normalised(preprocessing, slice(small))
    pixels = splits.calibration.pixels[:small]
    trainer = _Trainer(trunk, HealingImages(pixels, preprocessing, ""), probe, HealSettings(batch=small))
    return _seconds_per_step(trainer) * USUAL_STEPS * HealSettings().batch / small / 60


@dataclass
class Plan:
    """How far the training has come, and how many steps are left; the learning rate follows `fraction`."""

    left: int  # steps
    step: int = 0
    fraction: float = 0.0  # of the schedule
    seconds: float = 0.0  # spent so far
    shortened: bool = False
    first_loss: float = 0.0  # mean of the first `_PACE_STEPS` steps, for the user

    @property
    def steps(self) -> int:
        """All of them."""
        return self.step + self.left

    def lr_factor(self) -> float:
        """A short linear warm-up, then a cosine to 0."""
        return min(1.0, (self.fraction + 1e-2) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def advance(self, seconds: float, loss: float) -> None:
        """Count a step that took `seconds`."""
        if self.step < _PACE_STEPS:
            self.first_loss += (loss - self.first_loss) / (self.step + 1)
        self.fraction += (1 - self.fraction) / self.left
        self.step, self.left, self.seconds = self.step + 1, self.left - 1, self.seconds + seconds

    def fit(self, budget: float, pace: float) -> bool:
        """Drop steps that do not fit into `budget` seconds at `pace` seconds a step; returns whether there were any."""
        fits = max(1, int((budget - self.seconds) / pace))
        shortens = self.left - fits > max(0.1 * self.left, 0.05 * self.steps)  # small delays are tolerated
        if shortens:
            self.left, self.shortened = fits, True
        return shortens


class _Trainer:
    """The networks, the optimiser and the images of one healing."""

    def __init__(self, trunk: nn.Module, images: HealingImages, probe: np.ndarray, settings: HealSettings) -> None:
        self.reference, self.images, self.settings = trunk, images, settings
        self.network = copy.deepcopy(trunk).eval().requires_grad_(True)
        self.simulation = Int8Simulation(self.network)
        self.plan = Plan(left=0)
        self.probe = torch.from_numpy(probe)
        with torch.no_grad():
            self.targets = torch.cat([trunk(piece) for piece in torch.split(self.probe, _EVAL_BATCH)])
        self.variance = float((self.targets - self.targets.mean(0)).square().sum(1).mean().clamp_min(1e-12))
        indices = np.arange(min(_RANGE_IMAGES, len(images)))
        first = torch.from_numpy(images.crops(indices, np.random.default_rng((settings.seed, 0))))
        self.learned: list[Rounding] = []  # whose ranges are trained too
        self.loss_before = self._choose_ranges(torch.split(first, _EVAL_BATCH))
        self.optimiser = torch.optim.Adam([*self._parameters()])

    def _choose_ranges(self, batches: Sequence[Tensor]) -> float:
        """Start from the extremes of `batches` or, if that is much closer, without their tails; returns the error.

        Weights that are trained with ranges that follow the extremes suit any format's min-max calibration. If a few
        values are far out, as in EfficientNet-B0, such ranges waste most of the 256 levels: they are learned instead.
        """
        self.simulation.set_ranges(batches, clipped=_TAILS)
        clipped, without_tails = copy.deepcopy(self.simulation.ranges()), self.error()
        self.simulation.set_ranges(batches)
        extremes = self.error()
        if without_tails >= _MUCH_CLOSER * extremes:
            return extremes
        self.simulation.load_ranges(clipped)
        self.learned = self.simulation.learn_ranges()
        return without_tails

    def _parameters(self) -> Iterator[dict[str, Any]]:
        """The optimiser's groups, each with its own peak rate: a range's is relative to its width."""
        yield {"params": [*self.network.parameters()], "peak": self.settings.lr}
        for rounding in self.learned:
            yield {"params": [rounding.scale], "peak": _RANGE_RATE * float(rounding.scale.detach())}
            yield {"params": [rounding.zero_point], "peak": _RANGE_RATE * 255}

    def batch(self, step: int) -> Tensor:
        """The crops of one step, (B, 3, H, W); each epoch has a permutation of its own."""
        count, size = len(self.images), self.settings.batch
        draws = np.arange(step * size, (step + 1) * size)
        orders = {e: np.random.default_rng((self.settings.seed, 1, e)).permutation(count) for e in {*(draws // count)}}
        indices = np.array([orders[draw // count][draw % count] for draw in draws])
        return torch.from_numpy(self.images.crops(indices, np.random.default_rng((self.settings.seed, 2, step))))

    def loss(self, pixels: Tensor) -> Tensor:
        """Squared error of the simulated embeddings of `pixels`, relative to the variance of the float ones."""
        with torch.no_grad():
            targets = self.reference(pixels)
        error: Tensor = (self.simulation(pixels) - targets).square().sum(1).mean() / self.variance
        return error

    @torch.no_grad()
    def error(self) -> float:
        """The loss on the probe images, which are not trained on."""
        self.simulation.hold_ranges()
        answers = torch.cat([self.simulation(piece) for piece in torch.split(self.probe, _EVAL_BATCH)])
        self.simulation.hold_ranges(False)
        return float((answers - self.targets).square().sum(1).mean() / self.variance)

    def train_step(self) -> float:
        """Take one step; returns its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.plan.lr_factor()
        loss = self.loss(self.batch(self.plan.step))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        progress = {"plan": dataclasses.asdict(self.plan), "loss_before": self.loss_before}
        moments = self.optimiser.state_dict()["state"]
        return {
            "progress": _json_tensor(progress),
            **{f"{_NET}{key}": value.contiguous() for key, value in self.simulation.state_dict().items()},
            **{f"{_ADAM}{i}.{key}": value for i, each in moments.items() for key, value in each.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        progress = _from_json_tensor(state["progress"])
        self.plan, self.loss_before = Plan(**progress["plan"]), progress["loss_before"]
        self.simulation.load_state_dict(_without_prefix(state, _NET))
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in _without_prefix(state, _ADAM).items():
            number, _, kind = key.partition(".")
            moments[int(number)][kind] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": dict(moments), "param_groups": groups})

    def record(self, student: Student, source: str) -> Healing:
        """The record of the training, for the manifest."""
        return Healing(
            student_sha256=student.sha256,
            images=len(self.images),
            fingerprint=self.images.fingerprint,
            source=source,
            steps=self.plan.step,
            batch=self.settings.batch,
            minutes=self.plan.seconds / 60,
            loss_before=self.loss_before,
            loss_after=self.error(),
            shortened=self.plan.shortened,
            seed=self.settings.seed,
        )


def _train(trainer: _Trainer, save_state: Callable[[], None], progress: Progress, say: Callable[[str], None]) -> None:
    """Take the planned steps; `save_state` is called every 20 seconds, and after the step that a signal interrupts."""
    plan, budget = trainer.plan, 60 * trainer.settings.minutes
    recent: deque[float] = deque(maxlen=_PACE_STEPS)
    losses: deque[float] = deque(maxlen=_PACE_STEPS)
    saved, steps = time.monotonic(), 0  # of this process: a resumed healing does not know its pace yet
    try:
        while plan.left:
            began = time.monotonic()
            with deferred():  # half a step must not be saved
                losses.append(trainer.train_step())
                if not math.isfinite(losses[-1]):
                    raise ArtifactError(f"healing diverged at step {plan.step + 1}: export without --heal")
                plan.advance(time.monotonic() - began, losses[-1])
            recent.append(time.monotonic() - began)
            steps += 1
            if trainer.settings.steps is None and (steps == _FIRST_PACE_STEPS or not steps % _PACE_STEPS):
                planned = plan.steps
                if plan.fit(budget, sum(recent) / len(recent)):
                    say(f"this machine has become slower: healing ends after {plan.steps} steps instead of {planned}")
            first = f" (first steps {plan.first_loss:.4f})" if plan.step > _PACE_STEPS else ""  # once it is complete
            progress(plan.step, plan.steps, f"healing, loss {sum(losses) / len(losses):.4f}{first}")
            if plan.left and time.monotonic() - saved > _SAVE_SECONDS:
                save_state()
                saved = time.monotonic()
    except KeyboardInterrupt:
        save_state()
        raise


def _seconds_per_step(trainer: _Trainer) -> float:
    """Seconds of the faster of two forward and backward passes, without an update."""
    pixels, took = trainer.batch(0), list[float]()
    trainer.simulation.hold_ranges()
    for _ in range(2):
        began = time.monotonic()
        trainer.loss(pixels).backward()  # type: ignore[no-untyped-call]
        took.append(time.monotonic() - began)
    trainer.optimiser.zero_grad()
    trainer.simulation.hold_ranges(False)
    return max(min(took), 1e-6)


def _key(student: Student, splits: Splits, settings: HealSettings) -> str:
    """Twenty-four hex digits that change with the weights, the images of each part, and the settings."""
    parts = [splits.calibration, splits.screening, splits.judging]
    key = [_REVISION, student.sha256, to_json(student.preprocessing), to_json(settings), splits.source]
    key += [part.fingerprint for part in parts]
    return sha256_bytes(repr([*key, torch.__version__]).encode())[:24]


def _result_tensors(network: nn.Module, record: Healing, ranges: list[LayerRange]) -> dict[str, Tensor]:
    """A finished healing, as it is stored."""
    state = {f"{_NET}{key}": value.contiguous() for key, value in network.state_dict().items()}
    return {"healing": _json_tensor(to_json(record)), "ranges": _json_tensor(to_json(ranges)), **state}


def _load_result(trunk: nn.Module, kept: dict[str, Tensor]) -> Healed:
    """The inverse of `_result_tensors`; the network is a copy of `trunk` with the healed weights."""
    weights, network = _without_prefix(kept, _NET), copy.deepcopy(trunk)
    network.load_state_dict(weights)
    return Healed(
        trunk=network.eval(),
        record=from_json(Healing, _from_json_tensor(kept["healing"])),
        sha256=sha256_bytes(save(weights)),
        ranges=tuple(LayerRange(*each) for each in _from_json_tensor(kept["ranges"])),
    )


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _json_tensor(value: Json) -> Tensor:
    """JSON as a tensor of bytes: safetensors writes its own metadata in no fixed order."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_json_tensor(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
