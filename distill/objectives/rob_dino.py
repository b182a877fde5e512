"""RoB-DINO: DINO's loss with the frozen teacher's own head as the target (arXiv 2301.09451; DINO, arXiv 2104.14294).

    p_t = softmax(z_t / 0.07)     H(p_t, softmax(z_s / 0.1)), mean over the pairs and the batch

No centring, no temperature warm-up, no frozen last layer: a frozen teacher cannot collapse. The base method's target
branch brings them back.

Q target crops   V student crops   B batch   K head outputs
"""

from __future__ import annotations

from typing import ClassVar, Self

from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, TeacherSpec, Traits, loss_stats
from robx.distill.objectives.cross_entropy import Pairing, crop_pairs, crops_cross_entropy
from robx.distill.objectives.sinkhorn import assignments
from robx.distill.recipes import Recipe
from robx.distill.students.projection_heads import DinoHead


def dino_targets(scores: Tensor, *, temperature: float, sinkhorn_iterations: int = 0) -> Tensor:
    """softmax(scores / temperature) of (Q, B, K), in float32 (DINO, arXiv 2104.14294, eq. 1).

    With iterations, Sinkhorn over each crop's batch replaces the softmax, as in DINO's ablation (its table 7).
    """
    return assignments(scores, temperature=temperature, iterations=sinkhorn_iterations)


def dino_loss(scores: Tensor, targets: Targets, *, pairing: Pairing, temperature: float) -> Tensor:
    """Mean cross-entropy of the student's crops (V, B, K) over the pairs (DINO, eq. 3, with RoB's pairs)."""
    pairs = crop_pairs(pairing, student_crops=scores.shape[0], teacher_crops=targets.probs.shape[0])
    return crops_cross_entropy(scores, targets, pairs=pairs, temperature=temperature)


class RobDino(nn.Module):
    """The objective of RoB-DINO, and of DINO with an EMA branch and swapped pairs."""

    traits: ClassVar[Traits] = Traits(title="DINO", teacher="own head")

    def __init__(
        self,
        *,
        teacher_temperature: float = 0.07,
        student_temperature: float = 0.1,
        pairing: Pairing = "same",
        sinkhorn_iterations: int = 0,
    ) -> None:
        super().__init__()
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.pairing, self.sinkhorn_iterations = pairing, sinkhorn_iterations

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The objective with the recipe's settings."""
        return cls(
            teacher_temperature=recipe.teacher_temperature,
            student_temperature=recipe.student_temperature,
            pairing=recipe.pairing,
            sinkhorn_iterations=recipe.sinkhorn_iterations,
        )

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """DINO's MLP, bottleneck and weight-normed last layer.

        RoB learns the norms of the last layer (``normalize_last_layer: false`` in its released configurations): with
        the target at temperature .07 and the student at .1, matching the teacher's logits needs 1.43 times its norms.
        The base method fixes them at 1.
        """
        return DinoHead(width, outputs, train_norm=not recipe.base)

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (Q, B, K) -> probabilities (Q, B, K)."""
        tau = self.teacher_temperature if temperature is None else temperature
        return dino_targets(scores, temperature=tau, sinkhorn_iterations=self.sinkhorn_iterations)

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Not available: this method has no targets for patches."""
        raise NotImplementedError(f"{self.traits.title} has no targets for patches")

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss and, with `observe`, its statistics."""
        loss = dino_loss(scores.crops, targets, pairing=self.pairing, temperature=self.student_temperature)
        return loss, loss_stats(scores.crops, targets, temperature=self.student_temperature) if observe else {}
