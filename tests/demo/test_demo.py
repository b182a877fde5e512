"""The demo is a committed plan, run on images that it prepares or on the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from robx import api
from robx.cli import main
from robx.demo import demo as module
from robx.distill.resolve import DistillSettings, resolve_recipe
from robx.ship.plan import Plan, check_keys, read_plan
from robx.ship.run import Shipped


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the demo runs; nothing is run."""
    seen: list[Plan] = []

    def run(plan: Plan, **_: Any) -> Shipped:
        seen.append(plan)
        return Shipped(student=plan.out, bundles=(), report=plan.out / "report.html", refused=("int8 is refused",))

    monkeypatch.setattr(module, "run_and_show", run)
    return seen


def test_the_committed_plan_is_valid() -> None:
    with resources.as_file(resources.files("robx.demo") / "plan.toml") as path:
        plan = read_plan(path)
    check_keys(plan, api.VERBS)
    settings = DistillSettings.of(teacher=plan.teacher, student=plan.student, data=plan.data, **plan.distill)
    recipe = resolve_recipe(settings)
    assert (recipe.epochs, recipe.crop_size, recipe.lr, recipe.optimizer) == (4, 64, 0.003, "adamw")
    assert recipe.stage_weight == 1 and recipe.global_crops == 1  # of the recipe "quick"


def test_options_replace_values_of_the_plan_and_a_refused_export_is_no_failure(
    plans: list[Plan], scene_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["demo", "--data", str(scene_shards), "--out", str(out), "--student", "resnet18", "--epochs", "4"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "refused by a gate: int8 is refused" in result.stderr
    (plan,) = plans
    assert (plan.data, plan.out, plan.teacher, plan.student) == (scene_shards, out, "efficientnet_lite0", "resnet18")
    assert plan.distill["epochs"] == 4 and plan.distill["crop_size"] == 64 and plan.margin == 4


def test_a_stage_that_failed_ends_the_demo_with_its_message(
    plans: list[Plan], scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Shipped(student=tmp_path, bundles=(), report=tmp_path / "report.html", failed=("no space left",))
    monkeypatch.setattr(module, "run_and_show", lambda plan, **_: broken)
    result = CliRunner().invoke(main, ["demo", "--data", str(scene_shards), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and result.stderr.endswith("robx: no space left\n")


def test_images_without_labels_are_refused_at_once(tmp_path: Path, scenes: Path) -> None:
    flat = next((scenes / "train").iterdir())
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(flat)
    result = CliRunner().invoke(main, ["demo", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "has no labels" in result.stderr
