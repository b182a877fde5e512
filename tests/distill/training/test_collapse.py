from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from robx.distill.training.collapse import MIN_STD, MIN_STEPS, embedding_health, not_finite, spread, warnings


def test_gaussian_embeddings_have_std_one_and_nearly_full_rank() -> None:
    torch.manual_seed(0)
    found = spread(torch.randn(4096, 16))
    assert found["embedding_std"] == pytest.approx(1.0, abs=0.02)
    assert found["embedding_rank"] == pytest.approx(16, abs=0.2)
    assert not warnings(found, step=MIN_STEPS)


def test_rank_counts_the_dimensions_in_use() -> None:
    torch.manual_seed(0)
    assert spread(torch.randn(2048, 3) @ torch.linalg.qr(torch.randn(32, 32))[0][:3])[
        "embedding_rank"
    ] == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_collapsed_student_is_noticed(noise: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    nn.init.constant_(net[1].weight, noise)  # type: ignore[arg-type]
    nn.init.constant_(net[1].bias, 1.0)  # type: ignore[arg-type]
    found = embedding_health(net, torch.randn(32, 3, 2, 2))
    assert any("collapsed" in text for text in warnings(found, step=MIN_STEPS))


def test_one_prototype_for_all_is_noticed() -> None:
    same = {"target_use": 30.0, "student_use": 1.0}
    assert any("targets use one prototype" in text for text in warnings({"target_use": 1.01}, step=1))
    assert any("same prototype" in text for text in warnings(same, step=MIN_STEPS))


def test_a_student_is_not_judged_by_its_first_steps() -> None:
    """BatchNorm's running statistics are still those of no image: a healthy network gives the same for all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Flatten())
    nn.init.constant_(net[0].bias, 100.0)  # type: ignore[arg-type, union-attr]
    images = torch.randn(64, 3, 4, 4)
    warned = []
    for step in range(1, MIN_STEPS + 1):
        net(images)
        health = embedding_health(net, images)
        warned.append(health["embedding_std"] < MIN_STD)
        assert not warnings(health | {"target_use": 30.0, "student_use": 1.0 if step < MIN_STEPS else 2.0}, step=step)
    assert warned[1] and not warned[-1]


def test_targets_without_information_are_noticed() -> None:
    uniform = {"target_entropy": math.log(8192) - 0.05, "target_use": 8192.0, "student_use": 8192.0}
    assert any("nearly uniform" in text for text in warnings(uniform, step=1, prototypes=8192))
    sharp = uniform | {"target_entropy": 6.0}
    assert warnings(uniform, step=MIN_STEPS) == [] == warnings(sharp, step=MIN_STEPS, prototypes=8192)


def test_health_leaves_running_statistics_and_mode_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    before = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
    embedding_health(net, torch.randn(16, 3, 2, 2) + 5)
    assert net.training and torch.equal(before, net[1].running_mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_names_its_images(value: float) -> None:
    error = not_finite("loss", value, step=3, images=[f"img{i}" for i in range(20)])
    assert re.search(r"loss is .* at step 3; its images are img0, .* and 12 more", str(error))
