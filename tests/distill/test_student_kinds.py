"""Which recipe a student takes, and what of timm is built as a plain ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from robx.cli import main
from robx.distill.resolve import DistillSettings, resolve_recipe, student_kind
from robx.distill.teachers.frozen_heads import PrototypeHead
from robx.records import to_json
from robx.trunk import build_trunk, embedding_width


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "vit_little_patch16_reg4_gap_256"]
)
def test_a_plain_vit_with_or_without_a_cls_token_takes_small_crops(name: str) -> None:
    with torch.device("meta"):
        trunk = build_trunk(name).eval()
        assert trunk(torch.empty(2, 3, 96, 96)).shape == (2, embedding_width(trunk))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "cnn"),
        ("mobilenetv3_small_100", "cnn"),
        ("vit_tiny_patch16_224", "vit"),
        ("deit_tiny_patch16_224", "vit"),
        ("eva02_tiny_patch14_224", "vit"),
        ("swin_tiny_patch4_window7_224", "vit"),
    ],
)
def test_networks_without_batch_norm_take_the_recipe_of_the_vits(name: str, kind: str) -> None:
    assert student_kind(name) == kind


@pytest.mark.parametrize(("name", "drop"), [("vit_small_patch16_224", 0.15), ("vit_tiny_patch16_224", 0.1)])
def test_a_tiny_vit_drops_fewer_patches(name: str, drop: float, tmp_path: Path) -> None:
    assert resolve_recipe(DistillSettings.of(student=name, data=tmp_path, teacher="msn")).patch_drop == drop
    file = tmp_path / "recipe.toml"
    file.write_text("patch_drop = 0.3\n")
    assert resolve_recipe(DistillSettings.of(student=name, data=tmp_path, teacher="msn", recipe=file)).patch_drop == 0.3


def test_students_of_two_kinds_are_told_whose_recipe_they_train_by(scenes: Path, tmp_path: Path) -> None:
    pair, file = ["--student", "test_resnet", "--student", "test_vit"], tmp_path / "both.toml"
    same = 'optimizer = "adamw"\nlr = 1e-3\nlr_batch = 0\nweight_decay = 0.1\n'
    file.write_text(same)

    def said(*options: str) -> str:
        command = ["distill", "--data", str(scenes), "--dry-run", "--device", "cpu", *options]
        return CliRunner().invoke(main, command).stderr

    base = ["--teacher", "ema", *pair]
    assert "test_vit is trained with the recipe of test_resnet (larc, lr 0.2" in said(*base)
    assert "would have another one in a run of its own (adamw, lr 0.00" in said(*base)
    assert "recipe of" not in said(*base[:-1], "resnet10t")
    assert "weight decay 0.1, drop_path 0.0, weight_decay_end" in said(
        *base, "--recipe", str(file)
    )  # the keys that still differ
    first, own = (
        resolve_recipe(DistillSettings.of(student=s, data=scenes, teacher="ema", recipe=file)) for s in pair[1::2]
    )
    left = {key: value for key, value in to_json(own).items() if value != to_json(first)[key]}
    file.write_text(same + "".join(f"{key} = {value}\n" for key, value in left.items()))
    assert "recipe of" not in said(*base, "--recipe", str(file))  # the same for both
    quick = ["--teacher", "efficientnet_lite0", "--recipe", "quick", *pair]
    assert "(adamw, lr 0.003, weight decay 0.04), and would have another one in a run of its own (adamw, lr 0.001" in (
        said(*quick)
    )


def test_a_teacher_scores_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    features, prototypes = torch.randn(8, 16), torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    head = PrototypeHead(torch.nn.Identity(), prototypes)
    wanted = torch.nn.functional.normalize(features, dim=1).double() @ prototypes.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, patches = head(features), head.patches(features[None])[0]
    for found in (scores, patches):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_crops_are_made_on_a_gpu_unless_something_else_is_said(tmp_path: Path) -> None:
    def augment(**more: object) -> str:
        settings = {"student": "test_resnet", "data": tmp_path, "teacher": "ema", "objective": "dino"} | more
        return resolve_recipe(DistillSettings.of(**settings)).augment

    assert (augment(device="cuda:1"), augment(device="cpu")) == ("device", "pillow")
    assert augment(device="cuda", augment="pillow") == "pillow"
    (tmp_path / "mine.toml").write_text('augment = "pillow"\n')
    assert augment(device="cuda", recipe=tmp_path / "mine.toml") == "pillow"
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text('{"recipe": {"objective": "dino"}}')  # a run of before the key existed
    assert augment(device="cuda", out=run) == "pillow"
    assert augment(device="cuda", out=run, fresh=True) == "device"


def test_a_peak_rate_keeps_the_recipes_first_and_last(tmp_path: Path) -> None:
    settings = DistillSettings.of(student="test_vit", data=tmp_path, teacher="ema", objective="dino", lr=4e-3)
    recipe = resolve_recipe(settings)
    assert (recipe.first_lr, recipe.peak_lr, recipe.last_lr) == pytest.approx((2e-5, 4e-3, 2e-5))
