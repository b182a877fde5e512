"""RoB-iBOT: RoB-DINO on the CLS token, plus the masked patches of the same view (arXiv 2301.09451; iBOT, 2111.07832).

    CLS      as RoB-DINO; the student's global crops are block-masked, its local crops are not
    patches  softmax(z_t / 0.07) against z_s / 0.1, summed over an image's masked patches / max(1, their number)

A student without patch tokens on the teacher's grid is trained with the CLS part only.

B batch   P patches   M masked patches of both global crops   K head outputs
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Stats, TeacherSpec, Traits
from robx.distill.objectives.cross_entropy import rows_cross_entropy
from robx.distill.objectives.rob_dino import RobDino, dino_targets
from robx.distill.recipes import Recipe
from robx.distill.students.projection_heads import IbotHead
from robx.errors import InputError


def masked_patch_loss(
    scores: Tensor, probs: Tensor, masks: Tensor, *, temperature: float, masked: Tensor | None = None
) -> Tensor:
    """Mean over the crops (2, B) of the mean cross-entropy over each one's masked patches (iBOT, eq. 2).

    Args:
        scores: (M, K) of the masked patches in the order of ``masks.nonzero()``, or (2, B, P, K) of all patches.
        probs: targets of the same patches, (M, K) or (2, B, P, K).
        masks: (2, B, P), True where the student's patch was masked. A crop with none adds 0.
        temperature: the student's.
        masked: places (M,) of the masked patches, from ``Views.masked_patches``; None counts them.
    """
    masked = masks.flatten().nonzero()[:, 0] if masked is None else masked
    number = masks.sum(dim=-1, keepdim=True).clamp(min=1)
    weights = (1.0 / (number * masks.shape[0] * masks.shape[1]).double()).expand(masks.shape).flatten()[masked]
    return rows_cross_entropy(
        masked_rows(scores, masked), masked_rows(probs, masked), weights=weights, temperature=temperature
    )


def masked_rows(patches: Tensor, masked: Tensor) -> Tensor:
    """The masked patches' rows (M, K) out of all patches (2, B, P, K); selected rows stay."""
    return patches if patches.ndim == 2 else patches.flatten(0, 2)[masked]


class RobIbot(RobDino):
    """The objective of RoB-iBOT, and of iBOT with an EMA branch and swapped pairs: RobDino's plus masked patches."""

    traits: ClassVar[Traits] = Traits(title="iBOT", teacher="own head", masks_patches=True)

    def __init__(self, *, patch_weight: float = 1.0, **cls: Any) -> None:
        """`patch_weight` multiplies the patch part; the other arguments are RobDino's."""
        super().__init__(**cls)
        self.patch_weight = patch_weight

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The objective with the recipe's settings."""
        objective = super().of(recipe)
        objective.patch_weight = recipe.patch_weight
        return objective

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """iBOT's head; crops and patches share the last layer if both have as many outputs. Norms as in RoB-DINO."""
        return IbotHead(
            width,
            outputs,
            patch_out_dim=patch_outputs,
            shared=patch_outputs in (None, outputs),
            train_norm=not recipe.base,
        )

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (..., K) of patch tokens -> probabilities of the same shape; always a softmax."""
        return dino_targets(scores, temperature=self.teacher_temperature if temperature is None else temperature)

    def forward(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The weighted sum of both parts and, with `observe`, their statistics.

        Raises:
            InputError: the student scores patches, but masks or patch targets are missing.
        """
        cls, stats = super().forward(scores, targets, views, observe=observe)
        if scores.patches is None or not self.patch_weight:
            return cls, stats
        if views.masks is None or targets.patch_probs is None:
            raise InputError(
                "the patch part of RoB-iBOT needs masks and a teacher with patch prototypes: "
                "set patch_weight = 0, or use an iBOT teacher instead of stored targets"
            )
        patch = masked_patch_loss(
            scores.patches,
            targets.patch_probs,
            views.masks,
            temperature=self.student_temperature,
            masked=views.masked_patches(),
        )
        with torch.no_grad():
            stats |= {"cls_loss": cls.detach(), "patch_loss": patch.detach(), "masked": views.masks.float().mean()}
        return cls + self.patch_weight * patch, stats
