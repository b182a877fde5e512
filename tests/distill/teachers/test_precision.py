"""A teacher's weights kept in half precision: the scores of autocast, without rounding the weights in each step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robx.distill.recipes import preset
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.training.learner import HALF
from robx.distill.training.networks import build_networks
from robx.distill.training.processes import Processes

TEACHERS = [
    ("dino_vits16", "dino", 48),
    ("ibot_vits16", "ibot", 48),
    ("swav_rn50", "swav", 64),
    ("timm:test_resnet", "kd", 64),
    ("timm:test_vit2", "msn", 64),
    ("timm:test_efficientnet", "msn", 64),
]


class RoundedWeights(TorchDispatchMode):
    """Counts the elements that are converted to half precision."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype in HALF.values() and args[0].dtype != found.dtype:
            self.elements += found.numel()
        return found


@pytest.mark.parametrize(
    ("name", "objective", "size", "precision"), [(*one, "bf16") for one in TEACHERS] + [(*TEACHERS[4], "fp16")]
)
def test_the_scores_are_those_of_autocast_bit_for_bit(name: str, objective: str, size: int, precision: str) -> None:
    torch.manual_seed(0)
    teacher = build_teacher_skeleton(name, objective=objective, prototypes=32, image_size=size)
    pixels, dtype = torch.randn(2, 3, size, size), HALF[precision]
    with torch.autocast("cpu", dtype=dtype):
        features = teacher.features(pixels)
        with RoundedWeights() as before:
            expected = teacher(pixels)
    teacher.keep_in(dtype)
    with RoundedWeights() as after:
        found = teacher(pixels)
    for one, other in ((expected.crops, found.crops), (features, teacher.features(pixels))):
        assert other.dtype == torch.float32 and torch.equal(one, other)
    if expected.patches is not None:
        assert torch.equal(expected.patches, found.patches)
    weights = sum(m.weight.numel() for m in teacher.trunk.modules() if type(m) in (nn.Linear, nn.Conv2d))
    assert weights and after.elements <= before.elements - weights


def test_norms_head_and_prototypes_stay_in_single_precision() -> None:
    teacher = build_teacher_skeleton("dino_vits16", objective="dino", prototypes=32, image_size=48)
    size = sum(p.nbytes for p in teacher.trunk.parameters())
    teacher.keep_in(torch.bfloat16)
    assert teacher.head is not None
    assert {t.dtype for t in (*teacher.head.parameters(), *teacher.head.buffers())} == {torch.float32}
    assert {m.weight.dtype for m in teacher.trunk.modules() if isinstance(m, nn.LayerNorm)} == {torch.float32}
    assert sum(p.nbytes for p in teacher.trunk.parameters()) < 0.52 * size


@pytest.mark.parametrize(("precision", "kept"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_keeps_its_teacher_in_the_recipes_precision(tiny: ModuleType, precision: str, kept: torch.dtype) -> None:
    teacher, place = tiny.tiny_teacher(), Processes(0, 1, torch.device("cpu"))
    recipe = tiny.tiny_recipe(precision=precision)
    build_networks(recipe, ["test_vit"], teacher=teacher, processes=place, steps=1, steps_per_epoch=1)
    found = {m.weight.dtype for m in teacher.trunk.modules() if isinstance(m, nn.Conv2d)}
    assert found == {kept} and preset("msn", "vit").precision == "fp32"
