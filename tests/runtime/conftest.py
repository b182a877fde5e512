"""Real bundles around tiny models: one convolution, made with onnx.helper, that ONNX Runtime and OpenVINO both open."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robx.records import Bundle, Preprocessing, Student, TensorSpec, describe_file, save_bundle
from robx.runtime.profiles import PROFILES

PREPROCESSING = Preprocessing(size=36, crop=32, interpolation="bilinear")
WIDTH = 8


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, 3, 3, 3)).astype(np.float32)


def save_model(path: Path, *, batch: int | None, kernel: np.ndarray) -> None:
    axis = "N" if batch is None else batch
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["embedding"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [axis, 3, 32, 32])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [axis, WIDTH])],
        [numpy_helper.from_array(kernel, "w"), numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, str(path))


def expected_answers(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The model's answers by plain numpy."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,dcij->ndhw", windows, kernel), 0).mean(axis=(2, 3))


@pytest.fixture
def make_bundle(tmp_path):
    """make_bundle(name, runtime=..., precision=..., batch=..., kernel=...) -> the bundle's folder."""

    def make(name="onnx-fp32", *, runtime="onnxruntime", precision="fp32", batch=None, kernel=None, **changes):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        save_model(folder / "model.onnx", batch=batch, kernel=weights() if kernel is None else kernel)
        student = Student(
            timm_name="resnet18",
            width=WIDTH,
            preprocessing=PREPROCESSING,
            sha256="0" * 64,
            teacher=None,
            data=None,
            recipe={},
        )
        bundle = Bundle(
            format="onnx",
            precision=precision,
            requested=precision,
            target="local",
            runtime=runtime,
            inputs=(TensorSpec(name="images", dtype="float32", shape=(batch, 3, 32, 32)),),
            outputs=(TensorSpec(name="embedding", dtype="float32", shape=(batch, WIDTH)),),
            preprocessing=PREPROCESSING,
            student=student,
            verdict="PASS",
            reason="made by a test",
            rungs=(),
            calibration=None,
            opset=20,
            versions={},
            files=(describe_file(folder, "model.onnx", "model"),),
        )
        save_bundle(dataclasses.replace(bundle, **changes), folder)
        return folder

    return make


@pytest.fixture
def images():
    return np.random.default_rng(3).normal(size=(5, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def short_profile(monkeypatch):
    """The rapid profile in a tenth of its time."""
    short = dataclasses.replace(
        PROFILES["rapid"], seconds=0.4, processes=2, warm_up_seconds=0.03, warm_up_limit=0.5, max_seconds=20
    )
    monkeypatch.setitem(PROFILES, "rapid", short)
    return short
