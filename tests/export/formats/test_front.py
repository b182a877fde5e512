"""The front of a uint8 model against Pillow: axes, channels, resize and crop, for images of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from robx.export.formats import front, front_openvino
from robx.golden.sample import encoded
from robx.images.decode import resize_and_crop
from robx.records import Normalisation, Preprocessing

LEVELS = {"onnxruntime": 1, "openvino": 2}  # of 255: the stated tolerances
SQUARE = Preprocessing(size=36, crop=32, interpolation="bicubic")
PREPROCESSINGS = {
    "bicubic": SQUARE,
    "bilinear": dataclasses.replace(SQUARE, interpolation="bilinear"),
    "odd margin": Preprocessing(size=37, crop=32),
    "wide": Preprocessing(size=36, crop=32, crop_width=50),
    "tall": Preprocessing(size=50, crop=45, crop_width=31, interpolation="bilinear"),
}
FRONT = Normalisation(mean=SQUARE.mean, std=SQUARE.std)
FRONTS = {
    "layout": dataclasses.replace(FRONT, layout="NHWC"),
    "channels": dataclasses.replace(FRONT, channels="BGR"),
    "camera": dataclasses.replace(FRONT, layout="NHWC", channels="BGR", resize=True),
}
# (height, width): reductions, enlargements, a single pixel, and both sides of the longest aspect ratio.
SIZES = [
    (90, 133),
    (133, 90),
    (32, 32),
    (36, 36),
    (37, 51),
    (20, 31),
    (1, 1),
    (240, 13),
    (261, 13),
    (11, 300),
    (401, 700),
]
Run = Callable[[np.ndarray], np.ndarray]


def _identity(pre: Preprocessing, batch: int | str = "N") -> onnx.ModelProto:
    """A uint8 model that returns its input."""
    shape = [batch, 3, *pre.shape]
    given, made = (helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in ("pixels", "out"))
    graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["out"])], "g", [given], [made])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _onnxruntime(model: onnx.ModelProto) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"pixels": images})[0]


def _open(runtime: str, wanted: Normalisation, pre: Preprocessing) -> Run:
    if runtime == "onnxruntime":
        model = front.add_front(_identity(pre), wanted, pre)
        onnx.checker.check_model(model, full_check=True)
        return _onnxruntime(model)
    openvino = pytest.importorskip("openvino")
    plain = openvino.Core().read_model(_identity(pre).SerializeToString())
    compiled = openvino.Core().compile_model(front_openvino.add_front(plain, wanted, pre), "CPU")
    return lambda images: compiled([images])[0]


def _image(height: int, width: int) -> np.ndarray:
    """Noise over a gradient: every frequency, and no constant area."""
    rng = np.random.default_rng(height * 1000 + width)
    slope = np.linspace(0, 128, height)[:, None, None] + np.linspace(0, 64, width)[None, :, None]
    noise = rng.integers(0, 64, (height, width, 3))
    found: np.ndarray = (slope + noise).astype(np.uint8)
    return found


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_pixel_is_pillows_within_the_stated_levels_at_any_size(runtime: str, name: str) -> None:
    pre = PREPROCESSINGS[name]
    wanted = dataclasses.replace(FRONT, resize=True)
    run = _open(runtime, wanted, pre)
    for height, width in SIZES:
        image = _image(height, width)
        expected = np.asarray(resize_and_crop(Image.fromarray(image), pre)).astype(int)
        found = run(encoded(image, wanted))
        assert found.shape == (1, 3, *pre.shape) and found.dtype == np.uint8
        assert np.abs(found[0].transpose(1, 2, 0) - expected).max() <= LEVELS[runtime], (height, width)


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_batch_in_other_axes_and_channels_is_turned(runtime: str, name: str) -> None:
    wanted = FRONTS[name]
    image = _image(77, 53)
    right = np.asarray(resize_and_crop(Image.fromarray(image), SQUARE))
    given = np.concatenate([encoded(image if wanted.resize else right, wanted)] * 2)
    found = _open(runtime, wanted, SQUARE)(given)
    assert np.abs(found.astype(int) - right.transpose(2, 0, 1)).max() <= (LEVELS[runtime] if wanted.resize else 0)


def test_a_fixed_batch_and_the_inputs_name_stay() -> None:
    model = front.add_front(_identity(SQUARE, batch=2), FRONTS["camera"], SQUARE)
    (given,) = model.graph.input
    dims = given.type.tensor_type.shape.dim
    assert given.name == "pixels" and dims[0].dim_value == 2 and dims[3].dim_value == 3 and dims[1].dim_param
    assert _onnxruntime(model)(np.zeros((2, 70, 50, 3), np.uint8)).shape == (2, 3, 32, 32)
