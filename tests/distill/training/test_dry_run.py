"""What a dry run says of a run is what the run does, and what the run refuses it refuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from robx.cli import main
from robx.distill.recipes import Recipe
from robx.distill.training.dry_run import dry_run
from robx.distill.training.run import Options, RunSpec
from robx.errors import InputError
from robx.images.sources import ImageSource, open_source
from robx.trunk import build_trunk


@pytest.fixture(scope="module")
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


def _spec(recipe: Recipe, source: ImageSource, *, workers: int = 0, **more: Any) -> RunSpec:
    more = {"students": ["test_vit"]} | more
    return RunSpec(recipe=recipe, source=source, options=Options(device="cpu", workers=workers), **more)


def _robx(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_attention_is_counted_as_where_it_is_not_fused(tiny: ModuleType, source: ImageSource) -> None:
    recipe = tiny.tiny_recipe(local_crops=0, patch_drop=0.0, drop_path=0.0, head="native", crop_size=64)
    cost = dry_run(_spec(recipe, source, students=["vit_tiny_patch16_224"], teacher=tiny.tiny_teacher()))
    trunk, pixels = build_trunk("vit_tiny_patch16_224"), torch.zeros(2, 3, 64, 64)  # the two crops of an image
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
        trunk(pixels).sum().backward()
    with FlopCounterMode(display=False) as linear:
        trunk(pixels).sum().backward()
    head = cost.students[0].flops_per_image - whole.get_total_flops()
    # The native head's maps, 192 -> 2048 -> 2048 -> 256 -> 12, forward and twice backward, two crops; and the loss.
    maps = 2 * 2 * 3 * (192 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 12)
    assert head == pytest.approx(maps, rel=0.06)
    assert whole.get_total_flops() - linear.get_total_flops() > 0.2 * maps  # what would be missing


def test_stored_targets_are_measured_on_images_that_they_hold(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    recipe = tiny.tiny_recipe(batch_size=len(source) // 2 + 1)  # the rest of the epoch is cut off and not stored
    tiny.tiny_run(source, tmp_path / "run", recipe=recipe, store=tmp_path / "targets")
    assert dry_run(_spec(recipe, source, targets=tmp_path / "targets")).hours > 0


def test_hours_count_the_loader_and_the_fitting(tiny: ModuleType, source: ImageSource) -> None:
    recipe = tiny.tiny_recipe(epochs=3)
    teacher = tiny.tiny_teacher()
    cost = dry_run(_spec(recipe, source, teacher=teacher, workers=2))
    seconds = cost.steps * 8 * (1 / cost.bound_images_per_s + 1 / (2 * cost.loader_images_per_s))
    fitting = len(source) / cost.teacher_images_per_s  # fewer than 256 a prototype
    assert cost.hours * 3600 == pytest.approx(seconds + fitting, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--teacher", "timm:test_resnet", "--teacher-weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--teacher", "ema", "--student", "test_vit"], "give each --student once"),
        (["--teacher", "ema", "--init", "nowhere"], "nowhere"),
        (["--teacher", "ema", "--recipe", "frozen.toml"], "give --init RUN"),
    ],
)
def test_what_the_run_refuses_the_dry_run_refuses(
    more: list[str], said: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("frozen.toml").write_text("freeze_trunk = true\n")
    command = ("distill", "--student", "test_vit", "--data", scenes, "--device", "cpu", "--batch-size", "8", *more)
    for form in (["--dry-run"], ["--out", "run", "--workers", "0"]):
        found = _robx(*command, *form)
        assert found.exit_code == 2 and said in found.stderr, found.output
    assert not Path("run/recipe.json").exists()


@pytest.mark.parametrize(
    ("student", "values"),
    [
        ("test_vit", {"objective": "dino", "base": True}),
        ("test_resnet", {"objective": "swav", "kind": "cnn", "optimizer": "larc", "student_ema": 0.9}),
    ],
)
def test_a_checkpoint_is_as_large_as_estimated(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, student: str, values: dict[str, Any]
) -> None:
    recipe = tiny.tiny_recipe(prototypes=2000, batch_size=64, **values)
    teacher = None if recipe.base else tiny.tiny_teacher()
    cost = dry_run(_spec(recipe, source, students=[student], teacher=teacher))
    tiny.tiny_run(source, tmp_path, students=[student], recipe=recipe)
    (weights,) = (tmp_path / "checkpoints").glob("*/state.safetensors")
    assert cost.checkpoint_bytes == pytest.approx(weights.stat().st_size, rel=0.03)
    line = f"checkpoints: {cost.checkpoint_bytes / 1e9:.2f} GB on disk, and as much host memory while one is written"
    assert line in cost.lines(recipe.batch_size)


def test_too_few_images_for_the_prototypes_are_refused(tiny: ModuleType, source: ImageSource) -> None:
    teacher = tiny.tiny_teacher()
    teacher.num_prototypes = len(source) + 1
    with pytest.raises(InputError, match=f"need at least {len(source) + 1} images"):
        dry_run(_spec(tiny.tiny_recipe(), source, teacher=teacher))


def test_another_recipe_than_the_folders_is_refused(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("crop_size = 32\nlocal_crops = 0\nprototypes = 12\n")
    command = ("distill", "--teacher", "ema", "--student", "test_vit", "--data", scenes, "--device", "cpu")
    command = (*command, "--recipe", tmp_path / "recipe.toml", "--batch-size", "16", "--out", tmp_path / "run")
    assert _robx(*command, "--epochs", "1", "--workers", "0").exit_code == 0
    assert _robx(*command, "--epochs", "1", "--dry-run").exit_code == 0
    refused = _robx(*command, "--epochs", "2", "--dry-run")
    assert refused.exit_code == 2 and "epochs" in refused.stderr
    assert _robx(*command, "--epochs", "2", "--dry-run", "--fresh").exit_code == 0
