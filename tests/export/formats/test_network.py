"""The exported network is the one that timm builds: every rewrite is compared with it, shape included."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from robx.errors import ArtifactError, InputError
from robx.export.build import ExportSettings, export
from robx.export.formats import network
from robx.export.formats.network import export_model, trunk_at_size
from robx.export.request import ExportTarget
from robx.image_size import at_size
from robx.linear_head import Head
from robx.records import MAX_SIDE, Preprocessing, Student, load_bundle
from robx.runtime.session import open_session
from robx.trunk import build_trunk, embedding_width, save_trunk, size_error

# One of each timm network that pools channels-last, and two that pool channels-first, at the smallest size they take.
CHANNELS_LAST = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "sequencer2d_s"]


def trunk_of(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=0, **options).eval()
    return model


def student_of(name: str, size: int, width: int) -> Student:
    return Student(
        timm_name=name, width=width, preprocessing=Preprocessing(size=size, crop=size), sha256="", teacher=None,
        data=None, recipe={},
    )  # fmt: skip


def save_student(name: str, folder: Path, *, size: int) -> Path:
    torch.manual_seed(0)
    trunk = build_trunk(name).eval()
    save_trunk(folder, trunk, student_of(name, size, embedding_width(trunk)))
    return folder


def randomise(trunk: nn.Module) -> nn.Module:
    """Batch statistics that are not 0 and 1, so that a wrong fusion shows."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return trunk


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_a_network_that_pools_channels_last_keeps_its_embedding(name: str) -> None:
    # Fewer layers and channels, the same heads: the pooling is what is tested.
    small: dict[str, dict[str, Any]] = {
        "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1)},
        "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1)},
        "sequencer2d_s": {"img_size": 64, "layers": (1, 1, 1, 1)},
    }
    trunk = trunk_of(name, **small[name])
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = trunk(pixels)
        exported = export_model(trunk, student_of(name, 64, expected.shape[1]))
        torch.testing.assert_close(exported(pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_channels_last_network_exports_what_timm_computes(tmp_path: Path) -> None:
    # Of those that pool channels-last, the one that is exported soonest.
    torch.manual_seed(0)
    trunk = build_trunk("swin_tiny_patch4_window7_224", image_size=32).eval()
    run = tmp_path / "run"
    save_trunk(run, trunk, student_of("swin_tiny_patch4_window7_224", 32, embedding_width(trunk)))
    bundle = export(ExportSettings(run=run, target=ExportTarget(format="onnx"), out=tmp_path / "b"))
    assert bundle.outputs[0].shape == (None, 768)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = trunk(torch.from_numpy(pixels)).numpy()
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(pixels), expected, atol=1e-4 * np.abs(expected).max())


def test_a_rewrite_that_changes_the_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = trunk_of("test_resnet")

    def break_pools(module: nn.Module) -> None:
        module.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1))

    monkeypatch.setattr(network, "_replace_pools", break_pools)
    with pytest.raises(ArtifactError, match="test_resnet rewritten for export differs from PyTorch"):
        export_model(trunk, student_of("test_resnet", 64, 96))


def test_a_width_other_than_recorded_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"returns \(96,\) for an image and its student.json says 64"):
        export_model(trunk_of("test_resnet"), student_of("test_resnet", 64, 64))


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_re_parameterisable_students_are_fused_and_answer_the_same(name: str) -> None:
    trunk = randomise(trunk_of(name))
    before = copy.deepcopy(trunk.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = trunk(pixels)
        exported = export_model(trunk, student_of(name, 64, expected.shape[1]))
        torch.testing.assert_close(exported(pixels), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert len(exported.rewrites) == 1 and exported.rewrites[0].startswith("re-parameterised for inference")
    parameters = [sum(p.numel() for p in module.parameters()) for module in (trunk, exported)]
    assert parameters[1] < parameters[0]
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())  # the student stays


def test_a_network_that_cannot_be_fused_is_exported_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module) -> nn.Module:
        raise RuntimeError("no such branch")

    monkeypatch.setattr(network, "reparameterize_model", fail)
    trunk = trunk_of("repvgg_a0")
    exported = export_model(trunk, student_of("repvgg_a0", 64, 1280))
    assert exported.rewrites == ("not re-parameterised, so it may be slow: no such branch",)
    monkeypatch.setattr(network, "reparameterize_model", lambda model: trunk_of("repvgg_a0").requires_grad_(False))
    randomise(trunk)  # the fused one is another network now
    assert "differs from PyTorch" in export_model(trunk, student_of("repvgg_a0", 64, 1280)).rewrites[0]


def test_the_manifest_says_that_a_student_was_fused_and_the_bundle_is_faster(tmp_path: Path) -> None:
    run = save_student("mobileone_s0", tmp_path / "run", size=64)
    bundle = export(ExportSettings(run=run, target=ExportTarget(format="onnx"), out=tmp_path / "b"))
    assert bundle.rewrites == ("re-parameterised for inference: 43 blocks fused",)
    assert load_bundle(tmp_path / "b").rewrites == bundle.rewrites
    trunk = build_trunk("mobileone_s0").eval()
    pixels = torch.randn(1, 3, 64, 64)
    fused = export_model(trunk, student_of("mobileone_s0", 64, 1024))
    assert _milliseconds(trunk, pixels) > 1.5 * _milliseconds(fused, pixels)


def _milliseconds(model: nn.Module, pixels: torch.Tensor) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(8):
            start = time.process_time()
            model(pixels)
            times.append(time.process_time() - start)
    return 1e3 * min(times)


@pytest.mark.parametrize("size", [(0, 5), (9000, 5)])
def test_a_size_out_of_range_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"--size must be 1 to {MAX_SIDE}"):
        ExportTarget(format="onnx", size=size)


@pytest.mark.parametrize("run", ["cnn_run", "vit_run"])
@pytest.mark.parametrize("size", [(96, 96), (32, 64)])
def test_a_student_is_exported_at_another_size(
    run: str, size: tuple[int, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Trained with 64 pixels; PyTorch at the new size is the reference."""
    folder: Path = request.getfixturevalue(run)
    target = ExportTarget(format="onnx", size=size)
    bundle = export(ExportSettings(run=folder, target=target, out=tmp_path / "b"))
    assert bundle.inputs[0].shape == (None, 3, *size) and bundle.preprocessing.shape == size
    assert f"exported for {size[0]} x {size[1]} pixels, trained with 64 x 64" in bundle.rewrites
    pixels = np.random.default_rng(0).normal(size=(3, 3, *size)).astype(np.float32)
    with open_session(folder) as student, open_session(tmp_path / "b") as session:
        with torch.inference_mode():
            expected = student._model._trunk(torch.from_numpy(pixels)).numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(session.run(pixels), expected, atol=1e-4 * np.abs(expected).max())


def test_a_size_has_a_folder_of_its_own(cnn_run: Path, tmp_path: Path) -> None:
    run = save_student("test_resnet", tmp_path / "run", size=64)
    for size, name in (((96, 96), "onnx-fp32-96"), ((32, 64), "onnx-fp32-32x64"), (None, "onnx-fp32")):
        settings = ExportSettings(run=run, target=ExportTarget(format="onnx", size=size))
        assert settings.folder(export(settings)) == run / name
        assert (run / name / "manifest.json").is_file()


def test_a_network_for_one_size_is_resized_by_timm_or_says_which_sizes_work() -> None:
    options: dict[str, Any] = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1)}
    swin = trunk_of("swin_tiny_patch4_window7_224", **options)
    student = student_of("swin_tiny_patch4_window7_224", 96, 48)
    resized = trunk_at_size(swin, student)
    assert resized(torch.zeros(1, 3, 96, 96)).shape == (1, 48) and resized is not swin
    export_model(resized, student)
    levit = trunk_of("levit_128s")
    with pytest.raises(InputError, match=r"levit_128s cannot take 65 x 64 pixels \(.*\): give --size 224"):
        student = student_of("levit_128s", 64, 384)
        trunk_at_size(levit, dataclasses.replace(student, preprocessing=at_size(student.preprocessing, (65, 64))))


def test_a_head_of_another_width_is_refused() -> None:
    head = Head(weight=np.zeros((2, 5), np.float32), bias=np.zeros(2, np.float32), labels=("a", "b"))
    with pytest.raises(InputError, match="the head takes 5 features and the student gives 96"):
        export_model(trunk_of("test_resnet"), student_of("test_resnet", 64, 96), head=head)


def test_trying_a_size_that_does_not_fit_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch logs the traceback of an operator that fails on shapes alone."""
    assert "must match" in size_error(trunk_of("levit_128s"), 96)
    assert capfd.readouterr().err == ""
