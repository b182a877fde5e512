"""Bundles and students on the command line: tampered with, collapsed, or used by several processes at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto

from robx.records import (
    Preprocessing,
    Student,
    describe_file,
    load_bundle,
    load_measurements,
    to_json,
)
from robx.trunk import build_trunk, save_trunk


def make_student(folder: Path, *, collapsed: bool = False) -> Path:
    torch.manual_seed(3)
    trunk = build_trunk("test_resnet").eval()
    if collapsed:
        for parameter in trunk.parameters():
            parameter.data.zero_()
    folder.mkdir(parents=True)
    record = Student(
        timm_name="test_resnet", width=96, preprocessing=Preprocessing(size=32, crop=32), sha256="", teacher=None,
        data=None, recipe={},
    )  # fmt: skip
    save_trunk(folder, trunk, record)
    return folder


def no_strays(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if p.name.endswith((".tmp", ".old"))]


def one_line(said: tuple[int, str, str], *, status: int = 2) -> str:
    ended, out, errors = said
    assert ended == status, out + errors
    lines = [line for line in errors.splitlines() if line.startswith("robx: ")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shell: Any, scenes: Path) -> Path:
    """A student with a bundle that was judged and measured."""
    folder = make_student(tmp_path_factory.mktemp("bundles") / "run")
    for command in (
        ("export", folder, "--format", "onnx"),
        ("eval", folder / "onnx-fp32", "--data", scenes, "--knn", "--no-cache"),
        ("bench", folder / "onnx-fp32", "--profile", "rapid", "--processes", 1, "--retries", 0),
    ):
        status, out, errors = shell(folder, *command)
        assert status == 0, out + errors
    return folder


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def outside(folder: Path) -> None:
    """Every hash matches: whoever made this bundle wants to read a file outside it."""
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    edit(folder, lambda m: m.update(files=[to_json(describe_file(folder, "model.onnx", "model"))]))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip, "model.onnx is not the file that was written (its SHA-256 differs)"),
    "cut": (lambda f: (f / "model.onnx").write_bytes(b"x"), "(its size differs)"),
    "missing file": (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
    "another hash": (lambda f: edit(f, lambda m: m["files"][0].update(sha256="0" * 64)), "SHA-256 differs"),
    "another verdict": (lambda f: edit(f, lambda m: m.update(verdict="BEST")), "'BEST' is none of"),
    "newer schema": (
        lambda f: edit(f, lambda m: m.update(schema=9)),
        "has schema 9, but this version",
    ),
    "cut manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_bundle_is_refused_by_every_command(
    run: Path, shell: Any, scenes: Path, tmp_path: Path, how: str
) -> None:
    tamper, said = TAMPERED[how]
    bundle = tmp_path / "run" / "onnx-fp32"
    subprocess.run(["cp", "-r", run, tmp_path / "run"], check=True)
    before = (bundle / "measurements.jsonl").read_bytes()
    tamper(bundle)
    for command in (
        ("inspect", bundle),
        ("run", bundle, scenes / "test"),
        ("eval", bundle, "--data", scenes, "--no-cache"),
        ("bench", bundle, "--profile", "rapid", "--processes", 1, "--retries", 0),
    ):
        assert said in one_line(shell(tmp_path, *command)), command[0]
    assert (bundle / "measurements.jsonl").read_bytes() == before
    status, out, errors = shell(tmp_path, "report", tmp_path / "run", "-o", tmp_path / "report.html")
    assert status == 0, out + errors
    page = json.loads((tmp_path / "report.json").read_text())
    assert not [row for row in page["rows"] if row["format"] == "onnx"]
    assert said in (tmp_path / "report.md").read_text().replace("\\", "")


def test_a_bundle_with_outside_references_is_refused_although_its_hashes_match(
    run: Path, shell: Any, scenes: Path, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", run / "onnx-fp32", tmp_path / "bundle"], check=True)
    outside(tmp_path / "bundle")
    for command in (
        ("inspect", tmp_path / "bundle"),
        ("run", tmp_path / "bundle", scenes / "test"),
        ("eval", tmp_path / "bundle", "--data", scenes, "--no-cache"),
        ("bench", tmp_path / "bundle", "--profile", "rapid", "--processes", 1, "--retries", 0),
    ):
        assert "stored in '/etc/hostname', outside the file" in one_line(shell(tmp_path, *command)), command[0]


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_a_collapsed_student_is_refused(shell: Any, scenes: Path, tmp_path: Path, fmt: str) -> None:
    run = make_student(tmp_path / "run", collapsed=True)
    said = one_line(shell(tmp_path, "export", run, "--format", fmt, "--data", scenes))
    assert "has collapsed: its embedding is the same for all" in said
    assert not (run / f"{fmt}-fp32").exists() and no_strays(run)


def test_a_collapsed_student_gets_no_figures(shell: Any, scenes: Path, tmp_path: Path) -> None:
    run = make_student(tmp_path / "run", collapsed=True)
    said = one_line(shell(tmp_path, "eval", run, "--data", scenes, "--no-cache"))
    assert f"{run} has collapsed: its embedding is the same for all 64 images" in said
    assert not (run / "measurements.jsonl").exists()


def test_a_foreign_folder_is_never_replaced_by_a_bundle(shell: Any, tmp_path: Path) -> None:
    run = make_student(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"x")
    said = one_line(shell(tmp_path, "export", run, "--format", "onnx", "--out", tmp_path / "photos"))
    assert "is not empty and is not a bundle" in said
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.png"]


def test_two_exports_an_evaluation_and_two_reports_at_once(run: Path, shell: Any, scenes: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", run, tmp_path / "run"], check=True)
    own, bundle = tmp_path / "run", tmp_path / "run" / "onnx-fp32"
    export = ("export", own, "--format", "onnx")
    evaluate = ("eval", own, bundle, "--data", scenes, "--no-cache")
    report = ("report", own, "-o", tmp_path / "report.html")
    ended = shell.together(tmp_path, export, export, evaluate, evaluate, report, report)
    for status, out, errors in ended:
        # An evaluation whose bundle was replaced under it says so.
        assert status == 0 or (status == 2 and errors.count("\n") == errors.count("robx: ") == 1), out + errors
    assert [status for status, _, _ in (*ended[:2], *ended[4:])] == [0, 0, 0, 0]
    assert load_bundle(bundle).format == "onnx" and no_strays(tmp_path)
    good = sum(status == 0 for status, _, _ in ended[2:4])
    assert len(load_measurements(own / "measurements.jsonl")) == good
    assert json.loads((tmp_path / "report.json").read_text())["rows"]
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_a_bundle_that_is_replaced_while_it_is_opened_is_not_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robx.errors import ArtifactError
    from robx.runtime import session
    from robx.runtime.engines import on_onnxruntime

    bundle = tmp_path / "bundle"
    subprocess.run(["cp", "-r", run / "onnx-fp32", bundle], check=True)
    real = on_onnxruntime.open_model

    def slow(*arguments: Any) -> Any:
        model = real(*arguments)
        edit(bundle, lambda m: m.update(reason="another export"))
        return model

    monkeypatch.setattr(on_onnxruntime, "open_model", slow)
    with pytest.raises(ArtifactError, match="was replaced while it was being opened"):
        session.open_session(bundle)


def test_a_killed_export_does_not_affect_the_next_one(shell: Any, tmp_path: Path) -> None:
    run = make_student(tmp_path / "run")
    (killed,) = shell.together(tmp_path, ("export", run, "--format", "onnx"), kill=".work.*.tmp")
    assert killed[0] == -9 and not (run / "onnx-fp32").exists()
    assert not no_strays(run)
    status, out, errors = shell(tmp_path, "export", run, "--format", "onnx")
    assert status == 0, out + errors
    assert no_strays(run) and load_bundle(run / "onnx-fp32")


@pytest.mark.parametrize("command", ["ship", "distill"])
def test_a_folder_in_use_is_refused_until_its_process_dies(
    shell: Any, scenes: Path, tmp_path: Path, command: str
) -> None:
    code = (
        "import pathlib, sys\nfrom robx.store.locks import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"
    )
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    more = ("--teacher", "timm:test_resnet", "--format", "onnx") if command == "ship" else ("--teacher", "ema")
    student = ("--student", "test_resnet", "--data", scenes, "--out", out)
    small = () if command == "ship" else ("--crop-size", 32, "--local-crops", 0, "--workers", 0, "--batch-size", 64)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = one_line(shell(tmp_path, command, *more, *student, *small))
        assert f"{out} is in use by process {holder.pid}" in said
        holder.kill()
    status, _, errors = shell(
        tmp_path, command, *more, *student, *small, *(() if command == "ship" else ("--epochs", 1))
    )
    assert "is in use" not in errors
    assert status == 0 if command == "distill" else "fewer than one batch" in errors
