"""From a target branch's scores to targets, with the parts that have state: centre, temperature warm-up, queue.

RoB with a frozen teacher needs none of them, so all are off by default. The base methods need them.

Q target crops   B batch   K prototypes   M rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robx.distill.objectives.base import Objective
from robx.distill.recipes import Recipe


class TargetProcessor:
    """Turns scores into probabilities: centred, at the current temperature, by the objective's rule."""

    def __init__(
        self,
        objective: Objective,
        *,
        centering: bool = False,
        center_momentum: float = 0.9,
        temperatures: tuple[float, float] | None = None,
        warmup_epochs: int = 0,
        steps_per_epoch: int = 1,
        queue: int = 0,
    ) -> None:
        """Choose which parts are used.

        Args:
            objective: turns scores into probabilities.
            centering: subtract a running mean of the scores (DINO, arXiv 2104.14294, eq. 4).
            center_momentum: of that mean.
            temperatures: first and last of a warm-up over `warmup_epochs`; None: the objective's own.
            warmup_epochs: 0 disables the warm-up.
            steps_per_epoch: optimiser steps.
            queue: earlier rows per crop, added to the batch that Sinkhorn balances once the queue is full (SwAV,
                arXiv 2006.09882, section 3.1).
        """
        self.objective = objective
        self.centering, self.center_momentum = centering, center_momentum
        self.temperatures, self.queue_size = temperatures, queue
        self.warmup_epochs, self.steps_per_epoch = warmup_epochs, steps_per_epoch
        self.step = 0
        self.center: Tensor | None = None  # (K,)
        self.patch_center: Tensor | None = None  # (K_patch,)
        self.queue: Tensor | None = None  # (Q, at most queue_size, K or E), newest first

    @classmethod
    def of(cls, recipe: Recipe, objective: Objective, *, steps_per_epoch: int) -> TargetProcessor:
        """The processor with the recipe's settings."""
        start = recipe.teacher_temperature_start
        return cls(
            objective,
            centering=recipe.centering,
            center_momentum=recipe.center_momentum,
            temperatures=None if start is None else (start, recipe.teacher_temperature),
            warmup_epochs=recipe.teacher_temperature_epochs,
            steps_per_epoch=steps_per_epoch,
            queue=recipe.queue,
        )

    @property
    def temperature(self) -> float | None:
        """The warm-up's temperature in this step's epoch; None without a warm-up.

        One value per epoch, equally spaced, the first at the first and the last in the last warm-up epoch (DINO's
        release).
        """
        if self.temperatures is None or not self.warmup_epochs:
            return None
        first, last = self.temperatures
        epoch = self.step // self.steps_per_epoch
        if epoch >= self.warmup_epochs:
            return last
        return first + (last - first) * epoch / max(1, self.warmup_epochs - 1)

    @torch.no_grad()
    def probs(
        self, scores: Tensor, *, embeddings: Tensor | None = None, score: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Scores (Q, B, K) -> targets (Q, B, K), by the current centre and queue, which are then updated.

        A branch whose prototypes change gives the `embeddings` (Q, B, E) behind the scores, which are queued in their
        place, and `score`, which maps queued ones (N, E) to scores (N, K) with today's prototypes.
        """
        batch = scores.shape[1]
        shaped = scores
        if self.centering:
            shaped = scores if self.center is None else scores - self.center
            self.center = self._moved(self.center, scores.float().mean(dim=(0, 1)))
        if self.queue_size and self.queue is not None and self.queue.shape[1] == self.queue_size:
            earlier = self.queue if score is None else torch.stack([score(crop) for crop in self.queue])
            shaped = torch.cat([shaped, earlier], dim=1)
        targets = self.objective.target_probs(shaped, temperature=self.temperature)[:, :batch]
        if self.queue_size:
            new = scores if embeddings is None else embeddings
            rows = [new] if self.queue is None else [new, self.queue]
            self.queue = torch.cat(rows, dim=1)[:, : self.queue_size].clone()
        return targets

    @torch.no_grad()
    def patch_probs(self, scores: Tensor, *, mean: Tensor | None = None) -> Tensor:
        """Patch scores (..., K) -> targets of the same shape; `mean` (K,) of all patches updates their centre.

        iBOT, arXiv 2111.07832, keeps a centre for the patches beside that of the CLS token.
        """
        shaped = scores
        if self.centering and mean is not None:
            shaped = scores if self.patch_center is None else scores - self.patch_center
            self.patch_center = self._moved(self.patch_center, mean.float())
        return self.objective.patch_probs(shaped, temperature=self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """The state, for the checkpoint."""
        return {
            "step": self.step,
            "center": self.center,
            "patch_center": self.patch_center,
            "queue": self.queue,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.step, self.center = state["step"], state["center"]
        self.patch_center, self.queue = state["patch_center"], state["queue"]

    def _moved(self, center: Tensor | None, mean: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        start = torch.zeros_like(mean) if center is None else center
        return torch.lerp(mean, start, self.center_momentum)
