"""What the objectives have in common: their Protocol, the match from a recipe to one, and what they report."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.recipes import Recipe

Stats = dict[str, Tensor]

# Rows that the statistics look at: enough for a curve.
SAMPLE = 64


class Objective(Protocol):
    """One method's loss. It has no parameters; the branch keeps whatever needs memory (centre, queue, warm-up)."""

    def target_probs(self, scores: Tensor, *, temperature: float | None = None) -> Tensor:
        """Scores (Q, B, K) of the target branch -> probabilities (Q, B, K) in float32, without a gradient.

        `temperature` stands in for the objective's own while it is warmed up.
        """

    def __call__(self, scores: Scores, targets: Targets, views: Views, *, observe: bool = True) -> tuple[Tensor, Stats]:
        """The loss, a scalar in the graph, and detached scalars: ``loss_stats`` and the loss's parts.

        Without `observe` there are no ``loss_stats``, which read their rows of K scores many times over.
        """


def build_objective(recipe: Recipe) -> Objective:
    """The objective that `recipe` describes."""
    from robx.distill.objectives.kd import SupervisedKd
    from robx.distill.objectives.rob_dino import RobDino
    from robx.distill.objectives.rob_ibot import RobIbot
    from robx.distill.objectives.rob_msn import RobMsn
    from robx.distill.objectives.rob_swav import RobSwav

    r = recipe
    of_all: dict[str, Any] = {
        "student_temperature": r.student_temperature,
        "pairing": r.pairing,
        "sinkhorn_iterations": r.sinkhorn_iterations,
    }
    match r.objective:
        case "dino":
            return RobDino(teacher_temperature=r.teacher_temperature, **of_all)
        case "ibot":
            return RobIbot(teacher_temperature=r.teacher_temperature, patch_weight=r.patch_weight, **of_all)
        case "msn":
            return RobMsn(teacher_temperature=r.teacher_temperature, me_max=r.me_max, **of_all)
        case "swav":
            return RobSwav(epsilon=r.sinkhorn_epsilon, **of_all)
        case "kd":
            return SupervisedKd(temperature=r.teacher_temperature)


@torch.no_grad()
def loss_stats(scores: Tensor, targets: Targets, *, temperature: float) -> Stats:
    """What tells learning from collapse, on a sample of the first global crop.

    Args:
        scores: (V, B, K) of the student.
        targets: of the same batch.
        temperature: the student's.

    Returns:
        target_entropy, student_entropy: mean entropy of a row, nats; log K is uniform, 0 is one-hot.
        target_use, student_use: exp of the entropy of the mean row: about how many prototypes the sample uses.
        agreement: share of the sample where both put the same prototype first.
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
    """The first `rows` targets of one crop, (rows, K) in float32, whether they are stored dense or sparse."""
    probs = targets.probs[crop, :rows].float()
    if targets.columns is None:
        return probs
    mass = probs.new_zeros(len(probs)) if targets.tail is None else targets.tail[crop, :rows].float()
    even = (mass / max(1, width - probs.shape[1]))[:, None]
    return even.repeat(1, width).scatter_(1, targets.columns[crop, :rows].long(), probs)
