"""RoB-SwAV: predict the teacher's balanced assignment of the batch (arXiv 2301.09451; SwAV, arXiv 2006.09882).

    p_t = Sinkhorn(scores_t / 0.03, 3 iterations)     H(p_t, softmax(z_s / 0.1)), mean over the pairs and the batch

0 iterations mean softmax(scores_t / 0.03). The target branch keeps the queue of earlier images, which enlarges the
batch of Sinkhorn; its scores come in as additional rows.

Q target crops   V student crops   B batch   K prototypes
"""

from __future__ import annotations

from typing import ClassVar, Self

from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, TeacherSpec, Traits, loss_stats
from robx.distill.objectives.cross_entropy import Pairing, crop_pairs, crops_cross_entropy
from robx.distill.objectives.sinkhorn import assignments
from robx.distill.recipes import Recipe
from robx.distill.students.projection_heads import FrozenPrototypes, SwavHead
from robx.errors import InputError


def swav_targets(scores: Tensor, *, epsilon: float, sinkhorn_iterations: int) -> Tensor:
    """Each crop's codes (Q, B, K), in float32 (SwAV, arXiv 2006.09882, eq. 3 and 4)."""
    return assignments(scores, temperature=epsilon, iterations=sinkhorn_iterations)


class RobSwav(nn.Module):
    """The objective of RoB-SwAV, and of SwAV, whose one network makes its own targets, with swapped pairs."""

    traits: ClassVar[Traits] = Traits(title="SwAV", teacher="prototypes", self_targets=True)

    def __init__(
        self,
        *,
        epsilon: float = 0.03,
        student_temperature: float = 0.1,
        pairing: Pairing = "same",
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        self.epsilon, self.student_temperature = epsilon, student_temperature
        self.pairing, self.sinkhorn_iterations = pairing, sinkhorn_iterations

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The objective with the recipe's settings."""
        return cls(
            epsilon=recipe.sinkhorn_epsilon,
            student_temperature=recipe.student_temperature,
            pairing=recipe.pairing,
            sinkhorn_iterations=recipe.sinkhorn_iterations,
        )

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """SwAV's projection with its own prototypes, or with the teacher's, frozen."""
        if recipe.swav_prototypes == "own":
            return SwavHead(width, outputs)
        prototypes = getattr(getattr(teacher, "head", None), "prototypes", None)
        if not isinstance(prototypes, Tensor):
            raise InputError("swav_prototypes = teacher needs a teacher with prototypes: set swav_prototypes = own")
        return FrozenPrototypes(width, prototypes)

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (Q, B, K) -> codes (Q, B, K); `temperature` replaces epsilon."""
        epsilon = self.epsilon if temperature is None else temperature
        return swav_targets(scores, epsilon=epsilon, sinkhorn_iterations=self.sinkhorn_iterations)

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Not available: this method has no targets for patches."""
        raise NotImplementedError(f"{self.traits.title} has no targets for patches")

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        student = scores.crops
        pairs = crop_pairs(self.pairing, student_crops=student.shape[0], teacher_crops=targets.probs.shape[0])
        loss = crops_cross_entropy(student, targets, pairs=pairs, temperature=self.student_temperature)
        return loss, loss_stats(student, targets, temperature=self.student_temperature) if observe else {}
