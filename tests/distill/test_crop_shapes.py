"""Students of 64 x 32 pixels, height x width, from the crops to the exported model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from robx.cli import main
from robx.distill.teachers.load import build_teacher_skeleton
from robx.distill.teachers.teacher import Teacher
from robx.errors import InputError
from robx.export.build import ExportSettings, export
from robx.export.request import ExportTarget
from robx.images.sources import open_source
from robx.records import load_student
from robx.trunk import load_trunk

SIZES = {"crop_size": "64x32", "local_crop_size": "32x16"}


def teacher_of(name: str) -> Teacher:
    torch.manual_seed(11)
    return build_teacher_skeleton(name, objective="msn", prototypes=12, image_size=(64, 32))


class Stop(Exception):
    """As a power cut."""


def stop(done: int, total: int, note: str) -> None:
    if done == 5:
        raise Stop


@pytest.fixture(scope="module")
def runs(tiny: ModuleType, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN, of a ViT teacher, and a ViT whose patches MSN drops, of a CNN teacher; the ViT's targets are stored."""
    root, source = tmp_path_factory.mktemp("tall"), open_source(scenes)
    recipe, more = tiny.tiny_recipe(kind="cnn", **SIZES), {"options": {"probe_every": 1, "stored_k": 12}}
    tiny.tiny_run(
        source, root / "cnn", students=["test_resnet"], recipe=recipe, teacher=teacher_of("timm:test_vit"), **more
    )
    more = {"options": {"stored_k": 12}, "store": root / "targets"}
    recipe = tiny.tiny_recipe(**SIZES)
    tiny.tiny_run(source, root / "vit", recipe=recipe, teacher=teacher_of("timm:test_resnet"), **more)
    return root


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_an_exported_student_gives_the_embeddings_of_the_manifests_preprocessing(runs: Path, name: str) -> None:
    """Exported without --size; Pillow and numpy do what the manifest says, and PyTorch is the reference."""
    bundle = export(ExportSettings(run=runs / name, target=ExportTarget(format="onnx"), out=runs / f"{name}-onnx"))
    manifest = json.loads((runs / f"{name}-onnx" / "manifest.json").read_text())
    steps = manifest["preprocessing"]
    assert {key: steps[key] for key in ("size", "crop", "crop_width")} == {"size": 73, "crop": 64, "crop_width": 32}
    assert bundle.inputs[0].shape == (None, 3, 64, 32)

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    # 73 / 64 of the crop is covered by the image at its own aspect ratio, then the centre is cut.
    scale = max(73 / 90, 73 * 32 / 64 / 160)
    resized = image.resize((round(160 * scale), 73), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((73 - 64) / 2)
    pixels = np.asarray(resized)[top : top + 64, left : left + 32].astype(np.float32) / 255
    pixels = ((pixels - np.float32(steps["mean"])) / np.float32(steps["std"])).transpose(2, 0, 1)[None]

    _, trunk = load_trunk(runs / name)
    with torch.inference_mode():
        expected = trunk(torch.from_numpy(pixels)).numpy()
    model = runs / f"{name}-onnx" / next(file.path for file in bundle.files if file.path.endswith(".onnx"))
    found = onnxruntime.InferenceSession(model).run(["embedding"], {"pixels": pixels})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_run_records_its_shape_and_is_evaluated_at_it(runs: Path) -> None:
    recorded = json.loads((runs / "cnn" / "recipe.json").read_text())["recipe"]
    assert (recorded["crop_size"], recorded["local_crop_size"]) == ("64x32", "32x16")
    assert load_student(runs / "cnn").preprocessing.shape == (64, 32)
    lines = [json.loads(line) for line in (runs / "cnn" / "metrics.jsonl").read_text().splitlines()]
    assert sum("probe_knn" in line for line in lines) == 2 and "teacher_probe_knn" in next(
        line for line in lines if "probe_knn" in line
    )


def test_a_resumed_run_is_the_unbroken_one(tiny: ModuleType, scenes: Path, runs: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"recipe": tiny.tiny_recipe(**SIZES), "options": {"checkpoint_steps": 3}}
    with pytest.raises(Stop):
        tiny.tiny_run(open_source(scenes), tmp_path, teacher=teacher_of("timm:test_resnet"), progress=stop, **more)
    tiny.tiny_run(open_source(scenes), tmp_path, teacher=teacher_of("timm:test_resnet"), **more)
    assert (tmp_path / "student.safetensors").read_bytes() == (runs / "vit" / "student.safetensors").read_bytes()


def test_stored_targets_train_the_same_student(tiny: ModuleType, scenes: Path, runs: Path, tmp_path: Path) -> None:
    tiny.tiny_run(open_source(scenes), tmp_path / "stored", recipe=tiny.tiny_recipe(**SIZES), targets=runs / "targets")
    pairs = zip(tiny.losses(tmp_path / "stored"), tiny.losses(runs / "vit"), strict=True)
    assert all(abs(stored - online) < 1e-3 for (_, stored), (_, online) in pairs)
    with pytest.raises(InputError, match="crop_size = 64x32, not 64"):
        square = tiny.tiny_recipe(**SIZES | {"crop_size": 64})
        tiny.tiny_run(open_source(scenes), tmp_path / "square", recipe=square, targets=runs / "targets")


def test_a_base_method_learns_from_crops_that_are_not_square(tiny: ModuleType, scenes: Path, tmp_path: Path) -> None:
    """The moving average sees them too; iBOT's masks have 4 x 2 patches; the crops are made in batches."""
    recipe = tiny.tiny_recipe(objective="ibot", base=True, augment="device", batch_size=32, **SIZES)
    tiny.tiny_run(open_source(scenes), tmp_path, recipe=recipe)
    losses = [loss for _, loss in tiny.losses(tmp_path)]
    assert len(losses) == 2 and all(np.isfinite(losses))
    assert load_student(tmp_path).preprocessing.shape == (64, 32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--crop-size", "64x8"), "--crop-size must be between 16 and 4096, got crop_size = '64x8'"),
        (("--crop-size", "64 by 32"), "--crop-size must be a number of pixels or HEIGHTxWIDTH, got '64 by 32'"),
        (("--local-crop-size", "-1"), "--local-crop-size must be a number of pixels or HEIGHTxWIDTH, got '-1'"),
        (("--crop-size", "64x32", "--local-crop-size", "50x32"), "test_vit, built for crops of 64x32 pixels, cannot"),
    ],
)
def test_a_size_that_does_not_work_is_one_line_and_status_2(
    scenes: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    common = ("--student", "test_vit", "--teacher", "ema", "--data", str(scenes), "--out", str(tmp_path / "run"))
    done = CliRunner().invoke(main, ["distill", *common, "--batch-size", "8", "--device", "cpu", *arguments])
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_teacher_that_cannot_take_the_shape_says_which_it_can() -> None:
    with pytest.raises(InputError, match=r"timm:test_vit cannot process crops of 64x40 .*nearest: 64x32 and 64x48\)"):
        build_teacher_skeleton("timm:test_vit", objective="msn", prototypes=12, image_size=(64, 40))


def test_one_students_preprocessing_is_that_of_an_export_at_its_size(runs: Path) -> None:
    from robx.image_size import at_size

    trained = load_student(runs / "cnn").preprocessing
    square = dataclasses.replace(trained, size=73, crop_width=None)
    assert at_size(square, (64, 32)) == trained
