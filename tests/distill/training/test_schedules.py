from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robx.distill.recipes import StudentKind, override, preset
from robx.distill.training.schedules import cosine, learning_rate, linear, weight_decay


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19, eta_min=0.5)
    for step in range(20):
        assert cosine(step, steps=20, start=2.0, end=0.5) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        schedule.step()


@given(steps=st.integers(2, 10_000), start=st.floats(-10, 10), end=st.floats(-10, 10))
def test_cosine_ends_and_middle(steps: int, start: float, end: float) -> None:
    assert cosine(0, steps=steps, start=start, end=end) == pytest.approx(start, abs=1e-9)
    assert cosine(steps - 1, steps=steps, start=start, end=end) == pytest.approx(end, abs=1e-9)
    assert cosine(steps + 5, steps=steps, start=start, end=end) == pytest.approx(end, abs=1e-9)
    middle = (cosine(1, steps=steps, start=start, end=end) + cosine(steps - 2, steps=steps, start=start, end=end)) / 2
    assert middle == pytest.approx((start + end) / 2, abs=1e-9)


def test_linear() -> None:
    assert [linear(s, steps=4, start=0.0, end=8.0) for s in range(6)] == [0, 2, 4, 6, 8, 8]


def test_learning_rate_warms_up_from_its_start_peaks_and_ends() -> None:
    recipe = override(preset("swav", "cnn"), {"batch_size": 2048})
    rates = [learning_rate(step, steps=1000, recipe=recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(0.3 / 2) and rates[100] == max(rates) == pytest.approx(4.8 / 2)
    assert rates[50] == pytest.approx((0.15 + 2.4) / 2)
    assert rates[-1] == pytest.approx(4.8e-3 / 2)
    assert all(a < b for a, b in itertools.pairwise(rates[:101]))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_linear_scaling_by_the_batch() -> None:
    recipe = preset("dino", "vit")
    assert recipe.peak_lr == pytest.approx(2e-3)
    assert override(recipe, {"batch_size": 256}).peak_lr == pytest.approx(5e-4)
    assert override(recipe, {"batch_size": 256, "lr_batch": None}).peak_lr == pytest.approx(2e-3)


@pytest.mark.parametrize("batch", [4096, 256, 32, 1])
def test_the_rate_falls_to_the_same_share_of_its_peak_at_any_batch(batch: int) -> None:
    """SwAV's own small recipe says so too: peak 0.6 and end 0.0006 at a batch of 256 against 4.8 and 0.0048."""
    recipe = override(preset("swav", "cnn"), {"batch_size": batch})
    rates = [learning_rate(step, steps=50, recipe=recipe) for step in range(50)]
    assert rates[-1] / max(rates) == pytest.approx(1e-3)
    flat = override(recipe, {"final_lr": 9.0})
    assert learning_rate(49, steps=50, recipe=flat) == pytest.approx(flat.peak_lr)  # it never rises


def test_weight_decay_follows_its_cosine() -> None:
    recipe = preset("ibot", "vit")
    decays = [weight_decay(step, steps=11, recipe=recipe) for step in range(11)]
    assert decays[0] == pytest.approx(0.04) and decays[5] == pytest.approx(0.26) and decays[-1] == pytest.approx(0.48)


@pytest.mark.parametrize(("method", "kind"), [("dino", "vit"), ("ibot", "vit"), ("dino", "cnn")])
def test_the_first_step_takes_the_first_rate_and_the_last_step_the_last(method: str, kind: StudentKind) -> None:
    recipe = override(preset(method, kind), {"batch_size": 256})
    rates = [learning_rate(step, steps=300, recipe=recipe) for step in range(300)]
    assert (rates[0], rates[-1]) == (pytest.approx(1e-5 / 4), pytest.approx(1e-5 / 4))
    assert max(rates) == pytest.approx(recipe.lr / 4) and rates[1] > rates[0]
