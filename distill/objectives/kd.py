"""Supervised distillation, the paper's comparison: match a classifier's softened class probabilities.

    T^2 KL(softmax(z_t / T) || softmax(z_s / T)),  T = 10        (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2)

T^2 keeps the gradient's size independent of T.

Q target crops   V student crops   B batch   K classes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, loss_stats
from robx.distill.objectives.cross_entropy import crops_cross_entropy
from robx.distill.objectives.pairs import crop_pairs
from robx.distill.objectives.sinkhorn import assignments


def divergence(scores: Tensor, targets: Targets, *, temperature: float) -> Tensor:
    """Mean over the same-view pairs and the batch of KL(targets || softmax(scores / temperature)), a scalar.

    The targets' entropy, which has no gradient, is taken from dense targets only; stored (sparse) ones leave the
    cross-entropy.
    """
    pairs = crop_pairs("same", student_crops=scores.shape[0], teacher_crops=targets.probs.shape[0])
    cross = crops_cross_entropy(scores, targets, pairs=pairs, temperature=temperature)
    if targets.columns is not None:
        return cross
    entropies = torch.special.entr(targets.probs).sum(dim=-1).mean(dim=1)
    return cross - torch.stack([entropies[q] for q, _ in pairs]).mean()


class SupervisedKd(nn.Module):
    """Distillation of a classifier's logits."""

    def __init__(self, *, temperature: float = 10.0) -> None:
        super().__init__()
        self.temperature = temperature

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Logits (Q, B, K) -> probabilities (Q, B, K)."""
        return assignments(scores, temperature=self.temperature if temperature is None else temperature, iterations=0)

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        loss = self.temperature**2 * divergence(scores.crops, targets, temperature=self.temperature)
        return loss, loss_stats(scores.crops, targets, temperature=self.temperature) if observe else {}
