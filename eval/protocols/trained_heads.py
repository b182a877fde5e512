"""BatchNorm + Linear heads on frozen features: every feature kind and learning rate in one pass over the data.

The heads share nothing but the batch, so minimising the sum of their losses trains each as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robx.errors import InputError
from robx.records import Value
from robx.stats import accuracy_value

TOP = 5


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """How heads are trained: SGD with Nesterov momentum; `lr` is for a batch of 256 and scales with the batch."""

    epochs: int
    milestones: tuple[int, ...] = ()  # epochs at which the rate is divided by 10; none: cosine decay to 0
    lr: float = 0.01
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Heads(nn.Module):
    """One BatchNorm + Linear for each (feature kind, learning rate), and the optimiser that trains them together.

    B batch   D_kind width of a feature kind   C classes
    """

    def __init__(
        self, widths: Mapping[str, int], *, classes: int, recipe: HeadRecipe, rates: Sequence[float], steps: int,
        seed: int = 0, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """Make fresh heads.

        Args:
            widths: feature kind -> D_kind; the first is the headline's.
            classes: C.
            recipe: optimiser and schedule.
            rates: learning rates for a batch of 256, trained in parallel.
            steps: optimiser steps of the whole training.
            seed: of the initial weights.
            device: where the heads are trained.
        """
        super().__init__()
        self.names = {_name(kind, rate): (kind, rate) for kind in widths for rate in rates}
        generator = torch.Generator().manual_seed(seed)
        heads = {}
        for name, (kind, _) in self.names.items():
            linear = nn.Linear(widths[kind], classes)
            nn.init.normal_(linear.weight, std=0.01, generator=generator)
            nn.init.zeros_(linear.bias)
            heads[name] = nn.Sequential(nn.BatchNorm1d(widths[kind]), linear)
        # A ModuleList, not a ModuleDict: a learning rate has a dot, which a module's name must not have.
        self._heads = nn.ModuleList(heads.values()).to(device)
        groups = [
            {"params": list(head.parameters()), "lr": rate * recipe.batch / 256}
            for head, (_, rate) in zip(self._heads, self.names.values(), strict=True)
        ]
        self._optimiser = torch.optim.SGD(
            groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, _factor(recipe, steps))

    def fit_batch(self, features: Mapping[str, Tensor], labels: Tensor) -> float:
        """One step of every head on features {kind: (B, D_kind)} and labels (B,); the mean loss."""
        self.train()
        with torch.enable_grad():
            losses = [
                functional.cross_entropy(head(features[kind]), labels)
                for head, (kind, _) in zip(self._heads, self.names.values(), strict=True)
            ]
            total = torch.stack(losses).sum()
            self._optimiser.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._schedule.step()
        loss = float(total.detach()) / len(losses)
        if not math.isfinite(loss):
            raise InputError(
                "the loss of the linear heads is not finite: the features contain NaN, or the rate is too large"
            )
        return loss

    @torch.inference_mode()
    def folded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Weight (C, D_kind) and bias (C,), float32, of one head with its BatchNorm folded in."""
        head: Any = self._heads[list(self.names).index(name)]
        norm, linear = head
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = linear.bias + linear.weight @ (norm.bias - scale * norm.running_mean)
        weight: np.ndarray = (linear.weight * scale).cpu().numpy()
        return weight, bias.cpu().numpy()

    @torch.inference_mode()
    def top(self, features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Each head's most likely classes, int64 (N, <= 5), with BatchNorm's running statistics."""
        self.eval()
        found = {}
        for head, (name, (kind, _)) in zip(self._heads, self.names.items(), strict=True):
            scores = head(features[kind])
            found[name] = scores.topk(min(TOP, scores.shape[1]), dim=1).indices.cpu().numpy()
        return found


def head_values(tops: Mapping[str, np.ndarray], labels: np.ndarray, *, classes: int, headline: str) -> dict[str, Value]:
    """{"top1": the headline head's, "top5", and "top1_<head>" of every head}, in % with Wilson's interval."""
    right = {name: top == labels[:, None] for name, top in tops.items()}
    values = {"top1": accuracy_value(right[headline][:, 0])}
    if classes > TOP:
        values["top5"] = accuracy_value(right[headline].any(axis=1))
    return values | {f"top1_{name}": accuracy_value(hits[:, 0]) for name, hits in right.items()}


def headline(widths: Mapping[str, int], recipe: HeadRecipe) -> str:
    """The head that the protocol fixes in advance: the first feature kind at the recipe's own learning rate."""
    return _name(next(iter(widths)), recipe.lr)


def _name(kind: str, rate: float) -> str:
    return f"{kind}_lr{rate:g}"


def _factor(recipe: HeadRecipe, steps: int) -> Callable[[int], float]:
    """The learning rate at a step, relative to its peak."""
    edges = [math.ceil(steps * epoch / recipe.epochs) for epoch in recipe.milestones]
    if edges:
        return lambda step: float(0.1 ** sum(step >= edge for edge in edges))
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
