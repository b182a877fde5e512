"""Supervised distillation, the paper's comparison: match a classifier's softened class probabilities.

    T^2 KL(softmax(z_t / T) || softmax(z_s / T)),  T = 10        (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2)

T^2 makes the size of the gradient independent of T.

Q target crops   V student crops   B batch   K classes
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, TeacherSpec, Traits, loss_stats
from robx.distill.objectives.cross_entropy import crop_pairs, crops_cross_entropy
from robx.distill.objectives.sinkhorn import assignments
from robx.distill.recipes import Recipe


def divergence(scores: Tensor, targets: Targets, *, temperature: float) -> Tensor:
    """Mean over the same-view pairs and the batch of KL(targets || softmax(scores / temperature)), a scalar.

    The targets' entropy, which has no gradient, is subtracted for dense targets only; with stored (sparse) targets the
    result is the cross-entropy.
    """
    pairs = crop_pairs("same", student_crops=scores.shape[0], teacher_crops=targets.probs.shape[0])
    cross = crops_cross_entropy(scores, targets, pairs=pairs, temperature=temperature)
    if targets.columns is not None:
        return cross
    entropies = torch.special.entr(targets.probs).sum(dim=-1).mean(dim=1)
    return cross - torch.stack([entropies[q] for q, _ in pairs]).mean()


class SupervisedKd(nn.Module):
    """Distillation of a classifier's logits."""

    traits: ClassVar[Traits] = Traits(title="supervised distillation", teacher="classifier", soft_targets=True)

    def __init__(self, *, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = temperature

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The objective with the recipe's settings; one temperature serves teacher and student."""
        return cls(temperature=recipe.teacher_temperature)

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """A linear classifier."""
        return nn.Linear(width, outputs)

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Logits (Q, B, K) -> probabilities (Q, B, K)."""
        return assignments(scores, temperature=self.temperature if temperature is None else temperature, iterations=0)

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Not available: this method has no targets for patches."""
        raise NotImplementedError(f"{self.traits.title} has no targets for patches")

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        loss = self.temperature**2 * divergence(scores.crops, targets, temperature=self.temperature)
        return loss, loss_stats(scores.crops, targets, temperature=self.temperature) if observe else {}
