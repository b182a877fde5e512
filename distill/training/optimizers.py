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
        groups,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=next(model.parameters()).is_cuda or None,  # on a CPU it would round otherwise than in earlier versions
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

    The number of operations does not grow with the number of tensors, and the host never waits for a GPU: not for a
    factor, nor for a GradScaler's verdict on gradients that it has unscaled.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets `found_inf` instead of reading it on the host

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        """Optimise `params`, tensors or groups; `trust` is the trust coefficient."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers = [self._buffer(p) for p in params]
            decay, flat = group["weight_decay"], params[0].new_empty(sum(p.numel() for p in params))
            updates = _views_like(flat, params)
            torch._foreach_copy_(updates, [p.grad for p in params])
            factors = _trust_ratios(params, updates, trust=group["trust"], weight_decay=decay)
            torch._foreach_add_(updates, params, alpha=decay)
            flat.mul_(torch.cat([factor.expand(p.numel()) for factor, p in zip(factors, params, strict=True)]))
            if found_inf is None:
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, updates)
                torch._foreach_add_(params, buffers, alpha=-group["lr"])
                continue
            # With infinite gradients nothing changes: the update is zero, the momentum is kept, and the step is zero.
            good = (found_inf == 0).to(flat)
            flat.copy_(torch.where(good > 0, flat, 0.0))
            torch._foreach_mul_(buffers, 1 - (1 - group["momentum"]) * good)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, torch._foreach_mul(buffers, -group["lr"] * good))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _views_like(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of `flat`, each with the shape and strides of its parameter.

    torch's fused kernels for lists take tensors of equal strides; a factor per tensor they do not take, but one
    multiplication of `flat` does.
    """
    views, start = [], 0
    for p in params:
        views.append(flat.as_strided(p.shape, p.stride(), start))
        start += p.numel()
    return views


def _trust_ratios(params: list[Tensor], grads: list[Tensor], *, trust: float, weight_decay: float) -> list[Tensor]:
    """One factor per tensor, 0-dim, on its device, without synchronisation."""
    p = torch.stack(torch._foreach_norm(params))
    g = torch.stack(torch._foreach_norm(grads))
    ratio = trust * p / (g + weight_decay * p + 1e-8)
    return list(torch.where((p > 0) & (g > 0), ratio, torch.ones_like(ratio)).unbind())
