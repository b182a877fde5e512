"""The README of a bundle: its code runs as it stands, without robx and PyTorch, and its words fit the manifest."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from robx.cli import main
from robx.errors import InputError
from robx.export.build import ExportSettings, export
from robx.export.readme.write_readme import preprocessing_steps, readme
from robx.export.request import ExportTarget
from robx.formats import FORMATS
from robx.golden.sample import read_sample
from robx.records import Bundle, BundleFile, Calibration, DataInfo, Preprocessing, TeacherInfo, load_bundle
from robx.runtime.check import check
from tests.odd_pictures import odd_pictures, pictures_without_white

HEADERS = Path(__file__).parent / "include"
EXECUTORCH = tuple(f"org.pytorch.executorch.{name}" for name in ("EValue", "Module", "Tensor"))
# Import of any of these fails, as on a machine that has the runtime alone.
ABSENT = ("robx", "torch", "torchvision", "timm", "onnx")


@pytest.fixture(scope="module")
def bundles(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle of each runtime on this machine, float and uint8, of a fixed and of any batch size."""
    root = tmp_path_factory.mktemp("readme")
    targets = {
        "onnx": ExportTarget(format="onnx"),
        "openvino": ExportTarget(format="openvino", uint8_input=True, batch=2),
    }
    for name, target in targets.items():
        export(ExportSettings(run=cnn_run, target=target, out=root / name))
    return {name: root / name for name in targets}


def _blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_python_code_runs_in_the_bundle_with_the_runtime_alone(name: str, bundles: dict[str, Path]) -> None:
    folder = bundles[name]
    (code,) = _blocks(folder, "python")
    blocked = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); exec(sys.stdin.read())"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked], input=code, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    output = np.load(folder / "my_output.npy")
    np.testing.assert_allclose(output, np.load(folder / "golden" / "output.npy"), rtol=1e-5, atol=1e-5)
    assert check(folder, folder / "my_output.npy").passes


def test_the_python_code_gives_what_robx_run_gives_for_odd_images(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code as printed, on images that are not plain RGB, in place of the golden one."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["onnx"], folder)
    (code,) = _blocks(folder, "python")
    program = compile(code, "README.md", "exec")
    monkeypatch.chdir(folder)
    names = {}
    for number, (what, data) in enumerate(odd_pictures()):
        (tmp_path / f"{number}.png").write_bytes(data)
        names[str(tmp_path / f"{number}.png")] = what
    done = CliRunner().invoke(main, ["run", str(bundles["onnx"]), *names])
    expected = {line["image"]: line["embedding"] for line in map(json.loads, done.stdout.splitlines())}
    assert expected.keys() == names.keys(), done.stderr
    for path, what in names.items():
        shutil.copy(path, "golden/image.png")
        exec(program, {})
        np.testing.assert_allclose(np.load("my_output.npy")[0], expected[path], rtol=1e-4, atol=1e-5, err_msg=what)
    for _, data in pictures_without_white():
        Path("golden/image.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"pixels from .* scale them to 0..1"):
            exec(program, {})


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_cpp_code_compiles_and_runs_against_the_python_packages_library(
    name: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (Debian: g++)")
    folder, library = bundles[name], _library(name, tmp_path)
    include = _openvino() / "include" if name == "openvino" else Path(os.environ.get("ORT_INCLUDE") or HEADERS)
    (code,) = _blocks(folder, "cpp")
    (tmp_path / "run.cpp").write_text(code)
    program = tmp_path / "run"
    command = ["g++", "-std=c++17", "-O0", "-Wall", str(tmp_path / "run.cpp"), "-I", str(include), str(library)]
    command += [f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run([str(program)], cwd=folder, check=True, env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"})
    output = np.fromfile(folder / "my_output.bin", dtype="<f4")
    np.testing.assert_allclose(output[None], np.load(folder / "golden" / "output.npy"), rtol=1e-5, atol=1e-5)
    assert check(folder, folder / "my_output.bin").passes


def _openvino() -> Path:
    import openvino

    return Path(openvino.__file__).parent


def _library(name: str, scratch: Path) -> Path:
    """The runtime's shared library in its Python package, under the name that programs look for."""
    import onnxruntime

    if name == "openvino":
        found = next((_openvino() / "libs").glob("libopenvino.so*"), None)
    else:
        found = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
        if found is not None:
            (scratch / "libonnxruntime.so.1").symlink_to(found)
            found = scratch / "libonnxruntime.so.1"
    if found is None:
        pytest.skip(f"the Python package of {name} has no shared library on this system")
    return found


def test_the_manifest_lists_the_readme_and_a_users_own_is_not_replaced(
    bundles: dict[str, Path], cnn_run: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(bundles["onnx"])
    assert [file.path for file in bundle.files if file.role == "readme"] == ["README.md"]
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "bundle-1", old)
    (old / "README.md").write_text("my notes")
    with pytest.raises(InputError, match=r"README\.md was not written by robx"):
        export(ExportSettings(run=cnn_run, target=ExportTarget(format="onnx"), out=old))
    assert (old / "README.md").read_text() == "my notes"


def _readmes(format_: str, folder: Path) -> Iterator[str]:
    """The README of a bundle in every runtime and precision of a format; `folder` is one in ONNX."""
    base = load_bundle(folder)
    sample = read_sample(folder, base)
    files = tuple(
        BundleFile(path=f"model.{role}", role=role, bytes=1, sha256="0" * 64)  # type: ignore[arg-type]
        for role in ("model", "weights")
    )
    for runtime in FORMATS[format_].runtimes:  # type: ignore[index]
        for precision in FORMATS[format_].precisions:  # type: ignore[index]
            bundle = dataclasses.replace(
                base, format=format_, runtime=runtime, files=files, precision=precision  # type: ignore[arg-type]
            )  # fmt: skip
            yield readme(bundle, sample)


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_has_code_for_its_runtimes_and_mobile_ones_for_a_phone(
    format_: str, bundles: dict[str, Path]
) -> None:
    for text in _readmes(format_, bundles["onnx"]):
        languages = set(re.findall(r"^```(\w+)$", text, re.MULTILINE))
        assert "python" in languages and ("cpp" in languages or format_ == "coreml")
        if format_ in ("ort", "litert", "executorch"):
            assert "kotlin" in languages
        assert ("swift" in languages) == (format_ == "coreml")
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            compile(code, format_, "exec")


@pytest.mark.skipif(shutil.which("kotlinc") is None, reason="no Kotlin compiler (Debian: kotlin)")
def test_the_kotlin_code_compiles_against_the_libraries_declarations(bundles: dict[str, Path], tmp_path: Path) -> None:
    """As far as kotlin/ declares them after their documentation: there is no Android here."""
    packages = ("java.io.File", "java.nio.*", "ai.onnxruntime.*")
    for format_, others in (("ort", packages), ("litert", ("org.tensorflow.lite.*",)), ("executorch", EXECUTORCH)):
        imports = "".join(f"import {name}\n" for name in dict.fromkeys((*packages[:2], *others)))
        codes = [
            code
            for text in _readmes(format_, bundles["onnx"])
            for code in re.findall(r"^```kotlin\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        ]
        assert codes
        functions = "".join(f"fun {format_}{number}(folder: File) {{\n{code}}}\n" for number, code in enumerate(codes))
        (tmp_path / f"{format_}.kt").write_text(imports + functions)
    sources = [*tmp_path.glob("*.kt"), *(Path(__file__).parent / "kotlin").glob("*.kt")]
    done = subprocess.run(["kotlinc", *sources, "-d", tmp_path / "classes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_licence_chain_and_the_verdict_are_told_and_foreign_text_stays_text(bundles: dict[str, Path]) -> None:
    base = load_bundle(bundles["onnx"])
    student = dataclasses.replace(
        base.student,
        teacher=TeacherInfo(name="dino_vits16", sha256="0" * 64, licence="CC-BY-NC 4.0"),
        data=DataInfo(name="<b>|x`\n# y", images=3, fingerprint="f"),
    )
    bundle: Bundle = dataclasses.replace(base, student=student, verdict="FORCED", reason="loses | 3 points")
    text = readme(bundle, read_sample(bundles["onnx"], base))
    assert "| Teacher | dino\\_vits16 | CC-BY-NC 4.0 |" in text
    assert "| Training images | \\<b\\>\\|x\\` \\# y | unknown |" in text
    assert "**FORCED**: loses \\| 3 points" in text


def test_the_verdict_claims_no_images_that_the_export_did_not_have(bundles: dict[str, Path]) -> None:
    bundle = load_bundle(bundles["onnx"])
    sample, seen = read_sample(bundles["onnx"], bundle), Calibration(
        images=300, fingerprint="c", judged_images=2000, judged_fingerprint="j"
    )  # fmt: skip
    told = {
        "The export was given no images": {"calibration": None},
        "The accuracy of an fp32 model is not judged": {"calibration": seen, "requested": "int8"},
        "This model was not judged": {"calibration": seen, "precision": "fp16", "verdict": "NOT_JUDGED"},
        "with the float32 student on 2000 images that calibration": {
            "calibration": seen, "precision": "int8", "verdict": "PASS",
        },
    }  # fmt: skip
    for words, changed in told.items():
        page = readme(dataclasses.replace(bundle, **changed), sample)
        assert [other for other in told if other in page] == [words]
        assert "neither training nor calibration" not in page


def test_the_steps_name_every_number_in_its_place(bundles: dict[str, Path]) -> None:
    pre = Preprocessing(size=256, crop=224, interpolation="bicubic")
    base = load_bundle(bundles["onnx"])
    bundle = dataclasses.replace(base, preprocessing=pre, student=dataclasses.replace(base.student, preprocessing=pre))
    host, inside = preprocessing_steps(bundle)
    words = " ".join(host)
    order = ["RGB", "side becomes 256", "antialiased bicubic", "224 x 224", "Divide by 255", "0.485, 0.456", "NCHW"]
    places = [words.index(part) for part in order]
    assert places == sorted(places) and not inside
    host, inside = preprocessing_steps(load_bundle(bundles["openvino"]))
    assert "uint8" in host[-1] and [step.split()[0] for step in inside] == ["Divide", "Subtract"]
