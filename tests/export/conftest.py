"""Small real students whose normalisation statistics fit the scenes, and their ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from robx.export.formats import to_onnx
from robx.export.formats.network import export_model
from robx.export.gate import timing
from robx.images.decode import preprocess
from robx.images.sources import open_source
from robx.records import Preprocessing, Student
from robx.runtime.bench.interleave import Interleaved
from robx.trunk import build_trunk, embedding_width, load_trunk, save_trunk


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without background load, whatever else runs on this one: timings are VALID."""
    monkeypatch.setattr(Interleaved, "reasons", lambda *_: [])


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate times five queries a block; 50 ms a block would take longer than all else."""
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)


def make_student(name: str, folder: Path, images: Path, *, size: int) -> Path:
    """A student with random weights and batch statistics of the scenes."""
    torch.manual_seed(0)
    trunk, pre, source = build_trunk(name), Preprocessing(size=size, crop=size), open_source(images)
    pixels = torch.from_numpy(np.stack([preprocess(source.read(i), pre) for i in range(32)]))
    trunk.train()
    for module in trunk.modules():
        if hasattr(module, "momentum"):
            module.momentum = None  # the plain mean over what was seen
    with torch.no_grad():
        trunk(pixels)
    student = Student(
        timm_name=name, width=embedding_width(trunk), preprocessing=pre, sha256="", teacher=None, data=None, recipe={}
    )
    save_trunk(folder, trunk.eval(), student)
    return folder


@pytest.fixture(scope="session")
def cnn_run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A timm test_resnet at 64 px."""
    return make_student("test_resnet", tmp_path_factory.mktemp("runs") / "cnn", scenes, size=64)


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A timm test_vit, made for 160 px and exported at 64 px."""
    return make_student("test_vit", tmp_path_factory.mktemp("runs") / "vit", scenes, size=64)


@pytest.fixture(scope="session")
def cnn_onnx(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The CNN as float32 ONNX with dynamic batch."""
    return export_onnx(cnn_run, tmp_path_factory.mktemp("onnx") / "cnn.onnx")


@pytest.fixture(scope="session")
def vit_onnx(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The ViT as float32 ONNX with dynamic batch."""
    return export_onnx(vit_run, tmp_path_factory.mktemp("onnx") / "vit.onnx")


@pytest.fixture(scope="session")
def scene_pixels(scenes: Path) -> np.ndarray:
    """48 preprocessed scenes, float32 (48, 3, 64, 64)."""
    source, pre = open_source(scenes), Preprocessing(size=64, crop=64)
    return np.stack([preprocess(source.read(i), pre) for i in range(48)])


def export_onnx(run: Path, path: Path) -> onnx.ModelProto:
    student, trunk = load_trunk(run)
    return to_onnx.export_onnx(export_model(trunk, student), path, student=student, batch=None, opset=20)
