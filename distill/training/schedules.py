"""Schedules as closed-form functions of the step: no state to save or to resume."""

from __future__ import annotations

import math

from robx.distill.recipes import Recipe


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last step, steps - 1, along half a cosine (Loshchilov & Hutter 2017)."""
    share = min(max(step / max(steps - 1, 1), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps`, and `end` after it."""
    return end if step >= steps else start + (end - start) * step / steps


def learning_rate(step: int, *, steps: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak over ``warmup_share`` of the steps, then a cosine to the final rate."""
    warmup = round(recipe.warmup_share * steps)
    if step < warmup:
        return linear(step, steps=warmup, start=recipe.first_lr, end=recipe.peak_lr)
    return cosine(step - warmup, steps=steps - warmup, start=recipe.peak_lr, end=recipe.last_lr)


def weight_decay(step: int, *, steps: int, recipe: Recipe) -> float:
    """A cosine from ``weight_decay`` to ``weight_decay_end``."""
    return cosine(step, steps=steps, start=recipe.weight_decay, end=recipe.weight_decay_end)
