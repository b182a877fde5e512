from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robx.distill.recipes import override, preset
from robx.distill.students.student import build_student
from robx.distill.training.optimizers import Larc, build_optimizer, load_optimizer, parameter_groups, set_rates


def plain_larc(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    decay: float,
    momentum: float,
    trust: float,
) -> None:
    """You, Gitman, Ginsburg 2017 written out, a tensor at a time, in place."""
    for p, g, v in zip(params, grads, buffers, strict=True):
        p_norm, g_norm = float(p.norm()), float(g.norm())
        factor = trust * p_norm / (g_norm + decay * p_norm + 1e-8) if p_norm and g_norm else 1.0
        v.mul_(momentum).add_(factor * (g + decay * p))
        p.sub_(lr * v)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_larc_against_a_plain_implementation(decay: float) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.randn(2, 2, 2))]
    theirs = [p.detach().clone().double() for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = Larc(ours, lr=0.7, weight_decay=decay, momentum=0.9, trust=0.01)
    for step in range(5):
        grads = [torch.randn_like(p) for p in ours]
        if step == 2:
            grads[2].zero_()
        for p, g in zip(ours, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        plain_larc(theirs, [g.double() for g in grads], buffers, lr=0.7, decay=decay, momentum=0.9, trust=0.01)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach().double(), q, atol=1e-6, rtol=1e-5)


class Kernels(TorchDispatchMode):
    """Counts operations, except those that only make views."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def layers(count: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3, 3, 3), (5,), (2, 7), ()]
    found = [nn.Parameter(torch.randn(shapes[i % 4])) for i in range(count)]
    found[0] = nn.Parameter(found[0].data.to(memory_format=torch.channels_last))
    for parameter in found:
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
    found[1].grad = torch.zeros(5)
    return found


def test_larc_takes_as_many_operations_for_many_tensors_as_for_few() -> None:
    numbers = []
    for count in (8, 80):
        optimizer = Larc(layers(count), lr=0.1, weight_decay=1e-3)
        optimizer.step()
        with Kernels() as kernels:
            optimizer.step()
        numbers.append(kernels.number)
    assert numbers[0] == numbers[1] < 30


def test_larc_is_the_list_of_factors_that_it_was_bit_for_bit() -> None:
    """As before one buffer held all updates: a product of lists, which torch does tensor by tensor on a GPU."""
    ours, theirs = layers(12), layers(12)
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = Larc(ours, lr=0.3, weight_decay=1e-2, momentum=0.9, trust=0.01)
    for _ in range(4):
        optimizer.step()
        with torch.no_grad():
            grads: Any = [p.grad for p in theirs]
            p_norm, g_norm = (torch.stack(torch._foreach_norm(one)) for one in (theirs, grads))
            ratio = 0.01 * p_norm / (g_norm + 1e-2 * p_norm + 1e-8)
            factors = torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio)).unbind()
            updates = torch._foreach_add(grads, theirs, alpha=1e-2)
            torch._foreach_mul_(updates, factors)
            torch._foreach_mul_(buffers, 0.9)
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(theirs, buffers, alpha=-0.3)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_larc_skips_a_step_with_infinite_gradients_without_reading_them() -> None:
    parameters, plain = layers(6), layers(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer, other = (Larc(one, lr=0.1, weight_decay=1e-3) for one in (parameters, plain))
    for step in range(3):
        before = [p.detach().clone() for p in parameters]
        for p, q in zip(parameters, plain, strict=True):
            p.grad = q.grad * 8.0  # type: ignore[operator]
        if step == 1:
            parameters[2].grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.scale(torch.zeros(()))  # makes the scale
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        if step == 1:
            scaler.update()
            assert scaler.get_scale() == 4.0 and all(map(torch.equal, before, parameters))
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            continue
        scaler.update()
        other.step()
        for p, q in zip(parameters, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert p.isfinite().all()


def test_larc_is_scale_invariant_in_the_gradient() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(4, 4), torch.randn(4, 4)
    ends = []
    for scale in (1.0, 1000.0):
        parameter = nn.Parameter(start.clone())
        parameter.grad = grad * scale
        Larc([parameter], lr=1.0, weight_decay=0.0).step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", ["adamw", "larc", "sgd"])
def test_a_resumed_optimizer_steps_as_a_plain_one_that_never_stopped(name: str) -> None:
    """Channels-last kernels, and a state that was on disk: there it has no strides."""
    recipe = override(preset("dino", "vit"), {"optimizer": name, "lr": 0.01, "lr_batch": None})

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        optimizer.step()

    unbroken, mine = net(), net()
    build = {
        "adamw": lambda m: torch.optim.AdamW(m, lr=0.01, weight_decay=recipe.weight_decay, fused=False, foreach=False),
        "larc": lambda m: Larc(m, lr=0.01, weight_decay=recipe.weight_decay),
        "sgd": lambda m: torch.optim.SGD(m, lr=0.01, weight_decay=recipe.weight_decay, momentum=0.9, foreach=False),
    }[name]
    plain, optimizer = build(parameter_groups(unbroken)), build_optimizer(mine, recipe)
    for seed in range(3):
        step(unbroken, plain, seed)
        step(mine, optimizer, seed)
    state = optimizer.state_dict()
    for values in state["state"].values():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = value.contiguous()
    again = build_optimizer(mine, recipe)
    load_optimizer(again, state)
    for seed in range(3, 6):
        step(unbroken, plain, seed)
        step(mine, again, seed)
    for a, b in zip(mine.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_larc_resumes_from_its_state() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 3))
    optimizer = Larc([parameter], lr=0.1, weight_decay=1e-3)
    grads = [torch.randn(3, 3) for _ in range(4)]

    def run(p: nn.Parameter, o: Larc, some: list[Tensor]) -> None:
        for g in some:
            p.grad = g
            o.step()

    run(parameter, optimizer, grads[:2])
    other = nn.Parameter(parameter.detach().clone())
    second = Larc([other], lr=0.1, weight_decay=1e-3)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(parameter, optimizer, grads[2:])
    run(other, second, grads[2:])
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_only_biases_and_one_dimensional_parameters_do_not_decay(name: str) -> None:
    net = build_student(name, override(preset("dino", "vit"), {"head": "mlp", "prototypes": 8, "base": True}), None)
    groups = parameter_groups(net)
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    plain = {names[id(p)] for p in groups[1]["params"]}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert plain | decayed == {key for key, p in net.named_parameters() if p.requires_grad} and not plain & decayed
    # DINO's rule, written a second time: a bias or a single axis is spared, everything else decays.
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert plain == {key for key, p in trained.items() if key.endswith(".bias") or len(p.shape) == 1}
    if name == "test_vit":
        assert {"trunk.pos_embed", "trunk.cls_token"} <= decayed


def test_ibots_mask_token_and_learned_norms_decay() -> None:
    recipe = override(preset("ibot", "vit"), {"crop_size": 32, "local_crops": 0})
    teacher = SimpleNamespace(name="t", num_prototypes=8, patch_size=16, patch_prototypes=8)
    net = build_student("test_vit", recipe, teacher)
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(net)[0]["params"]}
    assert {"masked_embed", "head.last_layer.weight_g", "head.last_layer.weight_v"} <= decayed


@pytest.mark.parametrize("kind", ["adamw", "larc", "sgd"])
def test_rates_reach_the_groups_that_they_should(kind: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(net, override(preset("dino", "vit"), {"optimizer": kind}))
    set_rates(optimizer, lr=0.5, weight_decay=0.25)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]
