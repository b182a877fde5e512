"""Exports as users give them: labels that differ, no engine here, pixels without images, a folder of another's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from robx.cli import main
from robx.embeddings import centred_cosine
from robx.errors import ArtifactError, InputError
from robx.export.build import ExportSettings, export
from robx.export.gate import judge, shipped, timing
from robx.export.gate.gate import Limits
from robx.export.image_splits import normalise
from robx.export.int8 import by_nncf, for_tensorrt
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import read_facts
from robx.export.int8.ladder import Machine, ladder
from robx.export.make import CandidateBuilder
from robx.export.onnx_run import run_model
from robx.export.parity import MIN_COSINE
from robx.export.request import ExportTarget
from robx.images.decode import renormalise, resize_and_crop
from robx.images.sources import open_source
from robx.records import Bundle, Normalisation, Preprocessing, load_bundle, load_student
from robx.runtime.bench.ab import compare
from robx.runtime.bench.profiles import PROFILES, BenchSettings
from robx.runtime.bench.reference import find_reference
from robx.runtime.session import open_session
from robx.store.files import read_json
from tests.quantized_onnx import quantized_nodes

LENIENT: dict[str, Any] = {
    "limits": Limits(max_drop=60, min_speedup=0.01), "calibration_images": 32, "candidates": 1,
}  # fmt: skip


def _export(run: Path, data: Path | None, out: Path, options: dict[str, Any] | None = None, **target: object) -> Bundle:
    wanted = ExportTarget(**target)  # type: ignore[arg-type]
    return export(
        ExportSettings(run=run, target=wanted, data=data, out=out, **(LENIENT if options is None else options))
    )


@pytest.mark.parametrize("name", ["nncf, SmoothQuant 0.5", "nncf, no SmoothQuant"])
def test_nncf_gives_tensorrt_a_vit_without_zero_points(
    name: str, vit_onnx: onnx.ModelProto, scene_pixels: np.ndarray
) -> None:
    rungs = {rung.name: rung for rung in ladder("trt", read_facts(vit_onnx), Machine())}
    quantised = for_tensorrt.from_uint8(by_nncf.quantize_onnx(vit_onnx, scene_pixels[:16], rungs[name]))
    assert quantized_nodes(quantised)  # and from_uint8 has checked TensorRT's rules
    assert centred_cosine(run_model(vit_onnx, scene_pixels), run_model(quantised, scene_pixels)).mean() > 0.9


def test_a_manifest_of_others_makes_no_bundle(cnn_run: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "js").mkdir(parents=True)
    (site / "manifest.json").write_text('{"name": "my web app"}')
    (site / "js" / "app.js").write_text("hi")
    with pytest.raises(InputError, match="is not a bundle"):
        _export(cnn_run, None, site, format="onnx")
    assert (site / "js" / "app.js").read_text() == "hi"
    _export(cnn_run, None, tmp_path / "b", format="onnx")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])  # damaged: exporting again is what mends it
    assert _export(cnn_run, None, tmp_path / "b", format="onnx").precision == "fp32"


def test_classes_meet_by_name_where_the_judging_images_lack_one(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (scenes / "test").iterdir())
    whole = _export(cnn_run, scenes, tmp_path / "whole", format="onnx", precision="fp16").rungs[0].values
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    lost = len(list((data / "test" / names[0]).iterdir()))  # the first: all numbers after it move
    shutil.rmtree(data / "test" / names[0])
    values = _export(cnn_run, data, tmp_path / "part", format="onnx", precision="fp16").rungs[0].values
    assert whole["probe_drop"].n is not None and values["probe_drop"].n == whole["probe_drop"].n - lost
    assert values["probe_drop"].value == pytest.approx(0, abs=2)
    for path in list((data / "test").iterdir()):
        path.rename(path.with_name(f"other {path.name}"))
    assert (
        "probe_drop" not in _export(cnn_run, data, tmp_path / "none", format="onnx", precision="fp16").rungs[0].values
    )


def test_what_no_engine_here_can_judge_ships_as_such(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Core ML off macOS."""
    for module in (judge, timing, shipped):
        monkeypatch.setattr(module, "open_candidate", lambda *_, **__: "robx has no engine for it")
    half = _export(cnn_run, scenes, tmp_path / "half", format="openvino", precision="fp16")
    assert (half.precision, half.verdict) == ("fp16", "NOT_JUDGED") and "not run here: robx has no" in half.reason
    refused = _export(cnn_run, scenes, tmp_path / "refused", format="openvino", precision="int8")
    assert (refused.precision, refused.requested, refused.verdict) == ("fp32", "int8", "NOT_JUDGED")
    forcing = LENIENT | {"force": True}
    forced = _export(cnn_run, scenes, tmp_path / "forced", forcing, format="openvino", precision="int8")
    assert (forced.precision, forced.verdict) == ("int8", "NOT_JUDGED") and "forced, and not run here" in forced.reason


def test_pixels_without_images_are_the_same_for_both(cnn_run: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, None, tmp_path / "b", format="onnx", uint8_input=True)
    assert bundle.inputs[0].dtype == "uint8" and bundle.parity["max_abs"].value < 1e-3


def test_fp16_is_judged_by_the_gate_alone(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIN_COSINE, "fp16", 1.1)  # no model reaches it
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", precision="fp16")
    assert bundle.precision == "fp16" and bundle.rungs[0].accuracy == "PASS" and "cosine_min" in bundle.parity


def test_fp16_ships_for_its_size_unless_it_is_to_be_faster(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    for speed, precision in ((1.0, "fp16"), (1000.0, "fp32")):
        options = LENIENT | {"limits": Limits(max_drop=60, min_speedup=speed)}
        bundle = _export(cnn_run, scenes, tmp_path / precision, options, format="onnx", precision="fp16")
        assert bundle.precision == precision


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--test", "nowhere"], "give --data too"),
        (["--batch", "²"], "must be a positive number or dynamic"),
        (["--format", "trt", "--int8", "--opset", "18"], "needs opset 19 or later"),
        (["--format", "litert", "--opset", "19"], "--opset is for formats made from ONNX (onnx, openvino, trt, ort)"),
        (["--rungs", "3"], "--rungs is for the int8 search: add --int8, or leave it out"),
        (["--fp16", "--data", ".", "--budget", "9"], "--budget is for the int8 search: add --int8"),
        (["--rungs", "3", "--budget", "9"], "--rungs, --budget are for the int8 search: add --int8, or leave them out"),
        (
            ["--data", ".", "--sensitivity"],
            "--sensitivity is for the layers of an int8 export: add --int8, or",
        ),
        (["--data", ".", "--fp16", "--sensitivity"], "--sensitivity is for the layers of an int8 export: add --int8"),
        (["--data", ".", "--labels", "l.csv"], "--labels is for int8 and fp16: add --int8 or --fp16, or leave it out"),
        (["--max-drop", "2"], "--max-drop is for the gate, which judges int8 and fp16: add --int8 or --fp16"),
        (["--min-speedup", "2", "--force"], "--min-speedup, --force are for the gate"),
        (["--data", ".", "--calibration-images", "32"], "--calibration-images is for int8 and fp16: add"),
        (["--data", ".", "--judging-images", "32"], "--judging-images is for int8 and fp16: add"),
    ],
)
def test_what_would_be_ignored_is_refused(more: list[str], said: str, cnn_run: Path) -> None:
    chosen = more if "--format" in more else ["--format", "onnx", *more]
    done = CliRunner().invoke(main, ["export", str(cnn_run), *chosen])
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_what_an_export_uses_is_not_refused() -> None:
    settings = {"student": "r", "format": "onnx", "data": "d"}
    ExportSettings.of(**settings, fp16=True, calibration_images=32, judging_images=64, max_drop=2.0, force=True)
    ExportSettings.of(**settings, int8=True, candidates=1, budget=9.0, min_speedup=2.0, heal=1.0, sensitivity=True)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_cannot_be_built_falls_back_although_forced(
    precision: str, cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CandidateBuilder.make

    def failing(self: CandidateBuilder, candidate: Candidate) -> Path:
        if candidate.precision != "fp32":
            raise ArtifactError("no such operator")
        return real(self, candidate)

    monkeypatch.setattr(CandidateBuilder, "make", failing)
    forcing = LENIENT | {"force": True}
    bundle = _export(cnn_run, scenes, tmp_path / "b", forcing, format="openvino", precision=precision)
    assert (bundle.precision, bundle.requested) == ("fp32", precision)
    assert "no such operator" in bundle.rungs[0].reason


def _follow(model: Path, image: Image.Image, pre: Preprocessing, dtype: Any) -> np.ndarray:
    """What a user computes who knows the manifest and ONNX Runtime alone."""
    import onnxruntime

    pixels = np.asarray(resize_and_crop(image, pre), np.float64).transpose(2, 0, 1) / 255
    steps = (np.asarray(values, np.float64).reshape(3, 1, 1) for values in (pre.mean, pre.std))
    mean, std = steps
    values = (pixels - mean) / std
    values = np.rint(values) if dtype == np.uint8 else values
    found: np.ndarray = onnxruntime.InferenceSession(model).run(["embedding"], {"pixels": values[None].astype(dtype)})[
        0
    ]
    return found


def test_who_follows_the_manifest_of_a_uint8_bundle_normalises_once(
    cnn_run: Path, scenes: Path, tmp_path: Path
) -> None:
    """The mean and std are inside of the model, and so no step of the host."""
    image = open_source(scenes).read(0)
    plain = _export(cnn_run, None, tmp_path / "f", format="onnx")
    bundle = _export(cnn_run, None, tmp_path / "u", format="onnx", uint8_input=True)
    assert plain.in_model is None and plain.preprocessing == load_student(cnn_run).preprocessing
    assert bundle.in_model == Normalisation(mean=plain.preprocessing.mean, std=plain.preprocessing.std)
    assert bundle.preprocessing.mean == (0, 0, 0) and bundle.preprocessing.std == (1 / 255,) * 3
    manifest = read_json(tmp_path / "u" / "manifest.json")
    assert manifest["in_model"]["mean"] == list(plain.preprocessing.mean)
    assert manifest["in_model"]["std"] == list(plain.preprocessing.std)
    expected = _follow(tmp_path / "f" / "model.onnx", image, plain.preprocessing, np.float32)
    found = _follow(tmp_path / "u" / "model.onnx", image, bundle.preprocessing, np.uint8)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    for folder, steps in ((tmp_path / "f", {"size", "crop", "interpolation", "mean", "std"}),
                          (tmp_path / "u", {"size", "crop", "interpolation"})):  # fmt: skip
        model = onnx.load(folder / "model.onnx")
        told = {entry.key: entry.value for entry in model.metadata_props}
        assert set(json.loads(told["robx.preprocessing"])) == steps
        assert ("robx.in_model" in told) == (folder.name == "u")
        assert ("uint8" in told["robx.input"]) == (folder.name == "u")


def test_a_uint8_bundle_is_benched_against_the_student_and_beside_a_float_one(
    cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "rapid", dataclasses.replace(PROFILES["rapid"], queries=16, seconds=0.3))
    run = tmp_path / "run"
    shutil.copytree(cnn_run, run)
    folders = []
    for uint8 in (False, True):
        folder = run / f"onnx-{uint8}"
        _export(run, None, folder, format="onnx", uint8_input=uint8)
        folders.append(folder)
    pixels = normalise(
        np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), np.uint8), load_student(run).preprocessing
    )
    with open_session(folders[0]) as first, open_session(folders[1]) as second:
        own = renormalise(pixels, first.bundle.preprocessing, second.bundle.preprocessing)
        np.testing.assert_allclose(own.round(), own, atol=1e-3)  # the pixels 0..255
        expected = first.run(pixels)
        np.testing.assert_allclose(second.run(own), expected, atol=1e-4 * np.abs(expected).max())
        reference = find_reference(folders[1], second.bundle, own, {})
        assert reference is not None and "torch" in reference.name
        np.testing.assert_allclose(reference.outputs, expected, atol=1e-4 * np.abs(expected).max())
    (compared,) = compare(BenchSettings(bundles=folders, profile="rapid"))
    assert not [reason for reason in compared.reasons if "output_mismatch" in reason]


def test_a_bundle_given_for_a_run_is_named_with_its_run(cnn_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(cnn_run, run)
    _export(run, None, run / "onnx-fp32", format="onnx")
    done = CliRunner().invoke(main, ["export", str(run / "onnx-fp32"), "--format", "onnx"])
    assert done.exit_code == 2 and "is a bundle (onnx fp32), which is exported already" in done.output
    assert f"export its run instead: {run}" in " ".join(done.output.split())
    _export(run, None, tmp_path / "elsewhere", format="onnx")
    with pytest.raises(InputError, match="give the run of the test_resnet that it was exported from"):
        _export(tmp_path / "elsewhere", None, tmp_path / "x", format="onnx")


def test_exporting_again_replaces_the_bundles_files_and_keeps_all_others(cnn_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    _export(cnn_run, None, out, format="openvino")
    (out / "measurements.jsonl").write_text("{}\n")
    (out / "notes").mkdir()
    (out / "notes" / "photo.jpg").write_bytes(b"mine")
    _export(cnn_run, None, out, format="onnx")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.parent.name != "golden"}
    assert names - {"README.md"} == {"manifest.json", "model.onnx", "measurements.jsonl", "notes/photo.jpg"}
    assert (out / "notes" / "photo.jpg").read_bytes() == b"mine"
    (out / "model.xml").write_text("mine")  # a name of the next bundle, and not robx's file
    with pytest.raises(InputError, match=r"model\.xml was not written by robx"):
        _export(cnn_run, None, out, format="openvino")
    assert (out / "model.xml").read_text() == "mine" and load_bundle(out).format == "onnx"


def test_a_folder_with_the_words_of_a_manifest_is_not_a_bundle(cnn_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    words = {"precision": 1, "format": "onnx", "requested": 2, "verdict": 3}
    (out / "manifest.json").write_text(json.dumps(words, indent=2))
    (out / "model.onnx").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not a bundle: choose another folder"):
        _export(cnn_run, None, out, format="onnx")
    assert (out / "model.onnx").read_bytes() == b"mine"
