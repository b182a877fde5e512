"""RoB-MSN: match the teacher's assignment to its prototypes (arXiv 2301.09451; MSN, arXiv 2204.07141).

    p_t = softmax(cos_t / 0.025)  =  sharpen(softmax(cos_t / 0.1), T = 0.25)     H(p_t, softmax(z_s / 0.1))

MSN's guards against collapse, Sinkhorn on the targets and mean-entropy maximisation (me-max), are off by default.

Q target crops   V student crops   B batch   K prototypes
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, TeacherSpec, Traits, loss_stats
from robx.distill.objectives.cross_entropy import Pairing, crop_pairs, crops_cross_entropy
from robx.distill.objectives.sinkhorn import assignments, wide
from robx.distill.recipes import Recipe
from robx.distill.students.projection_heads import MsnHead


@torch.no_grad()
def msn_targets(cosines: Tensor, *, temperature: float, sinkhorn_iterations: int = 0) -> Tensor:
    """softmax(cosines / temperature) of (Q, B, K), in float32 (MSN, arXiv 2204.07141, section 3).

    Sharpening a softmax of temperature tau by p^(1/T) / sum p^(1/T) is the softmax of temperature tau T. With
    iterations, Sinkhorn is applied to those probabilities, crop by crop.
    """
    if not sinkhorn_iterations:
        return assignments(cosines, temperature=temperature, iterations=0)
    logs = (wide(cosines) / temperature).log_softmax(dim=-1)
    return assignments(logs, temperature=1.0, iterations=sinkhorn_iterations)


def mean_entropy(scores: Tensor, *, temperature: float) -> Tensor:
    """The entropy of the student's mean prediction over crops and batch (V, B, K), which MSN maximises (section 3).

    Under torch.distributed the mean is taken over all processes' batches, and the gradient is scaled so that DDP's mean
    over processes is the true gradient.
    """
    mean = (scores / temperature).softmax(dim=-1).mean(dim=(0, 1))
    if dist.is_available() and dist.is_initialized():
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        # Forward uses the global mean, backward only this process's share.
        mean = mean + (everywhere / dist.get_world_size() - mean.detach())
    return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


class RobMsn(nn.Module):
    """The objective of RoB-MSN, and of MSN with an EMA branch, swapped pairs, Sinkhorn and me-max."""

    # MSN scores targets and anchors with the same prototypes; only its encoder is averaged.
    traits: ClassVar[Traits] = Traits(
        title="MSN",
        teacher="prototypes",
        drops_patches=True,
        momentum="linear",
        not_averaged=("head.prototypes",),
    )

    def __init__(
        self,
        *,
        teacher_temperature: float = 0.025,
        student_temperature: float = 0.1,
        pairing: Pairing = "same",
        sinkhorn_iterations: int = 0,
        me_max: float = 0.0,
    ) -> None:
        super().__init__()
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.pairing, self.sinkhorn_iterations, self.me_max = pairing, sinkhorn_iterations, me_max

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The objective with the recipe's settings."""
        return cls(
            teacher_temperature=recipe.teacher_temperature,
            student_temperature=recipe.student_temperature,
            pairing=recipe.pairing,
            sinkhorn_iterations=recipe.sinkhorn_iterations,
            me_max=recipe.me_max,
        )

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """MSN's projection and prototypes."""
        return MsnHead(width, outputs)

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Cosines (Q, B, K) -> probabilities (Q, B, K)."""
        tau = self.teacher_temperature if temperature is None else temperature
        return msn_targets(scores, temperature=tau, sinkhorn_iterations=self.sinkhorn_iterations)

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Not available: this method has no targets for patches."""
        raise NotImplementedError(f"{self.traits.title} has no targets for patches")

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        student = scores.crops
        pairs = crop_pairs(self.pairing, student_crops=student.shape[0], teacher_crops=targets.probs.shape[0])
        loss = crops_cross_entropy(student, targets, pairs=pairs, temperature=self.student_temperature)
        stats = loss_stats(student, targets, temperature=self.student_temperature) if observe else {}
        if self.me_max:
            entropy = mean_entropy(wide(student), temperature=self.student_temperature)
            loss, stats = loss - self.me_max * entropy, stats | {"mean_entropy": entropy.detach()}
        return loss, stats
