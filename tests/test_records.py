"""Records survive the disk, golden files of this schema stay readable, anything else is refused with a clear line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

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
        ({"preprocessing": 3}, "an object was expected"),
        ({"preprocessing": {"size": 1, "crop": 1, "mean": [1, 2]}}, "3 items were expected"),
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


def test_a_missing_file_is_named(bundle_folder: Path) -> None:
    (bundle_folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname"])
def test_a_file_outside_the_bundle_is_refused(bundle_folder: Path, path: str) -> None:
    bundle = load_bundle(bundle_folder)
    escaped = BundleFile(path=path, role="weights", bytes=1, sha256="0" * 64)
    save_bundle(dataclasses.replace(bundle, files=(*bundle.files, escaped)), bundle_folder)
    with pytest.raises(ArtifactError, match="outside of itself"):
        load_bundle(bundle_folder)


def test_a_link_in_the_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    model = bundle_folder / "model.onnx"
    shutil.move(model, tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="outside of itself"):
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
    with pytest.raises(ArtifactError, match=r"line 4 is no measurement"):
        load_measurements(path)


def test_nan_is_never_written(tmp_path: Path) -> None:
    accuracy = load_measurements(GOLDEN / "measurements-1.jsonl")[0]
    bad = dataclasses.replace(accuracy, values={"top1": Value(value=float("nan"))})
    with pytest.raises(ValueError, match="JSON compliant"):
        append_measurements(tmp_path / "m.jsonl", [bad])
    assert not (tmp_path / "m.jsonl").exists()
