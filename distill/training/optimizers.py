"""AdamW, SGD, and SGD with LARC, without weight decay on biases and norm parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robx.distill.recipes import Recipe


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: those with weight decay, and biases and norm parameters without.

    As in DINO's release, which RoB follows, only biases and one-dimensional parameters are spared: position embedding,
    CLS token and mask token decay, whatever timm's ``no_weight_decay`` lists.
    """
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim <= 1 or name.endswith(".bias")
            (plain if flat else decay).append(parameter)
    groups = [{"params": decay, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the model's trainable parameters."""
    groups = parameter_groups(model)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, fused=True)
    if recipe.optimizer == "larc":
        return Larc(
            groups, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, trust=recipe.trust
        )
    return torch.optim.SGD(
        groups, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, nesterov=recipe.nesterov
    )


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate, and the weight decay of the group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, each tensor with the memory layout of its parameter.

    A checkpoint keeps values but not strides, and the fused AdamW walks parameter, gradient and moments in memory
    order: with a channels-last kernel and a contiguous moment it would pair the wrong elements.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Larc(torch.optim.Optimizer):
    """SGD with momentum whose gradient is scaled layer by layer (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

    Each tensor's gradient with decay, g + wd p, is multiplied by trust |p| / (|g| + wd |p|), unless |p| or |g| is zero,
    in which case it is a plain SGD step. The factor is not clipped, as in SwAV's release.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        """Optimise `params`, tensors or groups; `trust` is the trust coefficient."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            buffers = [self._buffer(p) for p in params]
            factors = _trust_ratios(params, grads, trust=group["trust"], weight_decay=group["weight_decay"])
            updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, factors)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _trust_ratios(params: list[Tensor], grads: list[Any], *, trust: float, weight_decay: float) -> list[Tensor]:
    """One factor per tensor, 0-dim, on its device, without synchronisation."""
    p = torch.stack(torch._foreach_norm(params))
    g = torch.stack(torch._foreach_norm(grads))
    ratio = trust * p / (g + weight_decay * p + 1e-8)
    return list(torch.where((p > 0) & (g > 0), ratio, torch.ones_like(ratio)).unbind())
