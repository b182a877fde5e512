"""Heal a student: train its weights, with int8 simulated, to give the float student's embeddings of unlabelled images.

The loss is the squared error of the embedding, relative to the variance of the float embeddings: 0 is perfect, and 1 is
what a constant answer loses. The healed weights suit int8 alone. In float they are farther from the student than
before, so every float model is made from the student's own weights, and the gate compares with these.

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
from robx.progress import Progress, silent
from robx.records import Healing, Json, Preprocessing, Student, from_json, to_json
from robx.store.files import sha256_bytes

DEFAULT_MINUTES = 10.0
ENOUGH_STEPS = 1000  # a longer budget is not used up
USUAL_STEPS = 200  # of the cost that is estimated where healing was not asked for
_FEW_STEPS, _HELPFUL_STEPS = 20, 120  # too few to bring int8 closer; enough in docs/gate.md
_REVISION = 3  # increment when the training changes: older results are then ignored
_WARM_UP = 0.05  # share of the schedule
_TAILS = 1e-4  # share of an activation's values that may be left out of its range
_MUCH_CLOSER = 0.8
_RANGE_RATE = 0.003  # peak learning rate of an activation range, as a share of its width
_SAVE_SECONDS = 20.0
_MOST_MINUTES = 10_080  # a week
_RANGE_IMAGES = 256
_PACE_STEPS = 10  # how many recent steps tell the speed and the loss
_FIRST_PACE_STEPS = 3  # after these, the pace is compared with the budget for the first time
_EVAL_BATCH = 32
_NET, _ADAM = "network.", "adam."  # prefixes of tensors that are kept


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """How long and how a student is healed."""

    minutes: float = DEFAULT_MINUTES  # of training, without the reading of the images
    batch: int = 32
    lr: float = 1e-4  # peak, of Adam
    steps: int | None = None  # None: as many as fit into the minutes, and at most 1,000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if not 0 < self.minutes <= _MOST_MINUTES:
            raise InputError(
                f"--heal must be a positive number of minutes, at most {_MOST_MINUTES}, got {self.minutes:g}: give 10"
            )
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise InputError(f"batch and steps must be at least 1, got {self.batch} and {self.steps}")


@dataclass(frozen=True)
class Healed:
    """A healed network and how it came about."""

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
        settings: how long and how.
        cache: where the state is kept while healing, and the result afterwards.
        progress: called after each step.
        say: called with a line where the plan had to be shortened, or a healing is resumed or reused.

    Raises:
        InputError: too few images.
        ArtifactError: the training diverged.
    """
    name = f"heal-{_key(student, splits, settings)}.safetensors"
    stored = cache.read(name)
    if stored is not None and "healing" in (kept := load(stored)):
        say(f"healed weights of {student.timm_name} are reused from the export cache")
        return _finished(trunk, kept)
    images = read_healing_images(splits, student.preprocessing, progress=progress)
    probe = splits.calibration.normalised(student.preprocessing, slice(_RANGE_IMAGES))
    work = _Work(trunk, images, probe, settings)
    if stored is None:
        work.plan = Plan(left=settings.steps or _steps_that_fit(settings.minutes, _seconds_per_step(work), say))
    else:
        work.restore(load(stored))
        say(f"healing continues after step {work.plan.step} of {work.plan.steps}")
    _train(work, lambda: cache.write(name, save(work.state())), progress, say)
    kept = _as_tensors(work.network, work.record(student, splits.source), work.simulation.trained_ranges())
    cache.write(name, save(kept))
    return _finished(trunk, kept)


def _steps_that_fit(minutes: float, pace: float, say: Callable[[str], None]) -> int:
    """How many steps of `pace` seconds are planned for the minutes; says so where that is too few to help."""
    fits = max(1, int(60 * minutes / pace))
    if fits < _FEW_STEPS:
        needed = math.ceil(_HELPFUL_STEPS * pace / 60)
        say(
            f"warning: {minutes:g} minutes are {counted(fits, 'step')} of healing here, which hardly help: "
            f"{_HELPFUL_STEPS} steps would take about {needed} minutes (--heal {needed})"
        )
    return min(fits, ENOUGH_STEPS)


def minutes_needed(trunk: nn.Module, splits: Splits, preprocessing: Preprocessing) -> float:
    """Minutes that 200 steps of 32 images would take on this machine, from one measured step of 8 images."""
    small = 8
    probe = splits.calibration.normalised(preprocessing, slice(small))
    pixels = splits.calibration.pixels[:small]
    work = _Work(trunk, HealingImages(pixels, preprocessing, ""), probe, HealSettings(batch=small))
    return _seconds_per_step(work) * USUAL_STEPS * HealSettings().batch / small / 60


@dataclass
class Plan:
    """Where the training is, and how much of it is left; the learning rate follows `fraction`."""

    left: int  # steps
    step: int = 0
    fraction: float = 0.0  # of the schedule
    seconds: float = 0.0  # spent so far
    shortened: bool = False
    first_loss: float = 0.0  # the mean of the first steps' losses, as `_PACE_STEPS` says; for the user

    @property
    def steps(self) -> int:
        """All of them."""
        return self.step + self.left

    def lr_factor(self) -> float:
        """A short linear warm-up, then a cosine to 0."""
        return min(1.0, (self.fraction + 1e-2) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def advance(self, seconds: float, loss: float) -> None:
        """A step is done."""
        if self.step < _PACE_STEPS:
            self.first_loss += (loss - self.first_loss) / (self.step + 1)
        self.fraction += (1 - self.fraction) / self.left
        self.step, self.left, self.seconds = self.step + 1, self.left - 1, self.seconds + seconds

    def fit(self, budget: float, pace: float) -> bool:
        """Shorten the rest where it would not end within `budget` seconds at `pace` seconds a step; whether it did."""
        fits = max(1, int((budget - self.seconds) / pace))
        shortens = self.left - fits > max(0.1 * self.left, 0.05 * self.steps)  # a little too slow is left as it is
        if shortens:
            self.left, self.shortened = fits, True
        return shortens


class _Work:
    """The networks, the optimiser and the images of one healing."""

    def __init__(self, trunk: nn.Module, images: HealingImages, probe: np.ndarray, settings: HealSettings) -> None:
        self.reference, self.images, self.settings = trunk, images, settings
        self.network = copy.deepcopy(trunk).eval().requires_grad_(True)
        self.simulation = Int8Simulation(self.network)
        self.plan = Plan(left=0)
        self.probe = torch.from_numpy(probe)
        with torch.no_grad():
            self.wanted = torch.cat([trunk(piece) for piece in torch.split(self.probe, _EVAL_BATCH)])
        self.variance = float((self.wanted - self.wanted.mean(0)).square().sum(1).mean().clamp_min(1e-12))
        places = np.arange(min(_RANGE_IMAGES, len(images)))
        first = torch.from_numpy(images.crops(places, np.random.default_rng((settings.seed, 0))))
        self.learnt: list[Rounding] = []  # whose ranges are trained too
        self.loss_before = self._choose_ranges(torch.split(first, _EVAL_BATCH))
        self.optimiser = torch.optim.Adam([*self._parameters()])

    def _choose_ranges(self, batches: Sequence[Tensor]) -> float:
        """Simulate with the extremes of `batches` or, where that is much closer, without the tails; returns the error.

        Ranges that follow the extremes leave weights that suit any format's min-max calibration. Where few values are
        far out, as in EfficientNet-B0, most steps of 8 bits would be spent on those: there, the ranges are learnt.
        """
        errors = []
        for clipped in (_TAILS, 0.0):
            self.simulation.set_ranges(batches, clipped=clipped)
            errors.append(self.error())
        without_tails, extremes = errors
        if without_tails >= _MUCH_CLOSER * extremes:
            return extremes
        self.simulation.set_ranges(batches, clipped=_TAILS)
        self.learnt = self.simulation.learn_ranges()
        return without_tails

    def _parameters(self) -> Iterator[dict[str, Any]]:
        """The optimiser's groups, each with its own peak rate: a range's is relative to its width."""
        yield {"params": [*self.network.parameters()], "peak": self.settings.lr}
        for rounding in self.learnt:
            yield {"params": [rounding.scale], "peak": _RANGE_RATE * float(rounding.scale.detach())}
            yield {"params": [rounding.zero_point], "peak": _RANGE_RATE * 255}

    def batch(self, step: int) -> Tensor:
        """The crops of one step, (B, 3, H, W): a new permutation of the images for each pass over them."""
        count, size = len(self.images), self.settings.batch
        wanted = np.arange(step * size, (step + 1) * size)
        orders = {e: np.random.default_rng((self.settings.seed, 1, e)).permutation(count) for e in {*(wanted // count)}}
        places = np.array([orders[w // count][w % count] for w in wanted])
        return torch.from_numpy(self.images.crops(places, np.random.default_rng((self.settings.seed, 2, step))))

    def loss(self, pixels: Tensor) -> Tensor:
        """Squared error of the simulated embeddings of `pixels`, relative to the variance of the float ones."""
        with torch.no_grad():
            wanted = self.reference(pixels)
        error: Tensor = (self.simulation(pixels) - wanted).square().sum(1).mean() / self.variance
        return error

    @torch.no_grad()
    def error(self) -> float:
        """The loss on the probe images, which are not trained on."""
        self.simulation.hold_ranges()
        found = torch.cat([self.simulation(piece) for piece in torch.split(self.probe, _EVAL_BATCH)])
        self.simulation.hold_ranges(False)
        return float((found - self.wanted).square().sum(1).mean() / self.variance)

    def learn(self) -> float:
        """One step; returns its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.plan.lr_factor()
        loss = self.loss(self.batch(self.plan.step))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        told = {"plan": dataclasses.asdict(self.plan), "loss_before": self.loss_before}
        moments = self.optimiser.state_dict()["state"]
        return {
            "progress": _text_tensor(told),
            **{f"{_NET}{key}": value.contiguous() for key, value in self.simulation.state_dict().items()},
            **{f"{_ADAM}{i}.{key}": value for i, each in moments.items() for key, value in each.items()},
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        told = _told(state["progress"])
        self.plan, self.loss_before = Plan(**told["plan"]), told["loss_before"]
        self.simulation.load_state_dict(_below(state, _NET))
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in _below(state, _ADAM).items():
            number, _, kind = key.partition(".")
            moments[int(number)][kind] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": dict(moments), "param_groups": groups})

    def record(self, student: Student, source: str) -> Healing:
        """What was done, for the manifest."""
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


def _train(work: _Work, keep: Callable[[], None], progress: Progress, say: Callable[[str], None]) -> None:
    """Take the planned steps; `keep` saves the state every 20 seconds and after the step in which a signal arrives."""
    plan, budget = work.plan, 60 * work.settings.minutes
    recent: deque[float] = deque(maxlen=_PACE_STEPS)
    losses: deque[float] = deque(maxlen=_PACE_STEPS)
    saved, steps = time.monotonic(), 0  # of this process: a resumed healing does not know its pace yet
    try:
        while plan.left:
            began = time.monotonic()
            with deferred():  # half a step must not be kept
                losses.append(work.learn())
                if not math.isfinite(losses[-1]):
                    raise ArtifactError(f"healing diverged at step {plan.step + 1}: export without --heal")
                plan.advance(time.monotonic() - began, losses[-1])
            recent.append(time.monotonic() - began)
            steps += 1
            if work.settings.steps is None and (steps == _FIRST_PACE_STEPS or not steps % _PACE_STEPS):
                planned = plan.steps
                if plan.fit(budget, sum(recent) / len(recent)):
                    say(f"this machine has become slower: healing ends after {plan.steps} steps instead of {planned}")
            first = f" (first steps {plan.first_loss:.4f})" if plan.step > _PACE_STEPS else ""  # it is fixed from here
            progress(plan.step, plan.steps, f"healing, loss {sum(losses) / len(losses):.4f}{first}")
            if plan.left and time.monotonic() - saved > _SAVE_SECONDS:
                keep()
                saved = time.monotonic()
    except KeyboardInterrupt:
        keep()
        raise


def _seconds_per_step(work: _Work) -> float:
    """The faster of two forward and backward passes, from which nothing is learnt."""
    pixels, took = work.batch(0), list[float]()
    work.simulation.hold_ranges()
    for _ in range(2):
        began = time.monotonic()
        work.loss(pixels).backward()  # type: ignore[no-untyped-call]
        took.append(time.monotonic() - began)
    work.optimiser.zero_grad()
    work.simulation.hold_ranges(False)
    return max(min(took), 1e-6)


def _key(student: Student, splits: Splits, settings: HealSettings) -> str:
    """Twenty-four hex digits that change with the weights, the images of every kind, and the settings."""
    parts = [splits.calibration, splits.screening, splits.judging]
    key = [_REVISION, student.sha256, to_json(student.preprocessing), to_json(settings), splits.source]
    key += [part.fingerprint for part in parts]
    return sha256_bytes(repr([*key, torch.__version__]).encode())[:24]


def _as_tensors(network: nn.Module, record: Healing, ranges: list[LayerRange]) -> dict[str, Tensor]:
    """A finished healing, as it is kept."""
    state = {f"{_NET}{key}": value.contiguous() for key, value in network.state_dict().items()}
    return {"healing": _text_tensor(to_json(record)), "ranges": _text_tensor(to_json(ranges)), **state}


def _finished(trunk: nn.Module, kept: dict[str, Tensor]) -> Healed:
    """What `_as_tensors` gave, with a copy of `trunk` for the network."""
    weights, network = _below(kept, _NET), copy.deepcopy(trunk)
    network.load_state_dict(weights)
    return Healed(
        trunk=network.eval(),
        record=from_json(Healing, _told(kept["healing"])),
        sha256=sha256_bytes(save(weights)),
        ranges=tuple(LayerRange(*each) for each in _told(kept["ranges"])),
    )


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _text_tensor(value: Json) -> Tensor:
    """JSON as bytes: safetensors has no other place for it that it writes in a fixed order."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _told(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
