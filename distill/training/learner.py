"""One student in training: its optimiser, loss scaler, weight average, and a base method's own target branch."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robx.distill.batches.views import Scores, Targets, Views
from robx.distill.objectives.base import Objective, Stats
from robx.distill.objectives.feature_term import feature_loss, stage_loss
from robx.distill.recipes import Recipe
from robx.distill.students.student import StudentNet, cancel_last_layer_gradients
from robx.distill.targets.branches import EmaBranch, OwnBranch
from robx.distill.training.optimizers import build_optimizer, load_optimizer, set_rates
from robx.distill.training.processes import Processes
from robx.distill.training.schedules import learning_rate, weight_decay
from robx.int8_simulation import Int8Simulation

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The recipe's precision, for forward passes."""
    if recipe.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=HALF[recipe.precision])


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one process, so that drop path and patch drop need no saved state."""
    torch.manual_seed((seed * 1_000_003 + step * 1009 + rank) % 2**63)


class Learner:
    """A student in training. Everything it does is a function of its state, the views and the targets."""

    def __init__(
        self,
        name: str,
        net: StudentNet,
        *,
        recipe: Recipe,
        objective: Objective,
        processes: Processes,
        branch: EmaBranch | OwnBranch | None = None,
        compile: bool = False,
    ) -> None:
        """Train `net`, which is already on its device; `branch` is a base method's."""
        self.name, self.net, self.recipe, self.objective, self.branch = name, net, recipe, objective, branch
        self.device, self.rank = processes.device, processes.rank
        self.optimizer = build_optimizer(net, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.average = None if recipe.student_ema is None else copy.deepcopy(net.trunk).requires_grad_(False)
        # Int8 is simulated around the network, whose weights stay plain: they are what is saved and averaged.
        self.simulation = (
            None
            if recipe.quantize is None
            else Int8Simulation(net, skip=("head", "projection", "stages")).to(self.device)
        )
        self._parallel = processes.parallel(self.trained)
        if isinstance(branch, EmaBranch):
            processes.synchronised(branch.network)
        self._forward: Any = torch.compile(self._parallel) if compile else self._parallel
        self._parameters = [p for p in net.parameters() if p.requires_grad]

    @property
    def trunk(self) -> nn.Module:
        """The trunk that is evaluated and saved: the raw one, or its average if the recipe asks for one."""
        return self.net.trunk if self.average is None else self.average

    @property
    def trained(self) -> nn.Module:
        """What computes the scores and has all buffers that a step changes: the network, or its simulation in int8."""
        return self.net if self.simulation is None else self.simulation

    @property
    def network(self) -> StudentNet:
        """The network that a base method publishes as a teacher: the moving average, or the student itself."""
        return self.branch.network if isinstance(self.branch, EmaBranch) else self.net

    def own_targets(self, views: Views) -> Targets | None:
        """A base method's targets of a micro-batch; None if ``learn`` derives them from the student's scores."""
        return self.branch.targets(views) if isinstance(self.branch, EmaBranch) else None

    def learn(
        self, views: Views, targets: Targets | None, *, draw: int, last: bool = True, observe: bool = True
    ) -> tuple[Tensor, Stats]:
        """Forward and backward of one micro-batch; gradients add up until ``update``.

        Args:
            views: the micro-batch.
            targets: of the target branch; None uses the OwnBranch.
            draw: the micro-batch's number in the run, which seeds drop path.
            last: whether ``update`` follows, so that processes exchange gradients now.
            observe: whether to compute the loss's statistics.
        """
        seed_step(self.recipe.seed, step=draw, rank=self.rank)
        waits = isinstance(self._parallel, DistributedDataParallel) and not last
        with self._parallel.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(self.recipe, self.device):
                scores = self._forward(views)
            if targets is None:
                targets = cast(OwnBranch, self.branch).read(scores)
            loss, stats = self._loss(scores, targets, views, observe=observe)
            self.scaler.scale(loss / self.recipe.accumulate).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), stats

    def _loss(self, scores: Scores, targets: Targets, views: Views, *, observe: bool) -> tuple[Tensor, Stats]:
        """The method's loss and, if the recipe asks for them, the feature and the stage term."""
        recipe = self.recipe
        loss, stats = scores.crops.new_zeros((), dtype=torch.float32), Stats()
        if recipe.prototype_weight:
            loss, stats = self.objective(scores, targets, views, observe=observe)
            loss = loss if recipe.prototype_weight == 1 else recipe.prototype_weight * loss
        if scores.features is not None and targets.features is not None:
            distance = feature_loss(scores.features, targets.features)
            loss, stats = loss + recipe.feature_weight * distance, stats | {"feature_loss": distance.detach()}
        if scores.maps is not None and targets.maps is not None:
            distance = stage_loss(scores.maps, targets.maps)
            loss, stats = loss + recipe.stage_weight * distance, stats | {"stage_loss": distance.detach()}
        return loss, stats

    def gradient_norm(self, *, epoch: int) -> Tensor:
        """The L2 norm of all gradients before clipping, 0-dim; gradients are then clipped as the recipe says."""
        self.scaler.unscale_(self.optimizer)
        if epoch < self.recipe.freeze_last_layer_epochs:
            cancel_last_layer_gradients(self.net)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.clip_grad, norm)
        return norm

    def update(self, *, step: int, steps: int) -> None:
        """One optimiser step at this step's learning rate and weight decay, then the averages."""
        decay = weight_decay(step, steps=steps, recipe=self.recipe)
        set_rates(self.optimizer, lr=learning_rate(step, steps=steps, recipe=self.recipe), weight_decay=decay)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.recipe.student_ema is not None:
            _blend(self.average, self.net.trunk, keep=self.recipe.student_ema)
        if self.branch is not None:
            self.branch.update(step, self.net)

    def state(self) -> dict[str, Any]:
        """The complete state, for a checkpoint."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "branch": None if self.branch is None else self.branch.state_dict(),
            "ranges": None if self.simulation is None else self.simulation.ranges(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state."""
        self.net.load_state_dict(state["net"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.branch is not None:
            self.branch.load_state_dict(state["branch"])
        if self.simulation is not None:
            self.simulation.load_ranges(state["ranges"])


@torch.no_grad()
def _blend(average: nn.Module, trunk: nn.Module, *, keep: float) -> None:
    pairs = list(zip(average.state_dict().values(), trunk.state_dict().values(), strict=True))
    blended = [(old, new) for old, new in pairs if old.is_floating_point()]
    torch._foreach_lerp_([old for old, _ in blended], [new for _, new in blended], weight=1 - keep)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)
