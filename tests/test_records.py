"""Records survive the disk, golden files of this schema stay readable, anything else is refused with a clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robx.errors import ArtifactError
from robx.records import (
    Accuracy,
    Bundle,
    BundleFile,
    Fidelity,
    Latency,
    Preprocessing,
    Student,
    Value,
    append_measurements,
    describe_file,
    from_json,
    load_bundle,
    load_measurements,
    load_student,
    save_bundle,
    to_json,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "bundle-1", tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_golden_student_of_schema_1_is_read() -> None:
    student = load_student(GOLDEN / "student-1")
    assert (student.timm_name, student.width, student.schema) == ("test_resnet", 96, 1)
    assert student.preprocessing.mean == (0.485, 0.456, 0.406)
    assert student.teacher is not None and student.teacher.licence == "Apache-2.0"


def test_the_golden_bundle_of_schema_1_is_read() -> None:
    bundle = load_bundle(GOLDEN / "bundle-1")
    assert bundle.inputs[0].shape == (None, 3, 64, 64)
    assert [rung.kept for rung in bundle.rungs] == [False, True]
    assert bundle.model.path == "model.onnx"
    assert bundle.id == "4c88d4fad6795e3b"


def test_the_golden_measurements_of_schema_1_are_read() -> None:
    kinds = [type(m) for m in load_measurements(GOLDEN / "measurements-1.jsonl")]
    assert kinds == [Accuracy, Fidelity, Latency]


@given(
    size=st.integers(1, 4096),
    mean=st.tuples(*[st.floats(-10, 10)] * 3),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_a_record_survives_json(size: int, mean: tuple[float, float, float], interpolation: str) -> None:
    record = Preprocessing(size=size, crop=size, interpolation=interpolation, mean=mean)  # type: ignore[arg-type]
    assert from_json(Preprocessing, json.loads(json.dumps(to_json(record)))) == record


def test_a_newer_schema_is_refused_by_its_number() -> None:
    value = to_json(load_student(GOLDEN / "student-1")) | {"schema": 99, "something_new": 1}
    with pytest.raises(ArtifactError, match=r"schema 99.*upgrade robx"):
        from_json(Student, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"width": "wide"}, "'wide' is not of type int"),
        ({"width": True}, "True is not of type int"),
        ({"preprocessing": 3}, "expected an object"),
        ({"preprocessing": {"size": 1, "crop": 1, "mean": [1, 2]}}, "expected 3 items, got 2"),
        ({"preprocessing": {"size": 1, "crop": 1, "interpolation": "magic"}}, "'magic' is none of"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, object], message: str) -> None:
    value = to_json(load_student(GOLDEN / "student-1")) | change
    with pytest.raises(ArtifactError, match=message):
        from_json(Student, value)


def test_a_missing_key_is_named() -> None:
    value = to_json(load_student(GOLDEN / "student-1"))
    del value["sha256"]
    with pytest.raises(ArtifactError, match="'sha256' is missing"):
        from_json(Student, value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_any_other_json_is_refused_and_never_crashes(value: object) -> None:
    with pytest.raises(ArtifactError):
        from_json(Bundle, value)


def test_a_tampered_file_is_named(bundle_folder: Path) -> None:
    model = bundle_folder / "model.onnx"
    model.write_bytes(bytes([model.read_bytes()[0] ^ 1]) + model.read_bytes()[1:])
    with pytest.raises(ArtifactError, match=r"model\.onnx is not the file that was written"):
        load_bundle(bundle_folder)


def test_a_missing_file_or_folder_is_named(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"nosuch does not exist: give a folder that robx wrote"):
        load_bundle(tmp_path / "nosuch")
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname"])
def test_a_file_outside_the_bundle_is_refused(bundle_folder: Path, path: str) -> None:
    bundle = load_bundle(bundle_folder)
    escaped = BundleFile(path=path, role="weights", bytes=1, sha256="0" * 64)
    save_bundle(dataclasses.replace(bundle, files=(*bundle.files, escaped)), bundle_folder)
    with pytest.raises(ArtifactError, match="outside of it"):
        load_bundle(bundle_folder)


def test_a_link_in_the_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    model = bundle_folder / "model.onnx"
    shutil.move(model, tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="outside of it"):
        load_bundle(bundle_folder)


def test_the_bundle_id_changes_with_any_file(bundle_folder: Path) -> None:
    bundle = load_bundle(bundle_folder)
    changed = dataclasses.replace(bundle.files[0], sha256="0" * 64)
    assert dataclasses.replace(bundle, files=(changed, *bundle.files[1:])).id != bundle.id
    assert dataclasses.replace(bundle, files=bundle.files[::-1]).id == bundle.id


def test_measurements_are_appended_and_a_bad_line_has_its_number(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    known = load_measurements(GOLDEN / "measurements-1.jsonl")
    append_measurements(path, known[:1])
    append_measurements(path, known[1:])
    assert load_measurements(path) == known
    path.write_text(path.read_text() + '{"kind": "guess"}\n')
    with pytest.raises(ArtifactError, match=r"line 4 is not a measurement"):
        load_measurements(path)


def test_nan_is_never_written(tmp_path: Path) -> None:
    accuracy = load_measurements(GOLDEN / "measurements-1.jsonl")[0]
    bad = dataclasses.replace(accuracy, values={"top1": Value(value=float("nan"))})
    with pytest.raises(ValueError, match="JSON compliant"):
        append_measurements(tmp_path / "m.jsonl", [bad])
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "nan is not a finite number"),
        ({"value": 10**400}, "is not a finite number"),
        ({"value": 1.0, "unit": ["x"]}, "is not of type str"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_json(Value, change)


def test_a_wrong_value_is_not_repeated_at_length() -> None:
    with pytest.raises(ArtifactError) as error:
        from_json(Value, {"value": "x" * 1_000_000})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("change", [{"size": 0}, {"crop": -1}, {"size": 10**9}, {"std": (1.0, 0.0, 1.0)}])
def test_an_impossible_preprocessing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="preprocessing"):
        from_json(Preprocessing, to_json(Preprocessing(size=8, crop=8)) | to_json(change))


@given(data=st.data())
def test_any_change_to_a_manifest_is_read_or_refused(data: st.DataObject) -> None:
    """One value of a real manifest becomes anything: a record comes out, or one ArtifactError, never a crash."""
    manifest = json.loads((GOLDEN / "bundle-1" / "manifest.json").read_text())
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
    at: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            at[key] = data.draw(junk)
            break
        at = at[key]
    with contextlib.suppress(ArtifactError):
        assert isinstance(from_json(Bundle, manifest), Bundle)


def test_a_wrong_size_is_refused_without_hashing(bundle_folder: Path) -> None:
    manifest = json.loads((bundle_folder / "manifest.json").read_text())
    manifest["files"][0]["bytes"] += 1
    (bundle_folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its size differs"):
        load_bundle(bundle_folder)


def test_a_link_to_a_folder_in_the_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_bytes(b"x")
    (bundle_folder / "package").symlink_to(tmp_path / "elsewhere")
    inside = describe_file(bundle_folder, "package/weights", "weights")
    save_bundle(dataclasses.replace(bundle, files=(*bundle.files, inside)), bundle_folder)
    with pytest.raises(ArtifactError, match="outside of it"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 400])
def test_an_invalid_file_name_is_refused(bundle_folder: Path, name: str) -> None:
    bundle = load_bundle(bundle_folder)
    odd = BundleFile(path=name, role="weights", bytes=1, sha256="0" * 64)
    save_bundle(dataclasses.replace(bundle, files=(*bundle.files, odd)), bundle_folder)
    with pytest.raises(ArtifactError, match=r"is missing|File name too long"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[" * 100_000, b'{"kind": ["latency"]}', b'{"kind": "latency"', b"null", b"\x00"]
)
def test_a_line_of_garbage_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m.jsonl").write_bytes((GOLDEN / "measurements-1.jsonl").read_bytes() + line + b"\n")
    with pytest.raises(ArtifactError, match="line 4"):
        load_measurements(tmp_path / "m.jsonl")


def test_two_writers_lose_no_measurement(tmp_path: Path) -> None:
    """Processes that append at the same time, as robx eval and robx bench do."""
    code = (
        "import pathlib, sys, robx.records as r\n"
        "known = r.load_measurements(pathlib.Path(sys.argv[1]))[:1]\n"
        "for _ in range(15): r.append_measurements(pathlib.Path(sys.argv[2]), known)"
    )
    path, golden = tmp_path / "m.jsonl", GOLDEN / "measurements-1.jsonl"
    command = [sys.executable, "-c", code, str(golden), str(path)]
    writers = [subprocess.Popen(command) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(load_measurements(path)) == 45
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    known = load_measurements(GOLDEN / "measurements-1.jsonl")
    path.write_bytes((GOLDEN / "measurements-1.jsonl").read_bytes().rstrip(b"\n"))
    append_measurements(path, known[:1])
    assert load_measurements(path) == [*known, known[0]]
