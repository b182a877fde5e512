"""Healing: closer in int8, from images of its own, resumable bit for bit, and never more than its time."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from robx.cli import main
from robx.embeddings import centred_cosine
from robx.errors import ArtifactError, InputError
from robx.eval.report.collect import Packed
from robx.eval.report.tables import candidate_table
from robx.export.build import ExportSettings, export
from robx.export.cache import Cache
from robx.export.formats import to_onnx
from robx.export.formats.network import PIXELS, ExportModel, export_model
from robx.export.gate import search
from robx.export.gate.gate import Limits, gate_error
from robx.export.heal import heal as heal_module
from robx.export.heal.heal import Healed, HealSettings, Plan, heal, minutes_needed
from robx.export.heal.images import HealingImages, read_healing_images
from robx.export.image_splits import Splits, SplitSizes, normalise, open_data, read_splits
from robx.export.int8 import by_onnxruntime, ranges
from robx.export.int8.candidate import Candidate
from robx.export.onnx_run import run_model
from robx.export.request import ExportTarget
from robx.int8_simulation import Int8Simulation
from robx.records import Preprocessing, Student, load_bundle, load_student
from robx.trunk import load_trunk
from tests.preloaded import Preloaded

SIZES = SplitSizes(calibration=16, bank=32, screening=16, judging=48, least=16)


@pytest.fixture(scope="module")
def splits(scene_shards: Path) -> Splits:
    source, held_out = open_data(scene_shards)
    return read_splits(source, held_out, Preprocessing(size=64, crop=64), sizes=SIZES)


@pytest.fixture(scope="module")
def student(cnn_run: Path) -> Student:
    return load_student(cnn_run)


@pytest.fixture(scope="module")
def model(cnn_run: Path) -> ExportModel:
    """The random CNN."""
    student, trunk = load_trunk(cnn_run)
    return export_model(trunk, student)


def _heal(model: ExportModel, student: Student, splits: Splits, folder: Path, **options: Any) -> Healed:
    settings = HealSettings(**({"steps": 6, "batch": 8} | options.pop("settings", {})))
    return heal(model.trunk, student, splits, settings, cache=Cache(folder), **options)


def _int8_cosine(model: ExportModel, student: Student, splits: Splits, expected: np.ndarray, path: Path) -> float:
    """Centred cosine of ONNX Runtime's int8 of `model`, quantised anew, with the float embeddings of other images."""

    def prepare(pixels: np.ndarray) -> np.ndarray:
        return normalise(pixels, student.preprocessing)

    proto = to_onnx.export_onnx(model, path, student=student, batch=None, opset=20)
    histograms = ranges.collect(proto, [prepare(splits.calibration.pixels)], input_name=PIXELS)
    candidate = Candidate(name="c", quantiser="onnxruntime")
    quantised: onnx.ModelProto = by_onnxruntime.quantize(proto, ranges.choose(histograms, "minmax"), candidate)
    answers = run_model(quantised, splits.judging.pixels, batch=16, prepare=prepare, literal=True)
    return float(centred_cosine(expected, answers).mean())


def test_healed_weights_are_closer_in_int8_and_farther_in_float(
    model: ExportModel, student: Student, splits: Splits, tmp_path: Path
) -> None:
    pixels = torch.from_numpy(normalise(splits.judging.pixels, student.preprocessing))
    with torch.inference_mode():
        expected = model.trunk(pixels).numpy()
    before = _int8_cosine(model, student, splits, expected, tmp_path / "plain.onnx")
    found = _heal(model, student, splits, tmp_path, settings={"steps": 40, "batch": 16, "lr": 3e-5})
    healed = copy.deepcopy(model)
    healed.trunk = found.trunk
    after = _int8_cosine(healed, student, splits, expected, tmp_path / "healed.onnx")
    assert 1 - after < 0.95 * (1 - before), f"{before:.4f} -> {after:.4f}"
    assert found.record.loss_after < 0.6 * found.record.loss_before
    with torch.inference_mode():
        assert not np.allclose(found.trunk(pixels).numpy(), expected, rtol=1e-3)
    assert found.trunk.state_dict().keys() == model.trunk.state_dict().keys()


def test_an_interrupted_healing_continues_to_the_same_bits(
    model: ExportModel, student: Student, splits: Splits, tmp_path: Path
) -> None:
    whole = _heal(model, student, splits, tmp_path / "whole")

    def interrupt(done: int, total: int, note: str) -> None:
        if note.startswith("healing") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _heal(model, student, splits, tmp_path / "cut", progress=interrupt)
    steps, lines = list[int](), list[str]()

    def count(done: int, total: int, note: str) -> None:
        if note.startswith("healing, loss"):
            steps.append(done)

    resumed = _heal(model, student, splits, tmp_path / "cut", progress=count, say=lines.append)
    assert steps == [4, 5, 6] and lines == ["healing continues after step 3 of 6"]
    assert resumed.sha256 == whole.sha256
    again = _heal(model, student, splits, tmp_path / "cut", progress=count, say=lines.append)
    assert len(steps) == 3 and "reused" in lines[-1]
    assert again.record == resumed.record and again.sha256 == resumed.sha256
    for mine, other in zip(again.trunk.parameters(), resumed.trunk.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_ranges_without_tails_are_trained_too_and_resumed(
    model: ExportModel, student: Student, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, set_ranges = list[float](), Int8Simulation.set_ranges

    def count(self: Int8Simulation, batches: Any, *, clipped: float = 0.0) -> None:
        measured.append(clipped)
        set_ranges(self, batches, clipped=clipped)

    monkeypatch.setattr(Int8Simulation, "set_ranges", count)
    of_extremes = _heal(model, student, splits, tmp_path / "extremes", settings={"steps": 1})
    monkeypatch.setattr("robx.export.heal.heal._MUCH_CLOSER", 1e9)  # as if the tails did harm here

    def interrupt(done: int, total: int, note: str) -> None:
        if note.startswith("healing") and done == 3:
            raise KeyboardInterrupt

    first = _heal(model, student, splits, tmp_path / "first", settings={"steps": 1, "lr": 1e-12})
    whole = _heal(model, student, splits, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _heal(model, student, splits, tmp_path / "cut", progress=interrupt)
    resumed = _heal(model, student, splits, tmp_path / "cut")
    assert resumed.sha256 == whole.sha256 and resumed.ranges == whole.ranges
    assert len(measured) == 2 * 5  # once with the tails and once without them in each of the five healings
    places = [(each.layer, each.place) for each in whole.ranges]
    assert places == [(each.layer, each.place) for each in of_extremes.ranges]
    widths = np.array([[each.high - each.low for each in found.ranges] for found in (of_extremes, first, whole)])
    assert (widths[1] < 1.01 * widths[0]).all() and widths[1].sum() < 0.97 * widths[0].sum()
    changes = np.abs(widths[2] / widths[1] - 1)
    # Six steps of at most .3 % at each end; none in branches that start at zero.
    assert (changes > 2e-3).sum() >= 5 and changes.max() < 0.1


INTERRUPTED = """
import json, signal, sys
from pathlib import Path
import torch
from robx.export.cache import Cache
from robx.export.formats.network import export_model
from robx.export.heal.heal import HealSettings, heal
from robx.export.image_splits import SplitSizes, open_data, read_splits
from robx.interrupts import arrived, ended_by_signals
from robx.records import Preprocessing
from robx.trunk import load_trunk

run, shards, out, number = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
student, trunk = load_trunk(run)
model = export_model(trunk, student)
sizes = SplitSizes(calibration=16, bank=32, screening=16, judging=48, least=16)
splits = read_splits(*open_data(shards), Preprocessing(size=64, crop=64), sizes=sizes)
lines = []

def healed(folder):
    lines.clear()
    settings = HealSettings(steps=2, batch=8)
    return heal(model.trunk, student, splits, settings, cache=Cache(out / folder), say=lines.append).sha256

def interrupted(tensor):
    torch.Tensor.backward = backward
    signal.raise_signal(number)
    backward(tensor)

whole, backward, noted = healed("whole"), torch.Tensor.backward, None
torch.Tensor.backward = interrupted
with ended_by_signals():
    try:
        healed("cut")
    except KeyboardInterrupt:
        noted = arrived()
print(json.dumps({"noted": noted, "same": healed("cut") == whole, "lines": lines}))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(
    number: signal.Signals, cnn_run: Path, scene_shards: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    """Half a step that was kept would be taken twice: the optimiser changes one tensor after another."""
    status, said, errors = preloaded.run(["-c", INTERRUPTED, cnn_run, scene_shards, tmp_path, int(number)])
    assert status == 0, errors
    assert json.loads(said) == {"noted": number, "same": True, "lines": ["healing continues after step 1 of 2"]}


def test_the_progress_compares_the_loss_with_that_of_the_first_steps(
    model: ExportModel, student: Student, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment when those steps are over, and also where the healing was interrupted among them or later."""
    monkeypatch.setattr(heal_module, "_PACE_STEPS", 3)
    notes = dict[int, str]()

    def note_down(done: int, total: int, note: str) -> None:
        if note.startswith("healing, loss"):
            notes[done] = note
            if done in (2, 4) and done not in stops:
                stops.append(done)
                raise KeyboardInterrupt

    stops = [2, 4]  # of the first healing: none
    _heal(model, student, splits, tmp_path / "whole", progress=note_down)
    parts = [re.fullmatch(r"healing, loss ([0-9.]+)(?: \(first steps ([0-9.]+)\))?", notes[done]) for done in notes]
    losses, firsts = zip(*(part.groups() for part in parts if part), strict=True)
    assert firsts == (None, None, None, losses[2], losses[2], losses[2])  # the mean of the first three
    stops, cut = [], tmp_path / "cut"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _heal(model, student, splits, cut, progress=note_down)
    _heal(model, student, splits, cut, progress=note_down)
    resumed = [re.findall(r"first steps ([0-9.]+)", notes[done]) for done in range(1, 7)]
    assert resumed == [[], [], [], [losses[2]], [losses[2]], [losses[2]]]


def test_a_damaged_state_is_not_continued(model: ExportModel, student: Student, splits: Splits, tmp_path: Path) -> None:
    first = _heal(model, student, splits, tmp_path, settings={"steps": 1})
    (kept,) = tmp_path.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-9] + b"x" * 9)
    assert _heal(model, student, splits, tmp_path, settings={"steps": 1}).sha256 == first.sha256


def test_a_divergence_is_one_line(model: ExportModel, student: Student, splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"healing diverged at step .*: export without --heal"):
        _heal(model, student, splits, tmp_path, settings={"lr": 1e30})


def test_the_original_is_not_touched(model: ExportModel, student: Student, splits: Splits, tmp_path: Path) -> None:
    before = copy.deepcopy(model.trunk.state_dict())
    found = _heal(model, student, splits, tmp_path, settings={"steps": 2})
    assert all(torch.equal(value, before[key]) for key, value in model.trunk.state_dict().items())
    assert found.record.student_sha256 == student.sha256 and found.record.steps == 2
    healed = found.trunk.state_dict()
    statistics = [key for key in before if "running" in key]
    assert statistics and all(torch.equal(healed[key], before[key]) for key in statistics)
    assert not any(torch.equal(healed[key], before[key]) for key in before if key.endswith("conv1.weight"))


def test_the_images_are_none_of_those_that_calibrate_screen_or_judge(scene_shards: Path) -> None:
    pre = Preprocessing(size=72, crop=64)
    splits = read_splits(*open_data(scene_shards), pre, sizes=SIZES)
    images = read_healing_images(splits, pre)
    assert images.pixels.shape == (70, 3, 72, 72)  # 96, of which 16 calibrate and 10 screen
    digests = {hashlib.sha256(np.ascontiguousarray(p[:, 4:68, 4:68]).tobytes()).digest() for p in images.pixels}
    used = (splits.calibration, splits.screening, splits.judging)
    assert len(digests) == 70 and not digests & {digest for part in used for digest in part.digests}
    assert digests & set(splits.bank.digests)  # the deployment's own crop is in the middle


def test_too_few_images_are_refused(scene_shards: Path) -> None:
    source, held_out = open_data(scene_shards)
    sizes = SplitSizes(calibration=60, bank=60, screening=36, judging=48, least=16)
    taken = read_splits(source, held_out, Preprocessing(size=64, crop=64), sizes=sizes)
    with pytest.raises(InputError, match="24 training images left to heal with and at least 32 are needed: add"):
        read_healing_images(taken, Preprocessing(size=64, crop=64))


@pytest.mark.parametrize("shape", [(64, None), (48, 80)])
def test_a_crop_is_a_window_of_the_image_mirrored_or_not(shape: tuple[int, int | None]) -> None:
    height, width = shape
    pre = Preprocessing(size=72, crop=height, crop_width=width, mean=(0, 0, 0), std=(1 / 255,) * 3)
    wide = np.random.default_rng(0).integers(0, 255, (2, 3, 72, 120), np.uint8)
    images = HealingImages(wide, pre, "")
    crops = images.crops(np.array([0, 1] * 40), np.random.default_rng(1)).round().astype(np.uint8)
    assert crops.shape == (80, 3, *pre.shape)
    windows = np.lib.stride_tricks.sliding_window_view(wide, pre.shape, axis=(2, 3))
    mirrored, tops = 0, set()
    for row, crop in enumerate(crops):
        for flip in (False, True):
            first = (crop[..., ::-1] if flip else crop)[:, :2, :8]
            same = (windows[row % 2][:, :, :, :2, :8] == first[:, None, None]).all((0, 3, 4))
            if same.any():
                mirrored += flip
                tops.add(int(np.argwhere(same)[0, 0]))
                break
        else:
            pytest.fail("the crop is no window of the image")
    assert 20 < mirrored < 60 and {0, 72 - height} <= tops


def test_the_plan_ends_within_its_budget_and_with_a_small_step() -> None:
    plan, spent, factors = Plan(left=100), 0.0, list[float]()
    while plan.left:
        factors.append(plan.lr_factor())
        seconds = 1.0 if plan.step < 20 else 3.0  # the machine becomes slower
        plan.advance(seconds, 0.0)
        spent += seconds
        if plan.left:
            plan.fit(100.0, seconds)
    assert 90 <= spent <= 100 and plan.shortened and plan.step == 20 + 80 // 3
    assert max(factors) > 0.95 and factors[-1] < 0.02 and plan.fraction == pytest.approx(1)


def test_a_resumed_healing_keeps_to_its_minutes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at any step, on a machine that is a third as fast as planned."""
    now, told = [0.0], list[str]()

    def train_step() -> float:
        now[0] += 3.0
        return 0.5

    plan = Plan(left=59)
    plan.advance(1.0, 0.5)  # the first step, before the interruption
    trainer: Any = SimpleNamespace(plan=plan, settings=HealSettings(minutes=1), train_step=train_step)
    monkeypatch.setattr(heal_module.time, "monotonic", lambda: now[0])
    heal_module._train(trainer, lambda: None, lambda *_: None, told.append)
    assert plan.seconds <= 60 and plan.shortened and plan.step == 20
    assert told == ["this machine has become slower: healing ends after 20 steps instead of 59"]


def test_minutes_that_are_too_few_to_help_are_warned_of_before_they_are_spent() -> None:
    told = list[str]()
    assert [heal_module._steps_that_fit(minutes, 3.0, told.append) for minutes in (1.0, 100.0)] == [20, 1000]
    assert told == []
    assert heal_module._steps_that_fit(0.2, 3.0, told.append) == 4
    assert told == [
        "warning: 0.2 minutes are 4 steps of healing here, which hardly help: 120 steps would take about 6 minutes "
        "(--heal 6)"
    ]


def test_a_plan_is_not_lengthened() -> None:
    plan = Plan(left=10)
    plan.advance(0.001, 0.0)
    assert not plan.fit(1000.0, 0.001) and plan.left == 9


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_minutes_are_refused(minutes: float) -> None:
    with pytest.raises(InputError, match="--heal must be a positive number of minutes"):
        HealSettings(minutes=minutes)


def test_the_cost_is_estimated_from_a_step(model: ExportModel, splits: Splits) -> None:
    assert 0 < minutes_needed(model.trunk, splits, Preprocessing(size=64, crop=64)) < 60


# ------------------------------------------------------------------------------------------------- whole exports


def _export(run: Path, data: Path, out: Path, limits: Limits, heal: HealSettings | None, **options: Any) -> Any:
    target = ExportTarget(format="onnx", precision="int8")
    settings = ExportSettings(
        run=run,
        target=target,
        data=data,
        out=out,
        limits=limits,
        heal=heal,
        calibration_images=32,
        candidates=1,
        **options,
    )
    return export(settings)


QUICK = HealSettings(steps=10, batch=16, lr=3e-5)


def test_an_export_tries_plain_and_healed_weights_and_records_both(
    cnn_run: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two that are equally fast the closer one ships (test_search): here the healed ones, whatever ten steps give.
    monkeypatch.setattr(search, "_closeness", lambda trial: float(trial.candidate.healed))
    bundle = _export(cnn_run, scene_shards, tmp_path / "b", Limits(max_drop=60, min_speedup=0.01), QUICK)
    plain, trained, healed = bundle.rungs
    assert (healed.name, healed.settings["healed"]) == (f"{plain.name}, healed", True)
    assert trained.settings == healed.settings | {"ranges": "trained"}
    assert "healed" not in plain.settings and bundle.precision == "int8"
    assert not plain.kept and (trained.kept or healed.kept)
    assert bundle.healing is not None and bundle.healing.student_sha256 == load_student(cnn_run).sha256
    assert bundle.healing.steps == 10 and bundle.healing.images >= 32
    assert bundle.healing.fingerprint not in (
        bundle.calibration.fingerprint, bundle.calibration.judged_fingerprint, bundle.calibration.screened_fingerprint
    )  # fmt: skip
    assert load_bundle(tmp_path / "b").healing == bundle.healing
    assert bundle.healing.said.startswith("weights healed in 10 steps of 16 images, ")
    caption = candidate_table(Packed(folder="b", bundle=bundle), "student").caption
    assert caption.endswith(f"; {bundle.healing.said}")


def test_a_healing_that_is_in_vain_ships_nothing(cnn_run: Path, scene_shards: Path, tmp_path: Path) -> None:
    settings = HealSettings(steps=1, batch=8, lr=0.1)
    bundle = _export(cnn_run, scene_shards, tmp_path / "b", Limits(max_drop=60, min_speedup=0.01), settings)
    plain, *_, healed = bundle.rungs
    assert plain.kept and healed.reason.startswith("not tried: healing was in vain: the int8 error was")
    assert (healed.accuracy, healed.accuracy_said, healed.values) == ("INCONCLUSIVE", "not tried", {})
    assert bundle.healing is None and load_bundle(tmp_path / "b").healing is None
    assert re.search(
        r"healing was in vain \(int8 error \.?[0-9.]+ before, [0-9.]+ after\): the student's own weights shipped",
        bundle.reason,
    )


def test_nothing_is_healed_where_int8_is_too_slow_anyway(cnn_run: Path, scene_shards: Path, tmp_path: Path) -> None:
    limits = Limits(max_drop=60, min_speedup=1000)
    bundle = _export(cnn_run, scene_shards, tmp_path / "b", limits, QUICK)
    assert bundle.healing is None and bundle.precision == "fp32"
    assert "the weights were not healed: no int8 candidate is fast enough" in bundle.reason


def test_int8_that_is_refused_says_what_healing_would_cost(cnn_run: Path, scene_shards: Path, tmp_path: Path) -> None:
    limits = Limits(max_drop=0.001, min_speedup=0.01)  # which 48 images can never prove
    bundle = _export(cnn_run, scene_shards, tmp_path / "b", limits, None)
    assert "healing its weights for int8 would take about" in bundle.reason
    assert "--heal" in str(gate_error(bundle, tmp_path / "b"))
    healed = _export(cnn_run, scene_shards, tmp_path / "b", limits, QUICK)
    assert "would take" not in healed.reason and "--heal" not in str(gate_error(healed, tmp_path / "b"))
    assert healed.precision == "fp32" and healed.verdict == "PASS"  # the fallback is the original's


@pytest.mark.parametrize("minutes", [[], ["5"]])
def test_the_command_says_that_healing_is_for_int8(cnn_run: Path, scene_shards: Path, minutes: list[str]) -> None:
    command = ["export", str(cnn_run), "--format", "onnx", "--data", str(scene_shards), "--heal", *minutes]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "--heal is for int8: give --int8 too" in result.stderr


def test_healing_is_for_int8_alone(cnn_run: Path, scene_shards: Path) -> None:
    with pytest.raises(InputError, match="--heal is for int8: give --int8 too"):
        ExportSettings(run=cnn_run, target=ExportTarget(format="onnx"), data=scene_shards, heal=QUICK)
