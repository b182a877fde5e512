"""What an exported bundle says of itself: its golden sample, checked by a port that knows ONNX Runtime alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from robx.cli import main
from robx.export.build import ExportSettings, export
from robx.export.gate import golden
from robx.export.request import ExportTarget
from robx.records import Bundle, Preprocessing, load_bundle

Answer = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def exported(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """An fp32 ONNX bundle with a margin around its crop."""
    folder = tmp_path_factory.mktemp("golden") / "onnx"
    return folder, export(ExportSettings(run=cnn_run, target=ExportTarget(format="onnx"), out=folder))


def _port(folder: Path) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def answer(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {"pixels": values.astype(np.float32)[None]})[0]
        return found

    return answer


def _check(folder: Path, array: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["check", str(folder), str(array), *options])


def _resized(folder: Path, pre: Preprocessing) -> np.ndarray:
    """The golden image, written from the words of the manifest for a square model without a margin; (H, W, 3)."""
    image = Image.open(folder / "golden" / "image.png")
    scale = pre.size / min(image.size)
    image = image.resize((int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)), Image.Resampling.BICUBIC)
    left, top = round((image.width - pre.crop) / 2), round((image.height - pre.crop) / 2)
    return np.asarray(image.crop((left, top, left + pre.crop, top + pre.crop)), dtype=np.float64)


def test_a_correct_port_passes_and_common_mistakes_are_named(exported: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = exported
    assert load_bundle(folder) == bundle
    answer, pixels, pre = _port(folder), _resized(folder, bundle.preprocessing), bundle.preprocessing
    values = ((pixels / 255 - pre.mean) / pre.std).transpose(2, 0, 1)
    cases = {
        "matches the golden sample": values,
        "red and blue are swapped": ((pixels[..., ::-1] / 255 - pre.mean) / pre.std).transpose(2, 0, 1),
        "normalised without being divided by 255": ((pixels - pre.mean) / pre.std).transpose(2, 0, 1),
        "normalised twice": ((values.transpose(1, 2, 0) - pre.mean) / pre.std).transpose(2, 0, 1),
        "tensor is NHWC": values.transpose(1, 2, 0).reshape(3, pre.crop, pre.crop),
        "upside down": values[:, ::-1],
    }
    for number, (said, wrong) in enumerate(cases.items()):
        np.save(tmp_path / f"{number}.npy", answer(wrong))
        found = _check(folder, tmp_path / f"{number}.npy")
        assert found.exit_code == (0 if number == 0 else 3), found.output
        assert said in (found.output if number == 0 else found.stderr.splitlines()[-1])


def test_every_command_refuses_a_bundle_whose_preprocessing_was_edited(
    exported: tuple[Path, Bundle], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "edited")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["preprocessing"]["mean"][0] += 0.4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    image, output = str(folder / "golden" / "image.png"), str(folder / "golden" / "output.npy")
    for command in (
        ("run", str(folder), image, "--out", str(tmp_path / "x.npz")),
        ("check", str(folder), output),
        ("bench", str(folder), "--profile", "rapid"),
    ):
        found = CliRunner().invoke(main, [*command])
        assert found.exit_code == 2, found.output
        assert "manifest.json was changed: its preprocessing does not turn golden/image.png into" in found.stderr


def test_raw_floats_text_and_json_serve_as_well(exported: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, _ = exported
    output = np.load(folder / "golden" / "output.npy")
    (tmp_path / "a.bin").write_bytes(output.astype("<f4").tobytes())
    (tmp_path / "a.txt").write_text(", ".join(map(str, output.ravel())))
    assert _check(folder, tmp_path / "a.bin").exit_code == _check(folder, tmp_path / "a.txt").exit_code == 0
    told = json.loads(_check(folder, tmp_path / "a.bin", "--json").stdout)
    assert told["passes"] and told["what"] == "embedding" and told["fits"][0]["mistake"] is None
    assert _check(folder, folder / "golden" / "input.npy").exit_code == 0


@pytest.mark.parametrize("content", [b"", b"123", b"no numbers"])
def test_a_file_that_is_no_array_is_refused_in_one_line(
    content: bytes, exported: tuple[Path, Bundle], tmp_path: Path
) -> None:
    for suffix in (".npy", ".bin", ".txt", ".png"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        found = _check(exported[0], path)
        assert found.exit_code == 2 and len(found.stderr.splitlines()) == 1 and str(path) in found.stderr


def test_where_the_runtime_is_missing_something_else_answers_and_is_named(
    cnn_run: Path, tmp_path: Path, exported: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.load(exported[0] / "golden" / "output.npy")
    monkeypatch.setattr(golden, "open_candidate", lambda _: "no such device")
    export(ExportSettings(run=cnn_run, target=ExportTarget(format="trt"), out=tmp_path / "t"))
    export(ExportSettings(run=cnn_run, target=ExportTarget(format="openvino"), out=tmp_path / "o"))
    for name, stand_in in (("t", "ONNX graph"), ("o", "PyTorch")):
        record = json.loads((tmp_path / name / "golden" / "golden.json").read_text())
        assert stand_in in record["answered_by"]
        found = np.load(tmp_path / name / "golden" / "output.npy")
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_documentation_counts_neither_as_size_nor_as_identity(exported: tuple[Path, Bundle]) -> None:
    _, bundle = exported
    documented = [file for file in bundle.files if file.is_documentation]
    assert {file.path for file in documented} >= {"golden/image.png", "golden/input.npy", "golden/output.npy"}
    bare = dataclasses.replace(bundle, files=bundle.deployed)
    assert (bare.id, bare.bytes) == (bundle.id, bundle.bytes) and len(bare.files) < len(bundle.files)
