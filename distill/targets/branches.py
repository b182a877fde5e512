"""The target branches: what the student has to predict comes from one of four, and everything else is shared.

TeacherBranch   a frozen teacher with its own head: RoB (arXiv 2301.09451)
EmaBranch       a moving average of the student: the base method (DINO, iBOT, MSN), the baseline to beat
OwnBranch       the student's own scores: SwAV, the base method that has one network
StoredBranch    targets that an earlier run wrote to disk, without a teacher (robx.distill.targets.stored)

A step is: targets = branch.targets(views); scores = student(views); loss, stats = objective(scores, targets, views);
backward; optimiser step; branch.update(step, student). An OwnBranch computes its targets from `scores`.

Q target crops   B batch   P patches   M masked patches   K prototypes
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, Protocol, cast

import torch
from timm.layers.drop import DropPath
from torch import nn

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Objective
from robx.distill.students.projection_heads import scores_and_embeddings
from robx.distill.students.student import unwrapped
from robx.distill.targets.centering import TargetProcessor
from robx.distill.teachers.teacher import Teacher


class TargetBranch(Protocol):
    """The source of the targets."""

    def targets(self, views: Views) -> Targets:
        """What the student has to predict for the global crops; never in the autograd graph."""

    def update(self, step: int, student: nn.Module) -> None:
        """Update after optimiser step `step`, 0-based; `student` may be wrapped by DDP or compiled."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; never the teacher."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


class _WithoutNetwork:
    """A branch without a network of its own: only the target processor has state."""

    processor: TargetProcessor

    def update(self, step: int, student: nn.Module) -> None:
        """Advance the target processor's step."""
        self.processor.step = step + 1

    def state_dict(self) -> dict[str, Any]:
        """The target processor's state."""
        return {"processor": self.processor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the target processor's state."""
        self.processor.load_state_dict(state["processor"])


class TeacherBranch(_WithoutNetwork):
    """A frozen teacher in place of the base method's branch (RoB)."""

    def __init__(
        self,
        teacher: Teacher,
        objective: Objective,
        *,
        processor: TargetProcessor | None = None,
        crops: int = 2,
        maps: bool = False,
        scores: bool = True,
    ) -> None:
        """Run `teacher` on the first `crops` global crops.

        `processor` may add a base method's centring and queue. With `maps` the targets have the feature maps; without
        `scores` they have features alone, and probabilities (Q, B, 0).
        """
        self.teacher, self.crops, self.maps, self.scores = teacher, crops, maps, scores
        self.processor = processor or TargetProcessor(objective)

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """One teacher forward over its crops; the teacher's input is never masked."""
        seen = views.globals[: self.crops]
        if not self.scores:
            plain = self.teacher(seen.flatten(0, 1), maps=self.maps, scores=False)
            probs, features = (each.view(*seen.shape[:2], each.shape[1]) for each in (plain.crops, plain.features))
            return Targets(probs=probs, features=features, maps=plain.maps)
        wanted = views.masks is not None and self.processor.objective.traits.masks_patches
        masked = views.masked_patches(self.crops) if wanted else None
        # Centring the patches, an ablation, needs all of them.
        chosen = wanted if masked is None or self.processor.centering else masked
        scores = self.teacher(seen.flatten(0, 1), patches=chosen, maps=self.maps)
        patch_probs = None
        if masked is not None and scores.patches is not None:
            mean = scores.patches.flatten(0, -2).mean(dim=0) if self.processor.centering else None
            rows = scores.patches if scores.patches.ndim == 2 else scores.patches.flatten(0, 1)[masked]
            patch_probs = self.processor.patch_probs(rows, mean=mean)
        probs = self.processor.probs(scores.crops.view(*seen.shape[:2], -1))
        features = scores.features.view(*seen.shape[:2], -1)
        return Targets(probs=probs, patch_probs=patch_probs, features=features, maps=scores.maps)


class EmaBranch:
    """A moving average of the student, trunk and head (DINO, arXiv 2104.14294, section 3.1).

    Its input is never masked and it has no drop path. Its BatchNorm uses batch statistics, as in the base methods.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        steps: int,
        momentum: tuple[float, float] = (0.996, 1.0),
        schedule: Literal["cosine", "linear"] = "cosine",
        processor: TargetProcessor | None = None,
        copied: tuple[str, ...] = (),
    ) -> None:
        """Start as a copy of the student.

        Args:
            student: a StudentNet, possibly wrapped.
            objective: turns scores into targets.
            steps: optimiser steps of the whole run.
            momentum: first and last value.
            schedule: of the momentum.
            processor: centring, temperature warm-up and queue.
            copied: parameters copied from the student instead of averaged (MSN's prototypes); absent ones are ignored.
        """
        self.network = copy.deepcopy(unwrapped(student)).requires_grad_(False)
        self.network.patch_drop = 0.0
        for module in self.network.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        self.network.train()
        self.steps, self.momentum, self.schedule, self.copied = steps, momentum, schedule, copied
        self.processor = processor or TargetProcessor(objective)

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Both global crops, unmasked, through the averaged network."""
        features, tokens = self.network.embed_globals(views.globals)
        scores, embeddings, score = scores_and_embeddings(self.network.head, features)
        patch_probs = None
        if views.masks is not None and tokens is not None:
            head = cast(Any, self.network.head)
            mean = head.mean_patch_scores(tokens.flatten(0, 1)) if self.processor.centering else None
            rows = tokens.flatten(0, 1)[views.masked_patches()]
            patch_probs = self.processor.patch_probs(head.patches(rows), mean=mean)
        shape = views.globals.shape[:2]
        if embeddings is not None:
            embeddings = embeddings.view(*shape, -1)
        probs = self.processor.probs(scores.view(*shape, -1), embeddings=embeddings, score=score)
        return Targets(probs=probs, patch_probs=patch_probs)

    def momentum_at(self, step: int) -> float:
        """The momentum of step `step`: on a cosine (BYOL, arXiv 2006.07733, section 3.3), or linear (MSN's release)."""
        first, last = self.momentum
        if self.schedule == "linear":
            return first + (last - first) * step / max(1, self.steps)
        return last - (last - first) * (math.cos(math.pi * step / max(1, self.steps)) + 1) / 2

    @torch.no_grad()
    def update(self, step: int, student: nn.Module) -> None:
        """theta_t = m theta_t + (1 - m) theta_s."""
        theirs = dict(unwrapped(student).named_parameters())
        mine = dict(self.network.named_parameters())
        averaged = [name for name in mine if name not in self.copied]
        torch._foreach_lerp_(
            [mine[name] for name in averaged],
            [theirs[name].detach() for name in averaged],
            weight=1 - self.momentum_at(step),
        )
        for name in self.copied:
            mine[name].copy_(theirs[name])
        self.processor.step = step + 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged network and the target processor's state."""
        return {"network": self.network.state_dict(), "processor": self.processor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.network.load_state_dict(state["network"])
        self.processor.load_state_dict(state["processor"])


class OwnBranch(_WithoutNetwork):
    """No second network: the targets of the global crops are computed from the student's own scores.

    SwAV, arXiv 2006.09882, section 3.1, and its release: one forward over all crops, whose BatchNorm statistics cover
    all of them; its scores of the global crops, without a gradient, give the targets.
    """

    def __init__(self, student: nn.Module, processor: TargetProcessor) -> None:
        """`processor` turns scores into targets and keeps the queue, which the head of `student` scores."""
        self.processor = processor
        self._head: Any = unwrapped(student).head

    @torch.no_grad()
    def read(self, scores: Scores) -> Targets:
        """The targets from the student's scores of a batch.

        As in SwAV's release the queue keeps embeddings, scored with the prototypes of the current step.
        """
        probs = self.processor.probs(
            scores.crops[:2].detach(), embeddings=scores.embeddings, score=getattr(self._head, "score", None)
        )
        return Targets(probs=probs)
