"""Options beyond the published recipes: one global crop, mixup, feature and stage terms, an enlarged teacher input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file

from robx.distill.batches.crops import multi_crop, plan_image
from robx.distill.batches.loader import CropDataset, collate
from robx.distill.batches.mixup import mix
from robx.distill.batches.views import Views
from robx.distill.objectives.feature_term import feature_loss, stage_loss
from robx.distill.recipes import override, preset
from robx.distill.students.stage_projections import StageProjections
from robx.distill.students.student import build_student
from robx.distill.targets.stored import TargetsInfo
from robx.distill.teachers.wide_resnet import WideResNet
from robx.errors import InputError
from robx.images.scenes import make_scene, render
from robx.images.sources import ImageSource, open_source
from robx.trunk import build_trunk, map_stages, map_strides


@pytest.fixture(scope="module")
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


# ------------------------------------------------------------------------------------------------- one global crop


def test_one_global_crop_is_the_first_of_two_and_local_crops_keep_their_own_settings() -> None:
    image = render(make_scene(3, 1), size=96)
    two = override(
        preset("msn", "cnn"), {"crop_size": 64, "local_crop_size": 32, "local_crops": 3, "blur_p": [0, 0, 1]}
    )
    one = override(two, {"global_crops": 1})
    pair, single = (multi_crop(image, recipe, epoch=2, index=7) for recipe in (two, one))
    assert single.globals.shape == (1, 64, 64, 3) and single.locals.shape == (3, 32, 32, 3)
    assert (single.globals[0] == pair.globals[0]).all()
    plans = plan_image(np.asarray(image), one, epoch=2, index=7).plans
    assert len(plans) == 4 and plans["sigma"][0] == 0 and (plans["sigma"][1:] > 0).all()
    widths = plans["box"][:, 2] - plans["box"][:, 0]
    assert widths[0] > widths[1:].max()  # .3 to 1 of the area against .05 to .3


@pytest.mark.parametrize("augment", ["pillow", "device"])
def test_a_batch_with_one_global_crop(source: ImageSource, tiny: ModuleType, augment: str) -> None:
    recipe = tiny.tiny_recipe(global_crops=1, augment=augment)
    dataset = CropDataset(source, recipe)
    views = collate([dataset[0, index] for index in range(4)]).views(torch.device("cpu"))
    assert views.globals.shape[:2] == (1, 4) and views.locals.shape[:2] == (recipe.local_crops, 4)


@pytest.mark.parametrize("student", ["test_vit", "test_resnet"])
def test_a_run_with_one_global_crop_resumes_exactly(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, student: str
) -> None:
    recipe = tiny.tiny_recipe(global_crops=1, kind="vit" if student == "test_vit" else "cnn", epochs=2)

    def stop(done: int, total: int, note: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    tiny.tiny_run(source, tmp_path / "a", students=[student], recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        options = {"checkpoint_steps": 3}
        tiny.tiny_run(source, tmp_path / "b", students=[student], recipe=recipe, options=options, progress=stop)
    tiny.tiny_run(source, tmp_path / "b", students=[student], recipe=recipe)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_crops": 3}, "global_crops must be between 1 and 2"),
        ({"base": True, "global_crops": 1}, "global_crops needs a teacher"),
        ({"pairing": "swapped", "global_crops": 1, "local_crops": 0}, "swapped pairs need two crops"),
        ({"feature_weight": -1.0}, "feature_weight must be between"),
        ({"teacher_size": 8}, "teacher_size must be between 16 and 4096"),
        ({"teacher_size": 256, "base": True}, "teacher_size needs a teacher, not --teacher ema"),
        ({"teacher_size": 256, "objective": "ibot"}, "give teacher_size = none, or patch_weight = 0"),
        ({"prototype_weight": 0.0}, "no loss is left for the embedding"),
        ({"base": True, "feature_weight": 1.0}, "need a teacher, not --teacher ema"),
        ({"base": True, "stage_weight": 1.0}, "need a teacher, not --teacher ema"),
        ({"stage_weight": -1.0}, "stage_weight must be between"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(preset("msn", "cnn"), values)


def test_ibot_may_have_one_global_crop_that_the_teacher_sees() -> None:
    recipe = override(preset("ibot", "vit"), {"global_crops": 1})
    assert recipe.target_crops == 1
    with pytest.raises(InputError, match="without a target"):
        override(preset("ibot", "vit"), {"teacher_crops": 1})


# ----------------------------------------------------------------------------------------------------------- mixup


def _views(batch: int = 6) -> Views:
    torch.manual_seed(0)
    return Views(torch.randn(2, batch, 3, 8, 8), torch.randn(3, batch, 3, 4, 4), torch.arange(batch))


def test_mixup_blends_all_crops_of_an_image_with_those_of_one_partner() -> None:
    views = _views()
    mixed = mix(views, alpha=0.4, seed=5, draw=9, rank=0)
    for name in ("globals", "locals"):
        crops, blended = getattr(views, name), getattr(mixed, name)
        for b in range(6):
            # Least squares against every possible partner: exactly one explains all of the image's crops.
            found = []
            for p in range(6):
                a, c = crops[:, b].flatten().double(), crops[:, p].flatten().double()
                matrix = torch.stack([a, c], dim=1)
                solution = torch.linalg.lstsq(
                    matrix, blended[:, b].flatten().double()[:, None], driver="gelsd"
                ).solution
                if torch.allclose(matrix @ solution, blended[:, b].flatten().double()[:, None], atol=1e-5):
                    found.append(float(solution[0]) if p != b else 1.0)
            assert found and all(weight >= 0.5 - 1e-5 for weight in found)
    assert mixed.index is views.index
    assert not torch.equal(mixed.globals, views.globals)


def test_blends_are_a_function_of_seed_draw_and_rank() -> None:
    views = _views()
    first = mix(views, alpha=0.4, seed=5, draw=9, rank=0).globals
    assert torch.equal(first, mix(views, alpha=0.4, seed=5, draw=9, rank=0).globals)
    for other in ({"seed": 6}, {"draw": 8}, {"rank": 1}):
        assert not torch.equal(first, mix(views, **{"alpha": 0.4, "seed": 5, "draw": 9, "rank": 0, **other}).globals)


def test_teacher_and_student_see_the_same_blends(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    teacher = tiny.tiny_teacher()
    teacher.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    recipe = tiny.tiny_recipe(mixup=0.5, kind="cnn")
    tiny.tiny_run(source, tmp_path, recipe=recipe, teacher=teacher, students=["test_resnet"])
    plain: list[torch.Tensor] = []
    teacher = tiny.tiny_teacher()
    teacher.register_forward_pre_hook(lambda module, given: plain.append(given[0].clone()))
    tiny.tiny_run(
        source, tmp_path / "plain", recipe=replace(recipe, mixup=0.0), teacher=teacher, students=["test_resnet"]
    )
    count = len(plain[0]) // 2
    blended = mix(
        Views(plain[0].view(2, count, *plain[0].shape[1:]), torch.empty(0), torch.arange(count)),
        alpha=0.5, seed=recipe.seed, draw=0, rank=0,
    ).globals.flatten(0, 1)  # fmt: skip
    assert torch.equal(seen[0], blended) and not torch.equal(seen[0], plain[0])


def test_mixup_and_stored_targets_exclude_each_other(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mixup blends them"):
        tiny.tiny_run(source, tmp_path / "run", recipe=tiny.tiny_recipe(mixup=0.5), store=tmp_path / "targets")


# ---------------------------------------------------------------------------------------------------- feature term


def test_the_feature_loss_is_the_mean_centred_cosine_distance() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 16, 8)) + 3, rng.normal(size=(1, 16, 8)) - 5
    ours, theirs = student[0] - student[0].mean(axis=0), teacher[0] - teacher[0].mean(axis=0)
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    loss = feature_loss(torch.tensor(student), torch.tensor(teacher))
    assert_allclose(float(loss), 1 - cosines.mean(), rtol=1e-6)
    same = torch.tensor(teacher)
    assert float(feature_loss(7 * same + 2, same)) == pytest.approx(0, abs=1e-6)  # scale and offset do not count
    assert float(feature_loss(-same, same)) == pytest.approx(2, abs=1e-6)


def test_the_feature_term_adds_to_the_loss_and_alone_trains_without_prototypes(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    kind = {"kind": "cnn", "epochs": 2}
    for name, values in (
        ("rob", {}),
        ("both", {"feature_weight": 2.0}),
        ("alone", {"feature_weight": 1.0, "prototype_weight": 0.0}),
    ):
        tiny.tiny_run(source, tmp_path / name, recipe=tiny.tiny_recipe(**kind, **values), students=["test_resnet"])
    both, alone = _lines(tmp_path / "both"), _lines(tmp_path / "alone")
    assert "feature_loss" not in _lines(tmp_path / "rob")[0]
    for line in alone:
        assert line["loss"] == pytest.approx(line["feature_loss"], rel=1e-5)
    assert alone[-1]["feature_loss"] < alone[0]["feature_loss"]
    # The same first weights and crops: RoB's own loss at the first step, plus twice the distance.
    assert both[0]["loss"] - 2 * both[0]["feature_loss"] == pytest.approx(_lines(tmp_path / "rob")[0]["loss"], rel=1e-5)


def test_students_without_the_prototype_loss_have_no_head(tiny: ModuleType) -> None:
    recipe = tiny.tiny_recipe(kind="cnn", feature_weight=1.0, prototype_weight=0.0)
    net = build_student("test_resnet", recipe, tiny.tiny_teacher())
    assert not list(net.head.parameters()) and net.projection is not None
    with pytest.raises(InputError, match="which stored targets lack"):
        build_student("test_resnet", recipe, _Stored())


# -------------------------------------------------------------------------------------------------------- stage term


def test_the_stage_loss_is_the_centred_cosine_distance_of_every_place_summed_over_the_stages() -> None:
    rng = np.random.default_rng(1)
    fine, coarse = rng.normal(size=(2, 6, 5, 4, 4)), rng.normal(size=(2, 6, 3, 2, 2))  # (student or teacher, NCHW)
    expected = 0.0
    for student, teacher in (fine, coarse):
        rows = [maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]) for maps in (student[:4], teacher[:4])]
        ours, theirs = (each - each.mean(axis=0) for each in rows)
        cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        expected += 1 - cosines.mean()
    student, teacher = ({4: torch.tensor(fine[k]), 8: torch.tensor(coarse[k])} for k in (0, 1))
    seen = {stride: maps[:4] for stride, maps in teacher.items()}  # of four of the six crops
    assert_allclose(float(stage_loss(student, seen)), expected, rtol=1e-6)
    assert float(stage_loss({8: 7 * teacher[8] + 2}, teacher)) == pytest.approx(0, abs=1e-6)


def test_a_larger_map_of_the_teacher_is_averaged_to_the_students_places() -> None:
    ours = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    larger = ours.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert float(stage_loss({8: ours}, {8: larger})) == pytest.approx(0, abs=1e-6)
    assert float(stage_loss({8: larger}, {8: ours})) == pytest.approx(0, abs=1e-6)


def test_stages_meet_at_the_nearest_stride() -> None:
    cnn, vit = {4: 24, 8: 40, 16: 112, 32: 320}, {16: 192}
    assert StageProjections(cnn, cnn).pairs == {4: 4, 8: 8, 16: 16, 32: 32}
    assert StageProjections(vit, cnn).pairs == {16: 16}
    assert StageProjections(cnn, {14: 384}).pairs == {14: 16}
    assert StageProjections(vit, {8: 384}).pairs == {8: 16}  # none is alike: the nearest two
    assert StageProjections({64: 8}, cnn).pairs == {32: 64}
    maps = {stride: torch.zeros(2, channels, 4, 4) for stride, channels in cnn.items()}
    assert StageProjections(cnn, {14: 384})(maps)[14].shape == (2, 384, 4, 4)


def test_published_resnets_give_the_maps_of_their_stages() -> None:
    trunk = WideResNet(stem=8, depths=(1, 2, 1, 1)).eval()
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last, maps = map_stages(trunk, pixels)
        torch.testing.assert_close(trunk.forward_head(last), trunk(pixels), rtol=0, atol=0)
        torch.testing.assert_close(maps[32].mean(dim=(2, 3)), trunk(pixels))
    assert map_strides(trunk) == {4: 32, 8: 64, 16: 128, 32: 256} == {each: maps[each].shape[1] for each in maps}
    assert [maps[stride].shape[-1] for stride in (8, 16, 32)] == [12, 6, 3]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "test_efficientnet", "test_vit"])
def test_the_pass_that_keeps_the_maps_gives_the_same_embedding(name: str) -> None:
    trunk, pixels = build_trunk(name).eval(), torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last, maps = map_stages(trunk, pixels)
        torch.testing.assert_close(trunk.forward_head(last), trunk(pixels))  # type: ignore[operator]
    channels = {stride: each.shape[1] for stride, each in maps.items()}
    assert channels == map_strides(trunk) and min(channels) >= 4  # mobilenetv3 and efficientnet have one of stride 2
    assert all(each.shape[-1] == min(16, 160 // stride) for stride, each in maps.items())


def test_a_teacher_scores_alike_with_its_maps(tiny: ModuleType) -> None:
    teacher, pixels = tiny.tiny_teacher(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, mapped = teacher(pixels), teacher(pixels, maps=True)
    torch.testing.assert_close(mapped.crops, plain.crops)
    torch.testing.assert_close(mapped.features, plain.features)
    for maps in (False, True):
        bare = teacher(pixels, maps=maps, scores=False)
        torch.testing.assert_close(bare.features, plain.features)
        assert bare.crops.shape == (2, 0) and (bare.maps is not None) == maps
    assert plain.maps is None and {stride: maps.shape[1] for stride, maps in mapped.maps.items()} == teacher.map_strides


@pytest.mark.parametrize("student", ["test_resnet", "test_vit"])
def test_the_stage_term_adds_to_the_loss_and_leaves_no_trace_in_the_student(
    tiny: ModuleType, source: ImageSource, tmp_path: Path, student: str
) -> None:
    kind = {"kind": "vit" if student == "test_vit" else "cnn", "epochs": 2, "patch_drop": 0.0, "drop_path": 0.0}
    for name, values in (("rob", {}), ("stages", {"stage_weight": 0.5})):
        tiny.tiny_run(source, tmp_path / name, recipe=tiny.tiny_recipe(**kind, **values), students=[student])
    plain, stages = _lines(tmp_path / "rob"), _lines(tmp_path / "stages")
    assert "stage_loss" not in plain[0] and stages[-1]["stage_loss"] < stages[0]["stage_loss"]
    assert stages[0]["loss"] - 0.5 * stages[0]["stage_loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    saved = [load_file(tmp_path / name / "student.safetensors") for name in ("rob", "stages")]
    assert saved[0].keys() == saved[1].keys()


def test_the_stage_term_resumes_exactly(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe(kind="cnn", epochs=2, stage_weight=1.0, feature_weight=1.0, feature_projection="linear")

    def stop(done: int, total: int, note: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    tiny.tiny_run(source, tmp_path / "a", students=["test_resnet"], recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        options = {"checkpoint_steps": 3}
        tiny.tiny_run(source, tmp_path / "b", students=["test_resnet"], recipe=recipe, options=options, progress=stop)
    tiny.tiny_run(source, tmp_path / "b", students=["test_resnet"], recipe=recipe)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")


def test_the_feature_terms_projection_is_an_mlp_or_a_linear_map(tiny: ModuleType) -> None:
    teacher = tiny.tiny_teacher()
    nets = [
        build_student("test_resnet", tiny.tiny_recipe(kind="cnn", feature_weight=1.0, **values), teacher)
        for values in ({}, {"feature_projection": "linear"})
    ]
    assert len([*nets[0].projection.parameters()]) > 2  # type: ignore[union-attr]
    assert isinstance(nets[1].projection, torch.nn.Linear) and nets[1].projection.out_features == teacher.width


def test_networks_without_feature_maps_are_refused(tiny: ModuleType) -> None:
    teacher, recipe = tiny.tiny_teacher(), tiny.tiny_recipe(kind="cnn", stage_weight=1.0)
    with pytest.raises(InputError, match="which stored targets lack: give --teacher"):
        build_student("test_resnet", recipe, _Stored())
    with pytest.raises(InputError, match="set patch_drop = 0"):
        build_student("test_vit", override(recipe, {"patch_drop": 0.3}), teacher)
    teacher.trunk = torch.nn.Flatten()
    with pytest.raises(InputError, match=f"{teacher.name} gives no feature maps, which stage_weight"):
        build_student("test_resnet", recipe, teacher)


# ------------------------------------------------------------------------------------- a teacher that sees more pixels


@pytest.mark.parametrize(
    ("crop", "least", "expected"),
    [(64, 128, (128, 128)), (64, None, (64, 64)), (224, 128, (224, 224)), ("160x96", 128, (213, 128))],
)
def test_crops_are_enlarged_for_the_teacher_and_never_reduced(
    crop: int | str, least: int | None, expected: tuple[int, int]
) -> None:
    recipe = override(preset("msn", "cnn"), {"crop_size": crop, "teacher_size": "none" if least is None else least})
    assert recipe.teacher_shape == expected


def test_an_enlarged_crop_scores_as_the_same_pixels_resized_beforehand(tiny: ModuleType) -> None:
    teacher, larger = tiny.tiny_teacher(), tiny.tiny_teacher()
    larger.enlarge_to((48, 48))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(pixels, size=(48, 48), mode="bilinear")
    torch.testing.assert_close(larger(pixels).crops, teacher(resized).crops)
    torch.testing.assert_close(larger.features(pixels), teacher.features(resized))
    torch.testing.assert_close(larger.features(resized), teacher.features(resized))


def test_a_run_gives_its_teacher_enlarged_crops_and_its_student_the_crops_themselves(
    tiny: ModuleType, source: ImageSource, tmp_path: Path
) -> None:
    seen: set[int] = set()
    teacher = tiny.tiny_teacher()
    teacher.trunk.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape[-1]))
    recipe = tiny.tiny_recipe(kind="cnn", epochs=1, local_crops=0, crop_size=32, teacher_size=48)
    tiny.tiny_run(source, tmp_path / "run", recipe=recipe, students=["test_resnet"], teacher=teacher)
    assert seen == {48}
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["teacher_size"] == 48
    assert json.loads((tmp_path / "run" / "student.json").read_text())["preprocessing"]["crop"] == 32


def test_stored_targets_are_of_one_teacher_size() -> None:
    recipe = override(preset("dino", "vit"), {"crop_size": 64})
    decided = [
        TargetsInfo.of(
            override(recipe, {"teacher_size": size}), prototypes=8, images=4, data_fingerprint="d", teacher_sha256="t"
        ).decided_by
        for size in ("none", 32, 96)
    ]
    assert decided[0] == decided[1] and decided[2] == decided[0] | {"teacher_size": 96}


class _Stored:
    name, width, num_prototypes, patch_size, patch_prototypes = "stored", 0, 12, None, None
