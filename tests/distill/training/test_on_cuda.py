"""Every tensor of a step stays on the GPU, checked without one: torch's fake tensors have a device and no memory.

An operation on tensors of two devices raises as it would on a GPU. Backward, which is torch's own, cannot be faked so.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from robx.distill.batches import device_crops
from robx.distill.batches.crops import plan_crops
from robx.distill.batches.views import Views
from robx.distill.objectives.build import build_objective
from robx.distill.recipes import Method, override, preset
from robx.distill.students.student import StudentNet, build_student
from robx.distill.targets.branches import EmaBranch, OwnBranch
from robx.distill.targets.build import build_branch
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.teachers.teacher import Teacher

TEACHERS = {
    "dino": "dino_vits16",
    "ibot": "ibot_vits16",
    "msn": "msn_vits16",
    "swav": "swav_rn50",
    "kd": "timm:resnet18",
}
GUARDS = {"centering": True, "queue": 4, "teacher_temperature_start": 0.04, "teacher_temperature_epochs": 3}


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        yield torch.device("cuda")


@functools.cache
def built_teacher(method: Method) -> Teacher:
    return build_teacher_skeleton(TEACHERS[method], objective=method, prototypes=32, image_size=64)


def put(net: nn.Module, device: torch.device) -> None:
    """``net.to(device)``, which torch has not for fake tensors: parameters and buffers; nothing else moves either."""
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def crops(student: StudentNet, device: torch.device) -> Views:
    masks = None
    if student.masked_embed is not None or student.patch_drop:
        masks = torch.zeros(2, 4, 16, dtype=torch.bool, device=device)
    return Views(
        torch.empty(2, 4, 3, 64, 64, device=device),
        torch.empty(2, 4, 3, 32, 32, device=device),
        torch.arange(4, device=device),
        masks,
        masked=None if masks is None else torch.arange(6, device=device),
    )


def test_crops_are_made_on_the_gpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override(preset("dino", "vit"), {"crop_size": 32, "local_crop_size": 16, "local_crops": 2})
    plans = np.stack([plan_crops(40, 30, recipe, epoch=0, index=i) for i in range(8)], axis=1)
    for name, value in (("flip", True), ("order", 3), ("hue", 9), ("gray", True), ("sigma", 1.0), ("solarize", True)):
        plans[name] = value  # every operation takes part
    monkeypatch.setattr(device_crops, "to_device", lambda values, device: torch.from_numpy(np.array(values)).to(device))
    images = [torch.empty(30, 40, 3, dtype=torch.uint8, device=gpu) for _ in range(8)]
    found = device_crops.device_crops(images, [(plans[2:], (16, 16))])[0]
    assert found.device.type == "cuda" and found.shape == (2, 8, 3, 16, 16)


@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize(
    ("method", "base"),
    [(method, base) for method in TEACHERS for base in (False, True) if not (base and method == "kd")],
)
def test_a_step_stays_on_the_gpu(
    method: Method, base: bool, name: str, guards: bool, request: pytest.FixtureRequest
) -> None:
    sizes = {"crop_size": 64, "local_crop_size": 32, "local_crops": 2, "prototypes": 32}
    recipe = override(preset(method, "vit", base=base), sizes | (GUARDS if guards and method != "kd" else {}))
    teacher: Teacher | None = None
    if not base:
        teacher = copy.deepcopy(built_teacher(method))
    student, objective = build_student(name, recipe, teacher), build_objective(recipe)
    branch = build_branch(recipe, objective, student=student, teacher=teacher, steps=10, steps_per_epoch=5)
    device: torch.device = request.getfixturevalue("gpu")
    for net in (teacher, student, branch.network if isinstance(branch, EmaBranch) else None):
        if net is not None:
            put(net, device)
    views = crops(student, device)
    for step in range(2):  # the second meets the guards' memory
        targets = None if isinstance(branch, OwnBranch) else branch.targets(views)
        scores = student(views)
        if isinstance(branch, OwnBranch):
            targets = branch.read(scores)
        assert targets is not None and targets.probs.device.type == scores.crops.device.type == "cuda"
        loss, stats = objective(scores, targets, views)
        assert {loss.device.type} | {value.device.type for value in stats.values()} == {"cuda"}
        branch.update(step, student)


def test_a_tensor_left_behind_is_met(gpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.empty(2, device=gpu) + torch.empty(2)
