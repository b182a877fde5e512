"""Whole exports of small real students: what is written is what runs, and what does not pass is not called int8."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from robx import api
from robx.cli import main
from robx.errors import ArtifactError, DeviceError, GateFailed, InputError
from robx.eval.evaluate import EvalSettings, evaluate
from robx.eval.report.collect import collect
from robx.export.build import CACHE, ExportSettings, _read_images, export
from robx.export.cache import Cache
from robx.export.formats import to_onnx
from robx.export.gate.gate import Limits, gate_error
from robx.export.image_splits import SplitSizes, open_data, read_splits
from robx.export.inspect_bundle import inspect_bundle
from robx.export.int8.candidate import Candidate
from robx.export.int8.tensorrt_qdq import check_trt_qdq
from robx.export.parity import parity
from robx.export.request import ExportTarget
from robx.images.decode import renormalise
from robx.linear_head import load_head
from robx.progress import silent
from robx.records import (
    Bundle,
    DataInfo,
    Preprocessing,
    Rung,
    Value,
    load_bundle,
    load_student,
    require_bundle,
    to_json,
)
from robx.runtime.bench.interleave import interleave
from robx.runtime.session import open_session
from robx.store.files import write_json
from robx.trunk import embed, load_trunk

LENIENT: dict[str, Any] = {
    "limits": Limits(max_drop=60, min_speedup=0.01), "calibration_images": 32, "candidates": 1,
}  # fmt: skip
# No model is a thousand times as fast as itself.
HOPELESS = LENIENT | {"limits": Limits(max_drop=60, min_speedup=1000)}


def _export(run: Path, data: Path | None, out: Path, options: dict[str, Any] | None = None, **target: object) -> Bundle:
    wanted = ExportTarget(**target)  # type: ignore[arg-type]
    return export(
        ExportSettings(run=run, target=wanted, data=data, out=out, **(LENIENT if options is None else options))
    )


def _as_input(pixels: np.ndarray, run: Path, bundle: Bundle) -> np.ndarray:
    """Images normalised for the student as the bundle takes them: a uint8 bundle normalises by itself."""
    return renormalise(pixels, load_student(run).preprocessing, bundle.preprocessing)


def _torch(run: Path, pixels: np.ndarray) -> np.ndarray:
    return embed(load_trunk(run)[1], torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("which", ["cnn_run", "vit_run"])
def test_fp32_onnx_answers_as_pytorch(
    which: str, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(which)
    bundle = _export(run, scenes, tmp_path / "b", format="onnx")
    assert (bundle.precision, bundle.verdict, bundle.opset) == ("fp32", "PASS", 20)
    assert load_bundle(tmp_path / "b") == bundle
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert model.ir_version == to_onnx.IR_VERSION
    assert {o.domain: o.version for o in model.opset_import}[""] == 20
    operators = {n.op_type for n in model.graph.node}
    assert not operators & {"GlobalAveragePool", "Range", "Resize"}
    assert str(Path.cwd()).encode() not in model.SerializeToString()  # no path of the machine that exported
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:5]), _torch(run, scene_pixels[:5]), atol=1e-4)
        np.testing.assert_allclose(session.run(scene_pixels[:1]), _torch(run, scene_pixels[:1]), atol=1e-4)


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_int8_that_passes_ships_with_its_rungs(
    fmt: str, cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format=fmt, precision="int8")
    assert (bundle.precision, bundle.requested, bundle.verdict) == ("int8", "int8", "PASS"), bundle.rungs
    assert gate_error(bundle, tmp_path) is None
    kept = [rung for rung in bundle.rungs if rung.kept]
    assert len(kept) == 1
    expected = {
        "cosine_mean", "cosine_p5", "cosine_p1", "cosine_min", "knn_drop", "probe_drop", "speedup_fp32", "speedup_fp16",
        "bytes",
    }  # fmt: skip
    assert expected <= set(kept[0].values)
    assert bundle.calibration is not None and bundle.calibration.images == 32
    assert bundle.chosen_on["arch"] == platform.machine() and isinstance(bundle.chosen_on["flags"], list)
    with open_session(tmp_path / "b") as session:
        together = session.run(scene_pixels[:5])
        alone = np.concatenate([session.run(scene_pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-3 * np.abs(together).max())
    reference = _torch(cnn_run, scene_pixels[:5])
    assert np.corrcoef(together.ravel(), reference.ravel())[0, 1] > 0.9


def test_of_several_candidates_the_chosen_one_alone_meets_the_judging_images(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Candidate(name="min-max", quantiser="onnxruntime")
    wide = dataclasses.replace(plain, name="broken", percentile=50.0, ranges="percentile")
    close = dataclasses.replace(plain, name="percentile", ranges="percentile")
    monkeypatch.setattr("robx.export.gate.decide.ladder", lambda *_: [wide, plain, close])
    options = LENIENT | {"candidates": None, "calibration_images": 16}
    bundle = _export(cnn_run, scenes, tmp_path / "b", options, format="onnx", precision="int8")
    assert bundle.precision == "int8" and bundle.verdict == "PASS"
    judged = [rung.name for rung in bundle.rungs if rung.was_judged]
    assert len(judged) == 1 and judged != ["broken"] and [rung.kept for rung in bundle.rungs].count(True) == 1
    cosines = {rung.name: rung.values["screen_cosine"].value for rung in bundle.rungs}
    assert cosines[judged[0]] == max(cosines.values())
    assert {rung.values["probe_drop"].n for rung in bundle.rungs if not rung.was_judged} == {16}  # a third of 64 - 16
    assert {rung.values["probe_drop"].n for rung in bundle.rungs if rung.was_judged} == {32}
    assert "chosen from 3" in bundle.reason and "screened on" in bundle.rungs[0].reason
    # All sound ones against the floats in one run, which is longer than a look's.
    raced = {rung.name: rung.values["speedup_fp32"].n for rung in bundle.rungs if rung.name != "broken"}
    assert len(raced) == 2 and set(raced.values()) == {20}
    timed = [f"{r.values['speedup_fp32'].value:.2f}x fp32" in r.reason for r in bundle.rungs]
    assert timed == ["timing UNSTABLE" not in r.reason for r in bundle.rungs]
    seen = bundle.calibration
    assert seen is not None and (seen.images, seen.screened_images, seen.judged_images) == (16, 16, 32)
    assert len({seen.fingerprint, seen.screened_fingerprint, seen.judged_fingerprint}) == 3
    assert _export(cnn_run, scenes, tmp_path / "f", format="onnx").calibration.screened_images == 0  # type: ignore[union-attr]


def test_none_passing_ships_the_fallback_under_its_true_precision(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", HOPELESS, format="onnx", precision="int8")
    assert bundle.requested == "int8" and bundle.precision in ("fp16", "fp32")
    assert not any(rung.kept for rung in bundle.rungs if rung.precision == "int8")
    assert load_bundle(tmp_path / "b").precision == bundle.precision
    error = gate_error(bundle, tmp_path / "b")
    assert isinstance(error, GateFailed) and error.exit_status == 3
    assert bundle.precision in str(error) and "--min-speedup" in str(error) and "--force" in str(error)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert not any(n.op_type == "QuantizeLinear" for n in model.graph.node)


def test_a_refused_export_supersedes_the_earlier_bundle_in_its_place(
    cnn_run: Path, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    for name in ("student.json", "student.safetensors"):
        shutil.copy(cnn_run / name, run)
    earlier = _export(run, None, run / "onnx-int8", format="onnx")
    hopeless = ExportSettings(run=run, target=ExportTarget(format="onnx", precision="int8"), data=scenes, **HOPELESS)
    refused = export(hopeless, say=said.append)
    shipped = f"onnx-{refused.precision}"
    few, line = [line for line in said if line.startswith("warning")]
    assert f"{hopeless.calibration_images} calibration images are for a demonstration only" in few
    assert (
        f"{run / 'onnx-int8'} still has onnx fp32 {earlier.id} (verdict before: NOT_JUDGED) of an earlier export"
        in line
    )
    assert load_bundle(run / "onnx-int8").id == earlier.id, "nothing of it is deleted"
    found = collect([run])
    assert [Path(packed.folder).name for packed in found.bundles] == [shipped]
    assert [(Path(one.where).name, one.kind) for one in found.problems] == [("onnx-int8", "EXCLUDED")]
    words = f"warning: {run / 'onnx-int8'}: a later export in its place was refused by the gate"
    said.clear()
    next(evaluate(EvalSettings(models=(run / "onnx-int8",), data=scenes, knn=True), say=said.append))
    with api.open(run / "onnx-int8"):
        assert [line.startswith(words) for line in (*said, *caplog.messages) if "warning" in line] == [True, True]
    with pytest.raises(InputError, match=f"give its bundle, {run / shipped}$"):
        require_bundle(run)
    _export(run, None, run / "onnx-int8", format="onnx")
    assert len(collect([run]).bundles) == 2 and not (run / "onnx-int8" / "superseded.txt").exists()


def test_a_student_whose_training_was_interrupted_is_named_as_such(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    run.mkdir()
    shutil.copy(cnn_run / "student.safetensors", run)
    student = load_student(cnn_run)
    # 2 epochs of 3 batches of 16: 50 images give no fourth batch
    data, recipe = DataInfo(name="d", images=50, fingerprint="f"), {"epochs": 2, "batch_size": 16}
    write_json(run / "student.json", to_json(dataclasses.replace(student, data=data, recipe=recipe, images_seen=80)))
    export(ExportSettings(run=run, target=ExportTarget(format="onnx"), out=run / "onnx"), say=said.append)
    words = "the student's training was interrupted after 80 of 96 images"
    assert any(line.startswith("warning") and words in line for line in said)
    assert words in (run / "onnx" / "README.md").read_text()
    list(evaluate(EvalSettings(models=(run / "onnx",), data=scenes, knn=True), say=said.append))
    assert len([line for line in said if words in line]) == 2
    found = collect([run]).problems
    assert [(Path(one.where).name, one.kind) for one in found if words in one.what] == [
        ("run", "UNFINISHED"),
        ("onnx", "UNFINISHED"),
    ]
    write_json(run / "student.json", to_json(dataclasses.replace(student, data=data, recipe=recipe, images_seen=96)))
    assert not [one for one in collect([run]).problems if Path(one.where).name == "run"]


def test_an_unproven_drop_does_not_ship_and_says_what_would_prove_it(
    cnn_run: Path, scenes: Path, tmp_path: Path
) -> None:
    """32 judging images cannot prove a drop below one point, however good the model is."""
    options = LENIENT | {"limits": Limits(max_drop=1, min_speedup=0.01)}
    bundle = _export(cnn_run, scenes, tmp_path / "b", options, format="onnx", precision="int8")
    (int8,) = [rung for rung in bundle.rungs if rung.precision == "int8"]
    assert int8.accuracy == "INCONCLUSIVE" and not int8.kept
    assert bundle.precision != "int8"
    message = str(gate_error(bundle, tmp_path / "b"))
    assert "neither proven nor refuted by 32 images" in message
    assert all(option in message for option in ("--test", "--judging-images", "--max-drop", "--force"))


def _rung(accuracy: str, speed: str, *, measured: bool = True, by: str = "probe_drop") -> Rung:
    values = {by: Value(value=1.0, n=500), "speedup_fp32": Value(value=1.0)} if measured else {}
    return Rung(
        name="x", settings={}, precision="int8", accuracy=accuracy, speed=speed, values=values, reason="",  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        (
            [_rung("FAIL", "PASS")],
            r"the only one measured loses .*1\.0 points on 500 judging images; allow .* --max-drop",
        ),
        ([_rung("FAIL", "PASS"), _rung("INCONCLUSIVE", "PASS")], "of 1 of them .* 500 images.* --judging-images"),
        ([_rung("INCONCLUSIVE", "PASS"), _rung("PASS", "FAIL")], "slower .* --min-speedup"),
        ([_rung("PASS", "FAIL"), _rung("PASS", "INCONCLUSIVE")], "quiet machine"),
        ([_rung("FAIL", "INCONCLUSIVE", measured=False)], "none could be built or run"),
        # Without labels --max-drop decides nothing.
        ([_rung("FAIL", "PASS", by="cosine_mean")], "give labelled test images of classes that --data has too"),
        (
            [_rung("INCONCLUSIVE", "PASS", by="cosine_mean")],
            r"--judging-images\), train weights .* --heal, or ship int8",
        ),
    ],
)
def test_what_to_do_follows_from_the_rung_that_came_nearest(
    rungs: list[Rung], words: str, cnn_run: Path, tmp_path: Path
) -> None:
    plain = _export(cnn_run, None, tmp_path / "b", format="onnx")
    refused = dataclasses.replace(plain, requested="int8", rungs=tuple(rungs))
    assert re.search(words, str(gate_error(refused, tmp_path / "b")))


def test_a_refused_int8_is_told_what_could_still_find_a_better_one(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    plain = _export(cnn_run, scenes, tmp_path / "b", format="onnx")
    lost = _rung("FAIL", "INCONCLUSIVE")
    wide = lost.values | {"probe_drop": Value(value=4.0, low=-1.0, high=9.0, n=24), "screened": Value(value=24.0)}
    rungs = (dataclasses.replace(lost, values=wide), _rung("FAIL", "PASS", measured=False))
    refused = dataclasses.replace(plain, requested="int8", rungs=rungs)
    assert plain.calibration is not None
    message = str(gate_error(refused, tmp_path / "b", most=2))
    assert "the only one measured loses more accuracy than allowed, 4.0 points (-1.0 to 9.0) on 24 screening" in message
    for words in ("--rungs was 2", "calibrate on more than 16 images", "give more images", "quiet machine"):
        assert words in message.partition("allow a larger drop")[0]
    assert "--rungs" not in str(gate_error(refused, tmp_path / "b", most=3))
    assert "--budget was 5 s" in str(gate_error(refused, tmp_path / "b", budget=5.0))
    enough = dataclasses.replace(plain.calibration, images=300)
    sure = dataclasses.replace(refused, rungs=(_rung("FAIL", "PASS"), _rung("FAIL", "PASS")), calibration=enough)
    message = str(gate_error(sure, tmp_path / "b"))
    assert "all 2 of them lose more accuracy than allowed, at least 1.0 points on 500 judging images; allow" in message


def test_the_parity_that_is_said_is_the_relative_one_that_was_checked(cnn_run: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, None, tmp_path / "b", format="onnx")
    relative = bundle.parity["max_relative"].value
    assert 0 < relative < 1e-3 and f"within {relative:.1e} of the largest value" in bundle.reason
    huge = 1e12 * np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    found = parity(huge, huge * np.float32(1 + 1e-4), precision="fp32", what="x")
    assert found["max_abs"].value > 1e6
    assert found["max_relative"].value == pytest.approx(1e-4, rel=0.01)


@pytest.mark.usefixtures("real_exporter")
def test_a_second_export_of_the_same_student_has_the_same_id(vit_run: Path, tmp_path: Path) -> None:
    first = [_export(vit_run, None, tmp_path / "a" / fmt, format=fmt).id for fmt in ("onnx", "openvino")]
    shutil.rmtree(vit_run / CACHE)  # the network is exported anew
    assert [_export(vit_run, None, tmp_path / "b" / fmt, format=fmt).id for fmt in ("onnx", "openvino")] == first


def test_exporting_over_a_bundle_says_which_one_it_replaces(cnn_run: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def again(fmt: Any) -> Bundle:
        settings = ExportSettings(run=cnn_run, target=ExportTarget(format=fmt), out=tmp_path / "b")
        return export(settings, say=said.append)

    first = again("onnx")
    assert said == []
    second = again("openvino")
    assert said == [f"{tmp_path / 'b'}: {second.id} replaced onnx fp32 {first.id} (verdict before: NOT_JUDGED)"]
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    again("openvino")
    assert said[1:] == [f"{tmp_path / 'b'}: {second.id} replaced a damaged bundle"]


def test_inspect_of_a_run_names_its_bundles(cnn_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("student.json", "student.safetensors"):
        shutil.copy(cnn_run / name, run)

    def inspect() -> str:
        done = CliRunner().invoke(main, ["inspect", str(run)])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
        return done.stderr

    assert f"{run} is a student, not a bundle: export it with robx export" in inspect()
    _export(run, None, run / "onnx-fp32", format="onnx")
    assert f"{run} is a student, not a bundle: give its bundle, {run / 'onnx-fp32'}" in inspect()
    for number in range(4):
        shutil.copytree(run / "onnx-fp32", run / f"x{number}")
    assert f"give one of its bundles: {run / 'onnx-fp32'}, {run / 'x0'}, {run / 'x1'} (and 2 more)" in inspect()


@pytest.mark.parametrize(("fmt", "options"), [
    ("onnx", {"batch": 3}), ("openvino", {"batch": 3}), ("onnx", {"uint8_input": True}),
    ("openvino", {"uint8_input": True}),
])  # fmt: skip
def test_int8_of_a_fixed_batch_and_of_uint8_pixels(
    fmt: str, options: dict[str, Any], cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format=fmt, precision="int8", **options)
    assert (bundle.precision, bundle.verdict) == ("int8", "PASS"), bundle.rungs
    with open_session(tmp_path / "b") as session:
        answer = session.run(_as_input(scene_pixels[:7], cnn_run, bundle))
    assert np.corrcoef(answer.ravel(), _torch(cnn_run, scene_pixels[:7]).ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(name="a", quantiser="onnxruntime"),
        Candidate(name="b", quantiser="onnxruntime", ranges="mse"),
        Candidate(name="c", quantiser="nncf"),
    ],
)
def test_every_quantiser_takes_a_fixed_batch(
    candidate: Candidate, cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robx.export.gate.decide.ladder", lambda *_: [candidate])
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", precision="int8", batch=3)
    assert bundle.precision == "int8", bundle.rungs


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_a_head_stays_in_float_where_the_trunk_is_int8(fmt: str, cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    head = _save_head(tmp_path, load_trunk(cnn_run)[0].width)
    bundle = _export(cnn_run, scenes, tmp_path / "b", LENIENT | {"head": head}, format=fmt, precision="int8")
    assert bundle.precision == "int8" and bundle.labels == ("x", "y", "z")
    layers = inspect_bundle(tmp_path / "b", bundle).layers
    assert {layer.precision for layer in layers if layer.operator in ("Gemm", "MatMul")} == {"fp32"}
    assert "int8" in {layer.precision for layer in layers}
    assert all(layer.bytes > 0 for layer in layers)


def test_another_cpu_is_judged_by_what_its_graph_computes_and_not_timed_here(
    cnn_run: Path, scenes: Path, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", precision="int8", device="arm64")
    if ExportTarget(format="onnx", device="arm64").is_local:
        pytest.skip("this machine is an ARM: it is timed")
    (kept,) = [rung for rung in bundle.rungs if rung.kept]
    assert (bundle.precision, bundle.verdict, bundle.target) == ("int8", "INCONCLUSIVE", "arm64")
    assert kept.settings["signed"] is True and "speedup_fp32" not in kept.values
    assert "computed literally" in kept.reason and "robx bench" in kept.reason


def _flip(path: Path) -> None:
    """Damage a file where it stays readable: one bit, in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def exported_run(cnn_run: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of cnn_run with one bundle, in "a", and the cache of that one export."""
    run, said = tmp_path_factory.mktemp("exported") / "run", list[str]()
    shutil.copytree(cnn_run, run, ignore=shutil.ignore_patterns(CACHE))
    export(
        ExportSettings(
            run=run, target=ExportTarget(format="onnx", precision="fp16"), data=scenes, out=run / "a", **LENIENT
        ),
        say=said.append,
    )
    assert not said
    return run


@pytest.mark.parametrize("damage", [_flip, lambda path: path.write_bytes(path.read_bytes()[:1000])])
def test_a_damaged_cache_is_named_and_made_again(
    damage: Callable[[Path], object], exported_run: Path, scenes: Path, tmp_path: Path
) -> None:
    """One flipped bit of a weight passes parity, and would ship."""
    run, said = tmp_path / "run", list[str]()
    shutil.copytree(exported_run, run)
    cached = sorted(path for path in (run / CACHE).glob("*") if path.suffix in (".onnx", ".npy"))
    good = [path.read_bytes() for path in cached]
    assert {path.suffix for path in cached} == {".onnx", ".npy"}
    for path in cached:
        damage(path)
    target = ExportTarget(format="onnx", precision="fp16")
    export(ExportSettings(run=run, target=target, data=scenes, out=tmp_path / "b", **LENIENT), say=said.append)
    assert sorted(said) == [f"{path} is damaged: it is ignored and computed again" for path in cached]
    assert [path.read_bytes() for path in cached] == good
    assert (run / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_a_cached_model_with_control_flow_is_not_used(exported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported_run, run)
    _export(run, None, tmp_path / "a", format="onnx")
    (cached,) = (run / CACHE).glob("*.onnx")
    model = onnx.load(cached)
    body = onnx.parser.parse_graph("b (int64 i, bool c) => (bool d) { d = Identity(c) }")
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body))
    Cache(run / CACHE).write(cached.name, model.SerializeToString())
    _export(run, None, tmp_path / "b", format="onnx")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_a_read_only_student_is_exported_elsewhere(
    cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", list[str]()
    shutil.copytree(cnn_run, run, ignore=shutil.ignore_patterns(CACHE))
    before = sorted(run.rglob("*"))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **how: not str(path).startswith(str(run)) and real(path, mode))
    settings = ExportSettings(run=run, target=ExportTarget(format="onnx"), out=tmp_path / "b")
    assert export(settings, say=said.append).precision == "fp32"
    assert said == [f"{run} is read-only: nothing is kept there for the next export"]
    assert sorted(run.rglob("*")) == before and (tmp_path / "b" / "manifest.json").is_file()
    with pytest.raises(InputError, match="run is read-only: give --out"):
        export(dataclasses.replace(settings, out=None))
    with pytest.raises(InputError, match="run is read-only: give --out in another folder"):
        export(dataclasses.replace(settings, out=run / "deep" / "bundle"))


def test_a_place_that_cannot_hold_the_bundle_is_refused_before_the_images_are_read(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robx.export.build.read_splits", lambda *_, **__: pytest.fail("the images were read"))
    run = tmp_path / "run"
    shutil.copytree(cnn_run, run, ignore=shutil.ignore_patterns(CACHE))
    (run / "onnx-fp32").touch()
    settings = ExportSettings(run=run, target=ExportTarget(format="onnx", precision="int8"), data=scenes)
    for out in (run / "onnx-fp32", run / "onnx-fp32" / "deep"):
        with pytest.raises(InputError, match="onnx-fp32 is not a folder: give --out in another folder"):
            export(dataclasses.replace(settings, out=out))
    with pytest.raises(InputError, match="onnx-fp32 is not a folder: give --out with a folder for the bundle"):
        export(settings)  # what ships where no int8 candidate passes


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o700), (0o022, 0o755)])
def test_a_bundles_permissions_follow_the_umask(mask: int, mode: int, cnn_run: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        _export(cnn_run, None, tmp_path / "b", format="onnx")
    finally:
        os.umask(before)
    assert (tmp_path / "b").stat().st_mode & 0o777 == mode
    for path in (tmp_path / "b").rglob("*"):
        assert path.stat().st_mode & 0o777 == (mode if path.is_dir() else mode & 0o666), path


def test_images_that_cannot_be_read_are_counted_in_one_line(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    data, said = tmp_path / "data", list[str]()
    shutil.copytree(scenes, data)
    for folder in sorted((data / "train").iterdir())[:2]:
        (folder / "broken.jpg").write_bytes(b"not an image")
    splits = read_splits(
        *open_data(data), Preprocessing(size=64, crop=64), sizes=SplitSizes(calibration=32, least=32), say=said.append
    )
    assert len(splits.bank) > 32
    (line,) = said
    assert re.match(r"warning: 2 images of .* cannot be read: left out \(first: .*broken\.jpg", line)


def test_what_an_export_leaves_out_of_its_images_is_said(scenes: Path, tmp_path: Path) -> None:
    data, said = tmp_path / "data", list[str]()
    shutil.copytree(scenes, data)
    (data / "test" / "photo.heic").write_bytes(b"heic")
    images = [next((data / split).rglob("*.png")).relative_to(data) for split in ("train", "test")]
    (tmp_path / "labels.csv").write_text("".join(f"{path},a\n" for path in (*images, "nowhere.png")))
    settings = ExportSettings(
        run=tmp_path,
        target=ExportTarget(format="onnx"),
        data=data,
        labels=tmp_path / "labels.csv",
        image_member="rgb.jpg",
    )
    _read_images(settings, Preprocessing(size=64, crop=64), silent, said.append)
    train, test = said
    unused = f"{data} has no tar shards, so that --image-member rgb.jpg has no effect on it"
    assert unused in train and unused in test and "no image" not in train
    assert "skipped 1 file that robx cannot read (1 .heic)" in test
    assert "1 of 3 lines of labels.csv names no image of train or test" in test


def test_flat_images_take_their_labels_from_a_file(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    lines, data = [], tmp_path / "data"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        for number, path in enumerate(sorted(path for path in (scenes / split).rglob("*") if path.is_file())):
            name = f"{split}{number}{path.suffix}"
            shutil.copy(path, data / split / name)
            lines.append(f"{name},{path.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    given = LENIENT | {"labels": tmp_path / "labels.csv"}
    bundle = _export(cnn_run, data, tmp_path / "b", given, format="onnx", precision="fp16")
    assert "probe_drop" in bundle.rungs[0].values
    bare = _export(cnn_run, data, tmp_path / "c", format="onnx", precision="fp16")
    assert "probe_drop" not in bare.rungs[0].values
    with pytest.raises(InputError, match="--labels is about images"):
        _export(cnn_run, None, tmp_path / "d", {"labels": tmp_path / "labels.csv"}, format="onnx")


def test_a_session_is_closed_when_its_judgement_fails(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_broken(folder: Path, **_: Any) -> Any:
        session = open_session(folder)
        opened.append(session)
        if len(opened) == 1:
            monkeypatch.setattr(session, "run", lambda images: np.full((len(images), 1), np.nan, np.float32))
        return session

    for module in ("judge", "timing", "shipped"):
        monkeypatch.setattr(f"robx.export.gate.{module}.open_candidate", open_broken)
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", precision="fp16")
    assert bundle.precision == "fp32" and "do not pair" in bundle.rungs[0].reason
    for session in opened:
        with pytest.raises(DeviceError, match="closed"):
            session.facts()


def test_the_gate_times_what_was_planned_for_one_image(
    cnn_run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: dict[str, set[str]] = {}

    def watch(sessions: dict[str, Any], images: np.ndarray, **more: Any) -> Any:
        for name, session in sessions.items():
            timed.setdefault(name, set()).add(session.facts()["input_shape"])
        return interleave(sessions, images, **more | {"blocks": 10, "seconds": 0.01})

    monkeypatch.setattr("robx.runtime.bench.interleave.interleave", watch)
    _export(cnn_run, scenes, tmp_path / "b", format="openvino", precision="int8")
    assert timed.keys() == {"candidate", "fp32", "fp16"}
    assert {shape[:3] for shapes in timed.values() for shape in shapes} == {"[1,"}
    with open_session(tmp_path / "b") as session:  # what ships still takes any number
        assert session.facts()["input_shape"].startswith("[?,")


def test_force_ships_int8_marked(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    options = HOPELESS | {"force": True}
    bundle = _export(cnn_run, scenes, tmp_path / "b", options, format="onnx", precision="int8")
    assert (bundle.precision, bundle.verdict) == ("int8", "FORCED")
    assert "FAILED" in bundle.reason


def test_tensorrt_int8_is_checked_and_its_speed_is_left_open(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="trt", precision="int8")
    assert bundle.precision == "int8"
    check_trt_qdq(tmp_path / "b" / "model.onnx")
    kept = next(rung for rung in bundle.rungs if rung.kept)
    assert kept.accuracy == "PASS"
    if "speedup_fp32" not in kept.values:
        assert bundle.verdict == "INCONCLUSIVE" and "on the device" in bundle.reason


def test_fp16_onnx_and_openvino(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    for fmt in ("onnx", "openvino"):
        bundle = _export(cnn_run, scenes, tmp_path / fmt, format=fmt, precision="fp16")
        assert bundle.precision == "fp16"
        assert bundle.parity["cosine_min"].value > 0.999
        assert bundle.inputs[0].dtype == "float32"


def test_ort_holds_its_operators(cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="ort")
    operators = (tmp_path / "b" / "operators.config").read_text()
    assert "Conv" in operators and "/tmp" not in operators
    assert {f.role for f in bundle.deployed} == {"model", "operators"}
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:3]), _torch(cnn_run, scene_pixels[:3]), atol=1e-4)


def test_a_fixed_batch_with_a_tail(cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format="onnx", batch=3)
    assert bundle.inputs[0].shape == (3, 3, 64, 64)
    with open_session(tmp_path / "b") as session:
        np.testing.assert_allclose(session.run(scene_pixels[:7]), _torch(cnn_run, scene_pixels[:7]), atol=1e-4)


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_uint8_input_holds_the_normalisation(
    fmt: str, cnn_run: Path, scenes: Path, scene_pixels: np.ndarray, tmp_path: Path
) -> None:
    bundle = _export(cnn_run, scenes, tmp_path / "b", format=fmt, uint8_input=True)
    assert bundle.inputs[0].dtype == "uint8"
    with open_session(tmp_path / "b") as session:
        found = session.run(_as_input(scene_pixels[:3], cnn_run, bundle))
    np.testing.assert_allclose(found, _torch(cnn_run, scene_pixels[:3]), atol=1e-3)


def _save_head(folder: Path, width: int) -> Path:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(3, width)).astype(np.float32), random.normal(size=3).astype(np.float32)
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors", {"classes": json.dumps(["x", "y", "z"])})
    return folder / "head.safetensors"


def test_a_head_adds_logits(cnn_run: Path, scene_pixels: np.ndarray, tmp_path: Path) -> None:
    import onnxruntime

    path = _save_head(tmp_path, load_trunk(cnn_run)[0].width)
    head = load_head(path)
    bundle = _export(cnn_run, None, tmp_path / "b", {"head": path}, format="onnx")
    assert bundle.labels == ("x", "y", "z") and [o.name for o in bundle.outputs] == ["embedding", "logits"]
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx")
    embedding, logits = session.run(None, {"pixels": scene_pixels[:4]})
    np.testing.assert_allclose(logits, embedding @ head.weight.T + head.bias, atol=1e-3)
    save_file({"weight": head.weight[:, :5].copy(), "bias": head.bias}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match="the head takes 5 features"):
        _export(cnn_run, None, tmp_path / "c", {"head": tmp_path / "narrow.safetensors"}, format="onnx")


def test_the_onnx_is_exported_once(cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _export(cnn_run, None, tmp_path / "a", format="onnx")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("exported twice")

    monkeypatch.setattr(to_onnx, "export_onnx", never)
    assert _export(cnn_run, None, tmp_path / "b", format="openvino").verdict == "NOT_JUDGED"
    assert not list((cnn_run / CACHE).glob(".work*"))


def test_what_cannot_be_judged_or_is_not_whole_writes_nothing(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --data"):
        _export(cnn_run, None, tmp_path / "b", format="onnx", precision="int8")
    with pytest.raises(InputError, match="at least 300"):
        _export(cnn_run, scenes, tmp_path / "b", {}, format="onnx", precision="int8")
    damaged = tmp_path / "run"
    shutil.copytree(cnn_run, damaged)
    with (damaged / "student.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ArtifactError, match="SHA-256"):
        _export(damaged, None, tmp_path / "b", format="onnx")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"format": "tflite"}, "unknown format"),
        ({"format": "onnx", "opset": 13}, "opset 13"),
        ({"format": "onnx", "batch": 0}, "at least 1, got 0"),
        ({"format": "trt", "uint8_input": True}, "--uint8-input"),
        ({"format": "onnx", "device": "rtx:sm89"}, "--target 'rtx:sm89' is not for onnx: give local or arm64"),
        ({"format": "openvino", "device": "banana"}, "--target 'banana'"),
    ],
)
def test_senseless_targets_are_refused(wanted: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ExportTarget(**wanted)  # type: ignore[arg-type]


def test_another_opset_than_asked_is_an_error(cnn_onnx: onnx.ModelProto, cnn_run: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(cnn_onnx)
    with pytest.raises(ArtifactError, match="opset 18 was asked for and the exporter gave 20"):
        to_onnx.finish(model, load_trunk(cnn_run)[0], opset=18)


def test_parity_refuses_what_differs() -> None:
    reference = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    assert parity(reference, reference + 1e-6, precision="fp32", what="x")["max_abs"].value < 1e-5
    for wrong in (reference * np.float32(1.01), reference[:, ::-1], np.full_like(reference, np.nan)):
        with pytest.raises(ArtifactError, match="not shipped"):
            parity(reference, wrong, precision="fp32", what="x")


def test_the_commands(cnn_run: Path, scenes: Path, tmp_path: Path) -> None:
    run = CliRunner()
    options = ["--data", str(scenes), "--calibration-images", "32", "--rungs", "1", "--max-drop", "60"]
    base = ["export", str(cnn_run), "--format", "onnx", "--int8", "--out", str(tmp_path / "b"), *options]
    refused = run.invoke(main, [*base, "--min-speedup", "1000"])
    assert refused.exit_code == 3, refused.output
    assert "Candidates tried" in refused.output and "static, min-max" in refused.output
    shipped = run.invoke(main, [*base, "--min-speedup", "0.01"])
    assert shipped.exit_code == 0, shipped.output
    plain = run.invoke(main, ["inspect", str(tmp_path / "b")])
    assert "robx export --sensitivity" in plain.output
    assert "Candidates were timed on: " in plain.output and platform.machine() in plain.output
    again = run.invoke(main, [*base, "--min-speedup", "0.01", "--sensitivity"])
    assert again.exit_code == 0, again.output
    shown = run.invoke(main, ["inspect", str(tmp_path / "b"), "--layers"])
    assert shown.exit_code == 0, shown.output
    assert "model.onnx" in shown.output and "int8" in shown.output and "Conv" in shown.output
    assert "Sensitivity" in shown.output and "█" in shown.output
    mobile = ["export", str(cnn_run), "--format", "ort", "--out", str(tmp_path / "ort")]
    assert run.invoke(main, mobile).exit_code == 0
    listed = run.invoke(main, ["inspect", str(tmp_path / "ort"), "--layers"])
    assert "The layers of ort files cannot be listed, only their operators" in listed.output
    unseen = run.invoke(main, ["export", str(cnn_run), "--format", "onnx", "--sensitivity"])
    assert unseen.exit_code == 2 and "--data" in unseen.output
    both = run.invoke(main, ["export", str(cnn_run), "--format", "onnx", "--int8", "--fp16"])
    assert both.exit_code == 2 and "two different exports" in both.output
