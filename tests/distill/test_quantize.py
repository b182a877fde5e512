"""--quantize int8: the student is trained with int8 simulated in its trunk, and what is saved is a plain student."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from robx.distill import resolve
from robx.distill.resolve import DistillSettings, odd_precision, resolve_recipe
from robx.distill.training.compute import DeviceFacts
from robx.errors import InputError
from robx.images.sources import ImageSource, open_source
from robx.records import load_student
from robx.trunk import load_trunk


class Stop(Exception):
    """As a power cut: nothing of robx sees it coming."""


@pytest.fixture(scope="module")
def source(scenes: Path) -> ImageSource:
    return open_source(scenes)


@pytest.fixture(scope="module")
def start(tiny: ModuleType, source: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose student has BatchNorm."""
    out = tmp_path_factory.mktemp("start")
    tiny.tiny_run(source, out, students=["test_resnet"], recipe=_recipe(tiny, quantize=None))
    return out


@pytest.fixture(scope="module")
def unbroken(tiny: ModuleType, source: ImageSource, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    _run(tiny, source, start, out)
    return out


def _recipe(tiny: ModuleType, **values: Any) -> Any:
    return tiny.tiny_recipe(**{"kind": "cnn", "quantize": "int8", "optimizer": "adamw"} | values)


def _run(tiny: ModuleType, source: ImageSource, start: Path, out: Path, **more: Any) -> None:
    recipe = more.pop("recipe", None) or _recipe(tiny)
    tiny.tiny_run(source, out, students=["test_resnet"], recipe=recipe, init=start, **more)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_trunk(folder)[1].state_dict()


def test_a_plain_student_is_saved_with_the_statistics_it_started_with(start: Path, unbroken: Path) -> None:
    before, after = _weights(start), _weights(unbroken)
    assert before.keys() == after.keys() and load_student(unbroken).recipe["quantize"] == "int8"
    for key, value in after.items():
        if "running" in key:
            assert torch.equal(value, before[key])
        elif key.endswith("conv1.weight"):
            assert not torch.equal(value, before[key])


def test_int8_is_simulated(tiny: ModuleType, source: ImageSource, start: Path, unbroken: Path, tmp_path: Path) -> None:
    _run(tiny, source, start, tmp_path / "float", recipe=_recipe(tiny, quantize=None))
    (_, rounded), (_, plain) = tiny.losses(unbroken)[0], tiny.losses(tmp_path / "float")[0]
    assert rounded != plain  # of the first step, with the same weights and crops


def test_a_killed_run_resumes_to_the_same_bits(
    tiny: ModuleType, source: ImageSource, start: Path, unbroken: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Stop

    options = {"checkpoint_steps": 2}
    with pytest.raises(Stop):
        _run(tiny, source, start, tmp_path, options=options, progress=stop)
    _run(tiny, source, start, tmp_path, options=options)
    assert (tmp_path / "student.safetensors").read_bytes() == (unbroken / "student.safetensors").read_bytes()


def test_measuring_the_speed_changes_nothing(
    tiny: ModuleType, source: ImageSource, start: Path, unbroken: Path, tmp_path: Path
) -> None:
    _run(tiny, source, start, tmp_path, options={"measure": True})
    assert (tmp_path / "student.safetensors").read_bytes() == (unbroken / "student.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "--quantize starts from a trained student: give --init RUN"),
        ({"init": "runs/r", "precision": "bf16"}, "--quantize = int8 needs fp32: give --precision fp32"),
        ({"init": "runs/r", "teacher": "ema"}, "--quantize = int8 needs a teacher: drop --teacher ema"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], words: str, scenes: Path) -> None:
    given = {"teacher": "dino_vits16", "student": "resnet18", "data": scenes, "quantize": "int8"} | values
    with pytest.raises(InputError, match=words):
        resolve_recipe(DistillSettings.of(**given))


def test_a_network_that_is_fused_for_export_is_refused(tiny: ModuleType, source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mobileone_s0 has branches .*: use robx export --int8 --heal instead"):
        tiny.tiny_run(source, tmp_path / "run", students=["mobileone_s0"], recipe=_recipe(tiny))


def _earlier(folder: Path, precision: str) -> Path:
    """The record of a run in `folder` that was trained in `precision`."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"precision": precision}}))
    return folder


def test_int8_does_not_inherit_the_precision_of_the_run_to_resume(scenes: Path, tmp_path: Path) -> None:
    out = _earlier(tmp_path / "r", "bf16")
    given = {"teacher": "dino_vits16", "student": "resnet18", "data": scenes, "out": out, "device": "cpu"}
    assert resolve_recipe(DistillSettings.of(**given)).precision == "bf16"
    settings = DistillSettings.of(**given, quantize="int8", init=out, force=True)
    recipe = resolve_recipe(settings)
    assert recipe.precision == "fp32" and recipe.quantize == "int8"
    assert odd_precision(settings, recipe) == [f"quantize int8 is simulated in fp32; the run in {out} used bf16"]
    asked = DistillSettings.of(**given, quantize="int8", init=out, force=True, precision="fp32")
    assert not odd_precision(asked, resolve_recipe(asked))
    with pytest.raises(InputError, match="needs fp32: give --precision fp32"):  # which the user gave otherwise
        resolve_recipe(DistillSettings.of(**given, quantize="int8", init=out, precision="bf16"))


def test_int8_is_simulated_in_fp32_on_a_gpu_too(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DeviceFacts(kind="cuda", name="GPU", bf16=True, tf32=True, cores=4)
    monkeypatch.setattr(resolve, "facts_of", lambda _: gpu)
    given = {"teacher": "dino_vits16", "student": "resnet18", "data": scenes}
    assert resolve_recipe(DistillSettings.of(**given)).precision == "bf16"
    recipe = resolve_recipe(DistillSettings.of(**given, quantize="int8", init=scenes))
    assert recipe.precision == "fp32" and not recipe.tf32
