"""Each student that robx lists, end to end: distilled, exported, and with the same answers in both engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from robx.cli import main
from robx.distill.teachers.zoo import STUDENTS
from robx.images.decode import preprocess
from robx.images.scenes import write_scenes
from robx.images.sources import open_source
from robx.records import load_bundle, load_student
from robx.runtime.session import open_session

RECIPE = """
optimizer = "adamw"
lr = 0.001
lr_batch = 16
crop_size = 32
local_crops = 0
prototypes = 8
patch_drop = 0.0
"""


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 32 training and 16 test scenes."""
    folder = tmp_path_factory.mktemp("few") / "scenes"
    write_scenes(folder, train=32, test=16, size=64)
    return folder


@pytest.mark.parametrize("name", STUDENTS)
def test_a_listed_student_works_end_to_end(name: str, few_scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = tmp_path / "run"
    _robx(
        *("distill", "--teacher", "timm:test_resnet", "--teacher-weights", tmp_path / "teacher.safetensors"),
        *("--student", name, "--data", few_scenes, "--out", run, "--cache", tmp_path, "--objective", "msn"),
        *("--recipe", tmp_path / "recipe.toml", "--epochs", "1", "--batch-size", "16", "--workers", "0"),
    )
    student = load_student(run)
    assert (student.timm_name, student.images_seen) == (name, 32)
    source = open_source(few_scenes, split="test")
    pixels = np.stack([preprocess(source.read(i), student.preprocessing) for i in range(5)])
    wanted = _answers(run, pixels)
    assert wanted.shape == (5, student.width) and np.ptp(wanted, axis=0).max() > 0
    for form in ("onnx", "openvino"):
        _robx("export", run, "--format", form, "--data", few_scenes)
        assert load_bundle(run / f"{form}-fp32").verdict == "PASS"
        np.testing.assert_allclose(_answers(run / f"{form}-fp32", pixels), wanted, atol=1e-4 * np.abs(wanted).max())


def _robx(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _answers(folder: Path, pixels: np.ndarray) -> np.ndarray:
    with open_session(folder) as session:
        return session.run(pixels)
