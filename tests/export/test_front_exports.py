"""Exports that take camera images: any size, NHWC, BGR. They answer as the student does after Pillow's resize."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from robx.cli import main
from robx.embeddings import cosine
from robx.errors import ArtifactError, InputError
from robx.export.build import ExportSettings, export
from robx.export.gate import front as gate_front
from robx.export.gate.gate import Limits
from robx.export.request import ExportTarget
from robx.images.decode import preprocess
from robx.images.scenes import make_scene, render
from robx.records import Bundle, Preprocessing, load_bundle, load_student, save_student
from robx.runtime.check import check
from robx.runtime.infer import infer
from robx.runtime.session import open_session
from robx.trunk import embed, load_trunk

CAMERA = ExportTarget(
    format="onnx", uint8_input=True, resize_in_graph=True, input_layout="NHWC", input_channels="BGR"
)  # fmt: skip


@pytest.fixture(scope="module")
def run_with_margin(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CNN with a margin around its crop."""
    run = tmp_path_factory.mktemp("margin") / "run"
    run.mkdir()
    (run / "student.safetensors").write_bytes((cnn_run / "student.safetensors").read_bytes())
    student = load_student(cnn_run)
    save_student(dataclasses.replace(student, preprocessing=Preprocessing(size=72, crop=64)), run)
    return run


@pytest.fixture(scope="module")
def camera(run_with_margin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    out = tmp_path_factory.mktemp("camera") / "bundle"
    return out, export(ExportSettings(run=run_with_margin, target=CAMERA, out=out))


def _photos() -> list[Image.Image]:
    return [render(make_scene(5, i), size=240).resize(size) for i, size in enumerate(((160, 120), (90, 200), (50, 50)))]


def _expected(run: Path, images: list[Image.Image]) -> np.ndarray:
    """The student in PyTorch, on images that Pillow has resized."""
    import torch

    student, trunk = load_trunk(run)
    pixels = np.stack([preprocess(image, student.preprocessing) for image in images])
    return embed(trunk, torch.from_numpy(pixels)).numpy()


def test_a_port_gives_the_frame_as_it_is(camera: tuple[Path, Bundle], run_with_margin: Path) -> None:
    import onnxruntime

    folder, bundle = camera
    assert bundle.inputs[0].shape == (None, None, None, 3) and bundle.inputs[0].dtype == "uint8"
    assert load_bundle(folder) == bundle and bundle.in_model is not None and bundle.in_model.resize
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = [session.run(None, {"pixels": np.asarray(image)[None, ..., ::-1].copy()})[0] for image in _photos()]
    expected = _expected(run_with_margin, _photos())
    assert cosine(np.concatenate(found), expected).min() > 0.9995
    told = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert (
        told["robx.input"] == "BGR pixels 0..255, uint8, NHWC, any size"
        and json.loads(told["robx.preprocessing"]) == {}
    )


def test_robx_run_gives_the_whole_image_and_an_evaluation_the_resized_one(
    camera: tuple[Path, Bundle], run_with_margin: Path
) -> None:
    folder, bundle = camera
    expected = _expected(run_with_margin, _photos())
    with open_session(folder) as session:
        named = [(str(i), lambda image=image: image) for i, image in enumerate(_photos())]
        found = np.stack([row for _, row in infer(session, named)])
        pixels = np.stack([preprocess(image, bundle.preprocessing) for image in _photos()])
        batch = session.run(pixels)
    assert cosine(found, expected).min() > 0.9995 and cosine(batch, expected).min() > 0.9995


def test_the_golden_sample_is_the_picture_itself(camera: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, _ = camera
    picture = np.asarray(Image.open(folder / "golden" / "image.png"))
    np.testing.assert_array_equal(np.load(folder / "golden" / "input.npy")[0], picture[..., ::-1])
    assert check(folder, folder / "golden" / "output.npy").passes
    np.save(tmp_path / "rgb.npy", picture[None])
    found = check(folder, tmp_path / "rgb.npy")
    assert found.explained_by is not None and found.explained_by.name == "channels"
    text = (folder / "README.md").read_text()
    assert "BGR" in text and "The model itself does the rest" in text and "cv2.resize" not in text


@pytest.mark.parametrize("fmt", ["openvino", "ort"])
def test_other_formats_take_frames_too(fmt: str, run_with_margin: Path, tmp_path: Path) -> None:
    target = dataclasses.replace(CAMERA, format=fmt, input_layout="NCHW")  # type: ignore[arg-type]
    bundle = export(ExportSettings(run=run_with_margin, target=target, out=tmp_path / "b"))
    assert any("any size" in line and "levels of Pillow" in line for line in bundle.rewrites)
    with open_session(tmp_path / "b") as session:
        named = [(str(i), lambda image=image: image) for i, image in enumerate(_photos())]
        found = np.stack([row for _, row in infer(session, named)])
    assert cosine(found, _expected(run_with_margin, _photos())).min() > 0.9995


def test_int8_is_judged_behind_the_resize_and_ships_with_it(
    run_with_margin: Path, scenes: Path, tmp_path: Path
) -> None:
    target = dataclasses.replace(CAMERA, precision="int8")
    lenient = {"limits": Limits(max_drop=60, min_speedup=0.01), "calibration_images": 32, "candidates": 1}
    settings = ExportSettings(run=run_with_margin, target=target, data=scenes, out=tmp_path / "b", **lenient)  # type: ignore[arg-type]
    bundle = export(settings)
    assert bundle.precision == "int8" and bundle.in_model is not None and bundle.in_model.resize
    operators = {node.op_type for node in onnx.load(tmp_path / "b" / "model.onnx").graph.node}
    assert {"QuantizeLinear", "Resize"} <= operators


def test_it_is_benched_against_the_student_on_images_that_it_only_crops(
    camera: tuple[Path, Bundle], run_with_margin: Path, tmp_path: Path
) -> None:
    from robx.runtime.bench.record import untimed_parts
    from robx.runtime.bench.reference import find_reference

    _, bundle = camera
    images = np.stack([preprocess(image, bundle.preprocessing) for image in _photos()])
    reference = find_reference(run_with_margin / "bundle", bundle, images, {})
    assert reference is not None and reference.name == "the fp32 student in torch"
    np.testing.assert_allclose(reference.outputs, _expected(run_with_margin, _photos()), atol=1e-4)
    assert "72x72 px" in untimed_parts(bundle)["resize"]
    assert untimed_parts(dataclasses.replace(bundle, in_model=None)) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onnx", "--resize-in-graph"], "--resize-in-graph is for uint8 pixels: add --uint8-input"),
        (["--format", "onnx", "--input-layout", "nhwc"], "--input-layout nhwc is for uint8 pixels"),
        (["--format", "trt", "--uint8-input", "--resize-in-graph"], "is supported for onnx, openvino, ort"),
        (
            ["--format", "litert", "--input-channels", "bgr"],
            "--input-channels bgr is supported for onnx, openvino, ort",
        ),
    ],
)
def test_what_a_format_cannot_do_is_refused_in_one_line(options: list[str], words: str, cnn_run: Path) -> None:
    found = CliRunner().invoke(main, ["export", str(cnn_run), *options])
    assert found.exit_code == 2 and len(found.stderr.splitlines()) == 1 and words in found.stderr


def test_unknown_axes_from_python_are_refused() -> None:
    with pytest.raises(InputError, match="'HWC'"):
        dataclasses.replace(CAMERA, input_layout="HWC")  # type: ignore[arg-type]


def test_a_resize_that_answers_otherwise_does_not_ship(
    run_with_margin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto, front: object, pre: Preprocessing) -> onnx.ModelProto:
        return real(model, front, dataclasses.replace(pre, size=200))  # type: ignore[arg-type]

    real = gate_front.add_front
    monkeypatch.setattr(gate_front, "add_front", wrong)
    with pytest.raises(ArtifactError, match="drop --resize-in-graph"):
        export(ExportSettings(run=run_with_margin, target=CAMERA, out=tmp_path / "b"))
    assert not (tmp_path / "b").exists()
