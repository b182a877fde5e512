"""A network that a base method pretrained here is read back by the zoo as a teacher that says the same."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from robx.distill.batches.views import Views
from robx.distill.objectives.build import build_objective
from robx.distill.recipes import Method, Recipe, override, preset
from robx.distill.students.student import StudentNet, build_student
from robx.distill.targets.branches import EmaBranch, OwnBranch
from robx.distill.targets.build import build_branch
from robx.distill.targets.centering import TargetProcessor
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.write_checkpoint import published_checkpoint, save_published
from robx.errors import InputError
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD
from tests.preloaded import Preloaded


def trained(method: Method, name: str) -> tuple[Recipe, StudentNet, StudentNet, TargetProcessor]:
    """A base method's student, teacher and guards after a step that moved every weight and statistic."""
    torch.manual_seed(0)
    sizes = {"crop_size": 64, "local_crops": 0, "prototypes": 24, "drop_path": 0.0}
    recipe = override(preset(method, "vit", base=True), sizes)
    student = build_student(name, recipe, None)
    branch = build_branch(recipe, build_objective(recipe), student=student, teacher=None, steps=10, steps_per_epoch=5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    branch.update(0, student)
    views = Views(torch.randn(2, 4, 3, 64, 64), torch.zeros(0, 4, 3, 32, 32), torch.arange(4))
    if isinstance(branch, EmaBranch):
        branch.targets(views)
        return recipe, student, branch.network, branch.processor
    assert isinstance(branch, OwnBranch)
    student(views)
    return recipe, student, student, branch.processor


def published(
    network: StudentNet, student: StudentNet, processor: TargetProcessor, recipe: Recipe, name: str
) -> dict[str, Any]:
    return published_checkpoint(
        network.state_dict(),
        student.state_dict(),
        center=processor.center,
        patch_center=processor.patch_center,
        recipe=recipe,
        timm_name=name,
        epoch=3,
    )


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("dino", "vit_tiny_patch16_224"),
        ("dino", "resnet18"),
        ("ibot", "vit_tiny_patch16_224"),
        ("msn", "vit_tiny_patch16_224"),
        ("swav", "resnet50"),
        ("swav", "test_convnext"),
    ],
)
def test_the_zoo_reads_it_back(method: Method, name: str, tmp_path: Path) -> None:
    recipe, student, network, processor = trained(method, name)
    path = tmp_path / "checkpoint.pth"
    content = published(network, student, processor, recipe, name)
    save_published(path, content)
    teacher = load_teacher(method, weights=path, image_size=64)
    assert teacher.method == method
    assert (teacher.mean, teacher.std) == (IMAGENET_MEAN, IMAGENET_STD)
    own = load_teacher(method, weights=path, image_size=64, mean=(0.5, 0.5, 0.5))
    assert own.mean == (0.5, 0.5, 0.5)
    assert teacher.num_prototypes == 24
    pixels = torch.randn(3, 3, 64, 64)
    network.eval()
    features, tokens = network.embed_globals(pixels[None])
    scores = teacher(pixels)
    torch.testing.assert_close(scores.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.crops, network.head(features), rtol=1e-4, atol=1e-5)
    if method == "ibot":
        assert teacher.patch_prototypes == 24
        torch.testing.assert_close(scores.patches, network.head.patches(tokens), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_the_layout_is_dinos(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    recipe, student, network, processor = trained("dino", name)
    content = published(network, student, processor, recipe, name)
    assert set(content) == {"student", "teacher", "epoch", "args", "dino_loss"}
    assert {"backbone.cls_token", "head.mlp.4.bias", "head.last_layer.weight_g"} <= set(content["teacher"])
    assert all(key.startswith(("module.backbone.", "module.head.")) for key in content["student"])
    assert content["dino_loss"]["center"].shape == (1, 24)


def test_only_native_heads_have_a_layout() -> None:
    recipe, student, network, processor = trained("dino", "test_vit")
    other = override(recipe, {"head": "mlp"})
    with pytest.raises(InputError, match="no published layout"):
        published(network, student, processor, other, "test_vit")


@pytest.mark.parametrize("what", ["teacher", "prototypes"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, what: str, preloaded: Preloaded) -> None:
    """A process of its own that may write no more than 64 KiB to any file."""
    code = """
    import resource, signal, sys, torch
    from pathlib import Path
    from robx.distill.teachers.prototypes import FitSettings, Prototypes, save_prototypes
    from robx.distill.teachers.write_checkpoint import save_published
    from robx.errors import InputError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    path, big = Path(sys.argv[1]) / "file", torch.ones(300, 300)
    try:
        if sys.argv[2] == "teacher":
            save_published(path, {"teacher": big})
        else:
            save_prototypes(path, Prototypes(big[0].clone(), big, 1, 0, 0.5), FitSettings("t", "d", 300, 32, 32))
    except InputError as error:
        print(error)
    """
    _, said, errors = preloaded.run(["-c", textwrap.dedent(code), tmp_path, what])
    assert "no space left to write" in said, errors
    assert list(tmp_path.iterdir()) == []
