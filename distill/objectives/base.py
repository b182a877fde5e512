"""What every objective provides, and the statistics that they report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.recipes import Recipe

Stats = dict[str, Tensor]

# Rows that the statistics are computed on.
SAMPLE = 64


class TeacherSpec(Protocol):
    """What a student needs to know about its teacher; ``robx.distill.teachers.teacher.Teacher`` provides it."""

    name: str
    width: int  # of its features; 0 if they are not available
    num_prototypes: int
    patch_size: int | None
    patch_prototypes: int | None

    @property
    def map_strides(self) -> Mapping[int, int]:
        """Its feature maps, {stride: channels}; empty if they are not available."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method requires from the teacher, the student and a base method's target branch."""

    title: str  # for messages
    teacher: Literal["own head", "prototypes", "classifier"]  # own head: the one it was pretrained with; prototypes
    # may also be fitted to images
    masks_patches: bool = False  # the student's global crops are block-masked, and masked patches have targets
    drops_patches: bool = False  # ``recipe.patch_drop`` of a ViT student's patches are left out
    soft_targets: bool = False  # near-uniform targets are intended, not a sign of collapse
    self_targets: bool = False  # with momentum 0 the base method has a single network, which makes its own targets
    momentum: Literal["cosine", "linear"] = "cosine"  # schedule of the base method's moving average
    not_averaged: tuple[str, ...] = ()  # student parameters that the base method's moving average takes over unchanged


class Objective(Protocol):
    """One method's loss. It has no parameters and no memory; the target branch keeps the centre, queue and warm-up."""

    traits: ClassVar[Traits]

    @classmethod
    def of(cls, recipe: Recipe) -> Objective:
        """The objective with the recipe's settings."""

    @staticmethod
    def native_head(
        width: int, recipe: Recipe, *, outputs: int, patch_outputs: int | None, teacher: TeacherSpec | None
    ) -> nn.Module:
        """The method's own student head with fresh weights: features (N, width) -> scores (N, outputs).

        `patch_outputs` is the number of scores of a masked patch, None without masked patches; `teacher` is None for a
        base method.
        """

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (Q, B, K) of the target branch -> probabilities (Q, B, K) in float32, without a gradient.

        `temperature` replaces the objective's own during a warm-up.
        """

    def patch_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Patch scores (..., K) -> probabilities of the same shape; only called with ``traits.masks_patches``."""

    def __call__(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss, a scalar in the graph, and detached scalars: ``loss_stats`` and the loss's parts.

        Without `observe` the ``loss_stats`` are left out: they read all K columns of their rows several times.
        """


@torch.no_grad()
def loss_stats(scores: Tensor, targets: Targets, *, temperature: float) -> Stats:
    """Statistics that tell learning from collapse, computed on the first rows of the first global crop.

    Args:
        scores: (V, B, K) of the student.
        targets: of the same batch.
        temperature: the student's.

    Returns:
        target_entropy, student_entropy: mean entropy of a row, nats; log K is uniform, 0 is one-hot.
        target_use, student_use: exp of the entropy of the mean row: about how many prototypes the sample uses.
        agreement: share of the sample for which both have the same most probable prototype.
    """
    rows = min(SAMPLE, scores.shape[1])
    student = (scores[0, :rows].float() / temperature).softmax(dim=-1)
    target = dense_rows(targets, crop=0, rows=rows, width=scores.shape[2])
    return {
        "target_entropy": torch.special.entr(target).sum(dim=-1).mean(),
        "student_entropy": torch.special.entr(student).sum(dim=-1).mean(),
        "target_use": torch.special.entr(target.mean(dim=0)).sum().exp(),
        "student_use": torch.special.entr(student.mean(dim=0)).sum().exp(),
        "agreement": (student.argmax(dim=-1) == target.argmax(dim=-1)).float().mean(),
    }


def dense_rows(targets: Targets, *, crop: int, rows: int, width: int) -> Tensor:
    """The first `rows` targets of one crop as (rows, K) in float32, from dense or sparse storage."""
    probs = targets.probs[crop, :rows].float()
    if targets.columns is None:
        return probs
    mass = probs.new_zeros(len(probs)) if targets.tail is None else targets.tail[crop, :rows].float()
    even = (mass / max(1, width - probs.shape[1]))[:, None]
    return even.repeat(1, width).scatter_(1, targets.columns[crop, :rows].long(), probs)
