"""Recipes by name: what "quick" resolves to, where it is refused, and that it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import robx.distill.train as train_module
from robx.cli import main
from robx.distill.presets import NAMED, QUICK
from robx.distill.recipe_toml import read_recipe
from robx.distill.recipes import METHODS, StudentKind, override, preset
from robx.distill.resolve import DistillSettings, resolve_recipe, unused_options
from robx.distill.students import stage_projections
from robx.distill.teachers import from_timm, load
from robx.distill.teachers.choose import choose_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.zoo import ZooEntry
from robx.distill.train import distill, estimate
from robx.distill.training import compute
from robx.distill.training.compute import DeviceFacts, cpu_has_bf16, decide
from robx.distill.training.dry_run import count_flops
from robx.errors import InputError
from robx.images.sources import open_source
from robx.records import to_json

BF16_CPU = DeviceFacts(kind="cpu", bf16=True, cores=4)


def _settings(data: Path, **given: object) -> DistillSettings:
    return DistillSettings.of(**{"student": "resnet10t", "data": data, "teacher": "timm:test_resnet"} | given)


def test_quick_is_its_table_over_the_preset_of_its_objective(scenes: Path) -> None:
    found = resolve_recipe(_settings(scenes, recipe="quick", precision="fp32"))
    assert found == override(preset("msn", "cnn"), QUICK)
    assert resolve_recipe(_settings(scenes, recipe="paper")) == resolve_recipe(_settings(scenes))


def test_a_file_may_start_from_quick_and_options_win_over_both(scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('like = "quick"\nepochs = 3\nprototypes = 99\n')
    found = resolve_recipe(_settings(scenes, recipe=path, epochs=5, precision="fp32"))
    assert found == override(preset("msn", "cnn"), QUICK | {"prototypes": 99, "epochs": 5})
    path.write_text('like = "fast"\n')
    with pytest.raises(InputError, match="like = 'fast' is not a recipe: give one of paper, quick"):
        resolve_recipe(_settings(scenes, recipe=path))


@pytest.mark.parametrize("recipe", ["quick", "paper"])
@pytest.mark.parametrize("has", [True, False])
def test_only_quick_computes_in_bf16_and_only_on_a_cpu_that_can(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, has: bool
) -> None:
    monkeypatch.setattr(compute, "cpu_has_bf16", lambda: has)
    found = resolve_recipe(_settings(scenes, recipe=recipe, device="cpu"))
    assert found.precision == ("bf16" if has and recipe == "quick" else "fp32")
    assert resolve_recipe(_settings(scenes, recipe=recipe, device="cpu", precision="fp32")).precision == "fp32"


def test_quick_computes_in_float32_where_int8_is_simulated(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "cpu_has_bf16", lambda: True)
    found = resolve_recipe(_settings(scenes, recipe="quick", device="cpu", quantize="int8", init=scenes))
    assert found.precision == "fp32"


def test_the_decision_for_a_cpu() -> None:
    assert decide(BF16_CPU, {}).precision == "fp32"
    assert decide(BF16_CPU, {}, quick=True).precision == "bf16"
    assert decide(DeviceFacts(kind="cpu"), {}, quick=True).precision == "fp32"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd bf16", False),  # its speed was not measured
        ("bugs\t\t: avx512_bf16", False),
    ],
)
def test_bf16_instructions_are_read_from_cpuinfo(flags: str, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{flags}\n")
    assert cpu_has_bf16(path) == expected
    assert not cpu_has_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "ema"}, "needs a teacher's features, which --teacher ema lacks"),
        ({"teacher": None, "targets": "stored"}, "needs a teacher's features, which --targets DIR lacks"),
    ],
)
def test_quick_is_refused_where_it_cannot_work(scenes: Path, given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        resolve_recipe(_settings(scenes, recipe="quick", **given))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quik", "--recipe quik is neither a recipe's name nor a file: did you mean quick?"),
        ("PAPER", "did you mean paper?"),
        ("mine.toml", "give paper, quick, or a file in TOML (see robx recipe)"),
        ("dino", "give --objective dino, whose published recipe is the default"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(scenes: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        resolve_recipe(_settings(scenes, recipe=name))


@pytest.mark.parametrize(
    ("text", "said"),
    [("like = ['quick']", "is not a recipe"), ("objective = ['dino']", "objective must be a string")],
)
def test_a_list_in_place_of_a_name_is_refused(scenes: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        resolve_recipe(_settings(scenes, recipe=str(tmp_path / "mine.toml")))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("paper", "the recipe paper is one per objective: give dino, ibot, msn, swav, kd or quick"),
        ("quik", "'quik' is not a recipe: did you mean quick?"),
        ("zzz", "'zzz' is not a recipe: give dino, ibot"),
    ],
)
def test_what_cannot_be_printed_is_refused_with_what_can(name: str, said: str) -> None:
    result = CliRunner().invoke(main, ["recipe", name, "--student", "resnet10t"])
    assert result.exit_code == 2 and result.stderr.startswith(f"robx: {said}"), result.output


def test_the_printed_recipe_reads_back_to_quick(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["recipe", "quick", "--student", "resnet10t"])
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "printed.toml"
    path.write_text(printed.stdout)
    assert override(preset("swav", "cnn"), read_recipe(path)) == override(preset("msn", "cnn"), QUICK)
    refused = CliRunner().invoke(main, ["recipe", "quick", "--student", "resnet10t", "--base"])
    assert refused.exit_code == 2 and "needs a teacher" in refused.output


def test_quick_has_a_lower_rate_for_a_vit(scenes: Path) -> None:
    cnn, vit = (
        resolve_recipe(_settings(scenes, recipe="quick", student=name, precision="fp32", crop_size=64))
        for name in ("resnet10t", "vit_tiny_patch16_224")
    )
    changed = {key for key, value in to_json(vit).items() if value != to_json(cnn)[key]}
    assert changed == {"lr"} and vit.lr < cnn.lr
    printed = CliRunner().invoke(main, ["recipe", "quick", "--student", "vit_tiny_patch16_224"])
    assert "\nlr = 0.001" in printed.stdout


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_quick_means_the_same_for_every_teacher_and_student(method: str, kind: StudentKind) -> None:
    unread = {"objective", "head", "teacher_temperature", "student_temperature", "prototypes", "sinkhorn_iterations"}
    unread |= {"sinkhorn_epsilon", "local_scale", "local_crop_size", "nesterov"}
    one, other = (to_json(override(preset(*of), NAMED["quick"][kind])) for of in ((method, kind), ("msn", "cnn")))
    assert {key for key in one if one[key] != other[key]} <= unread


@pytest.mark.parametrize("objective", [None, "dino", "swav"])
def test_quick_trains_without_prototypes_and_fits_none_whatever_the_objective(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str | None
) -> None:
    def fitted(*_: object, **__: object) -> None:
        raise AssertionError("prototypes were fitted")

    monkeypatch.setattr(load, "fit_teacher", fitted)
    monkeypatch.setattr(from_timm, "load", _random_teacher)
    said: list[str] = []
    given = {"recipe": "quick", "out": tmp_path / "run", "student": "test_resnet", "crop_size": 32, "epochs": 1}
    given |= {"prototypes": 64, "objective": objective}
    distill(_settings(scenes, **given, measure=False, device="cpu"), say=said.append)
    text = "\n".join(said)
    assert "--prototypes 64 is not used" in text and (objective is None or f"--objective {objective} is not" in text)
    assert "test_resnet matches the teacher's feature maps at stride 4, 8, 16, 32" in text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(first["feature_loss"] + first["stage_loss"], rel=1e-5)


def _random_teacher(entry: ZooEntry, **values: Any) -> Teacher:
    return from_timm.build(entry, weights=None, image_size=values["image_size"])


def test_quick_has_no_scores_to_store(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--store-targets stores the scores of prototypes, which this recipe does not use"
    ):
        resolve_recipe(_settings(scenes, recipe="quick", store_targets=tmp_path / "targets"))


def test_quick_trains_and_resumes_to_the_same_weights(scenes: Path, tmp_path: Path, tiny: ModuleType) -> None:
    recipe = override(
        preset("swav", "cnn"), QUICK | {"crop_size": 32, "epochs": 2, "batch_size": 8, "precision": "bf16"}
    )
    source, weights = open_source(scenes), []
    measured = {"measure": True}  # one crop of one image is too little for BatchNorm
    tiny.tiny_run(source, tmp_path / "measured", students=["test_resnet"], recipe=recipe, options=measured)
    for name, stop in (("whole", None), ("resumed", 3)):

        def progress(done: int, *_: object, stop: int | None = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        call = {"students": ["test_resnet"], "recipe": recipe, "options": {"checkpoint_steps": 1}}
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                tiny.tiny_run(source, tmp_path / name, progress=progress, **call)
        tiny.tiny_run(source, tmp_path / name, **call)
        weights.append((tmp_path / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    losses = [loss for _, loss in tiny.losses(tmp_path / "whole")]
    assert losses[-1] < losses[0]


def test_the_cost_of_quick_is_estimated_without_prototypes(scenes: Path) -> None:
    given = {"recipe": "quick", "student": "test_resnet", "crop_size": 32, "batch_size": 8, "device": "cpu"}
    _, cost = estimate(_settings(scenes, **given))
    trunk = from_timm.build(choose_teacher("timm:test_resnet"), weights=None, image_size=32).trunk
    assert cost.teacher is not None and cost.teacher.flops_per_image == count_flops(trunk, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "quick", "batch_size": 1}, "images of a micro-batch with their mean.*give --batch-size 2"),
        ({"recipe": "quick", "batch_size": 4, "accumulate": 4}, "and there is one: give --batch-size 8"),
        ({"batch_size": 1}, "BatchNorm needs more than one image in a micro-batch: give --batch-size 2"),
    ],
)
def test_a_batch_of_one_image_is_refused_before_the_teacher_is_loaded(
    scenes: Path, tmp_path: Path, given: dict[str, object], said: str
) -> None:
    given = {"student": "test_resnet", "out": tmp_path / "run", "crop_size": 32, "device": "cpu"} | given
    with pytest.raises(InputError, match=said):
        distill(_settings(scenes, **given))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_does_not_suit_the_student_is_refused_before_the_teacher_is_loaded(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(train_module, "load_teacher", loaded)
    recipe = tmp_path / "mine.toml"
    given = {"student": "test_vit", "out": tmp_path / "run", "crop_size": 32, "batch_size": 8, "device": "cpu"}
    recipe.write_text('like = "quick"\npatch_drop = 0.2\nprototype_weight = 0.5\n')
    with pytest.raises(InputError, match="set patch_drop = 0"):
        distill(_settings(scenes, recipe=recipe, **given))
    recipe.write_text('like = "quick"\n')
    monkeypatch.setattr(stage_projections, "map_strides", lambda _: {})
    with pytest.raises(InputError, match=r'test_vit gives no feature maps.*like = "quick" and stage_weight = 0'):
        distill(_settings(scenes, recipe=recipe, **given))


def test_local_crops_that_no_loss_reads_are_not_cut_and_said_to_be_unused(scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('like = "quick"\nlocal_crops = 3\n')
    settings = _settings(scenes, recipe=file, local_crops=4)
    recipe = resolve_recipe(settings)
    assert recipe.local_crops == 0
    said = "\n".join(unused_options(settings, recipe))
    assert "--local-crops 4 is not used" in said and "mine.toml: local_crops 3 is not used" in said
    file.write_text('like = "quick"\nlocal_crops = 3\nprototype_weight = 1.0\n')
    settings = _settings(scenes, recipe=file)
    assert resolve_recipe(settings).local_crops == 3
    assert unused_options(settings, resolve_recipe(settings)) == []
