"""The measurement before the first step: bounded in time on any machine, whole where there is time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from robx.distill.batches.views import Targets, Views
from robx.distill.training import speed
from robx.distill.training.dry_run import count_flops
from robx.distill.training.log import note
from robx.distill.training.speed import Rate, TimedFeed, measure_bound
from robx.trunk import build_trunk, size_error


def _views(images: int) -> Views:
    return Views(torch.zeros(2, images, 3, 4, 4), torch.zeros(2, images, 3, 2, 2), torch.arange(images))


def _measure(tiny: ModuleType, *, images: int, per_image: float, seconds: float) -> tuple[Any, list[int]]:
    seen: list[int] = []

    def targets_of(views: Views) -> list[Targets]:
        seen.append(len(views.index))
        time.sleep(per_image * len(views.index))
        return [Targets(torch.ones(2, len(views.index), 1))]

    learner: Any = SimpleNamespace(
        net=nn.Identity(),
        trained=nn.Identity(),
        learn=lambda *_, **__: None,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
    )
    return measure_bound([learner], _views(images), targets_of, recipe=tiny.tiny_recipe(), seconds=seconds), seen


def test_a_slow_teacher_is_measured_on_as_many_images_as_there_is_time_for(tiny: ModuleType) -> None:
    measured, seen = _measure(tiny, images=64, per_image=0.05, seconds=0.04)
    assert seen == [1]  # not even warmed up
    assert measured.bound.teacher == pytest.approx(20, rel=0.3)
    began = time.perf_counter()
    measured, seen = _measure(tiny, images=64, per_image=0.05, seconds=1.0)
    assert time.perf_counter() - began < 1.5 and seen == [1, 4]
    assert measured.bound.teacher == pytest.approx(20, rel=0.3) and len(measured.targets[0].probs[0]) == 4


def test_a_fast_one_is_measured_on_the_whole_batch_after_a_warm_up(tiny: ModuleType) -> None:
    _, seen = _measure(tiny, images=20, per_image=0.0, seconds=60)
    assert seen == [1, 4, 16, 20, 20, 20]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "vit_tiny_patch16_224"])
def test_operations_are_counted_without_computing(name: str) -> None:
    trunk, pixels = build_trunk(name).eval(), torch.zeros(1, 3, 64, 64)
    weights = [parameter.clone() for parameter in trunk.parameters()]
    counted = count_flops(trunk, pixels)
    plain = 2 * sum(
        m.weight.numel() for m in trunk.modules() if isinstance(m, nn.Linear)
    )  # of one token; every token costs this, and attention comes on top
    assert counted > plain and counted % 2 == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, trunk.parameters(), strict=True))
    assert size_error(trunk, 64) == "" and trunk(pixels).shape == (1, trunk.num_features)


def test_a_size_that_a_network_cannot_process_is_its_own_error() -> None:
    assert "100" in size_error(build_trunk("test_vit"), 100)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def test_the_rate_tells_how_long_the_steps_waited_for_images(clock: list[float]) -> None:
    def load() -> Iterator[int]:
        for item in range(9):
            clock[0] += 0.75 if item else 40.0  # the workers start
            yield item

    feed, rate = TimedFeed(load()), Rate()
    for item in feed:
        clock[0] += 0.25  # the step
        rate.tick(waited=feed.waited)
        if item:
            assert rate.steps_per_s() == pytest.approx(1.0) and rate.waiting() == pytest.approx(0.75)
        if item == 4:
            clock[0] += 30.0  # a checkpoint
            rate.pause(30.0)


def test_the_note_names_the_loader_only_when_it_limits(clock: list[float]) -> None:
    run = SimpleNamespace(recipe=SimpleNamespace(batch_size=8), bound=None)
    rate = Rate()
    assert note(run, None, rate) == "" and note(run, 2.0, rate) == "loss 2.000"  # type: ignore[arg-type]
    for waited, said in ((0.05, ""), (0.5, ", 50% of the time waiting for images")):
        rate = Rate()
        rate.tick()
        clock[0] += 1.0
        rate.tick(waited=waited)
        assert note(run, 2.0, rate) == f"loss 2.000, 8.0 images/s{said}"  # type: ignore[arg-type]
