"""A plan is checked whole before its first stage: in one line that names the table, in a dry run and in a real one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from robx import api
from robx.cli import main
from robx.distill.training.run_settings import compare
from robx.errors import ArtifactError, InputError, MissingExtra, RobxError
from robx.progress import silent
from robx.ship import run as module
from robx.ship import stages as stages_module
from robx.ship.checks import check_plan, naming_table
from robx.ship.costs import estimate_plan
from robx.ship.plan import Plan, make_plan, read_plan
from robx.ship.run import run_plan
from robx.ship.stages import Stages


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images without labels or splits."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number:02d}.png")
    return tmp_path / "photos"


def _plan(root: Path, data: Path, **more: Any) -> Plan:
    values = {"teacher": "timm:test_resnet", "student": "test_resnet", "data": str(data), "out": str(root / "run")}
    return make_plan(values | {"export": [{"format": "onnx"}]} | more, where="plan.toml")


def _refused(plan: Plan) -> str:
    """The line with which a plan is refused by the dry run and by the real one, before any stage."""
    with pytest.raises(RobxError) as dry:
        next(estimate_plan(plan, api.VERBS))

    def never(*_: object) -> None:
        pytest.fail("a stage was started")

    with pytest.raises(RobxError) as real:
        run_plan(plan, api.VERBS, progress=silent, announce=never, say=never)
    assert str(dry.value) == str(real.value) and "\n" not in str(real.value)
    assert not (plan.out / "plan.toml").exists()
    return str(real.value)


INT8 = {"format": "onnx", "int8": True, "calibration_images": 20}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"export": [{"format": "onnx", "opset": 99}]}, "[[export]]: opset 99 is not supported"),
        ({"export": [{"format": "onnx", "batch": 0}]}, "[[export]]: batch must be at least 1, got 0"),
        ({"export": [{"format": "nnx"}]}, "[[export]]: format must be one of 'onnx', "),
        ({"export": [{"format": "ONNX"}]}, ", got 'ONNX': did you mean onnx?"),
        ({"export": [{"format": "onnx", "input_layout": "NHCW"}]}, "got 'NHCW': did you mean "),
        ({"bench": [{"profile": "Standard"}]}, "[[bench]]: unknown profile 'Standard': did you mean standard?"),
        ({"bench": [{"precision_hint": "F16"}]}, "[[bench]]: precision_hint must be one of 'f32', 'f16', 'bf16', got"),
        ({"bench": [{"provider": "cudda"}]}, "[[bench]]: unknown provider 'cudda': did you mean cuda, cpu?"),
        ({"eval": {"transfers": ["CIFAR10"]}}, "[eval]: unknown transfer 'CIFAR10': did you mean cifar10?"),
        (
            {"export": [{"format": "onnx", "heal": 5}]},
            "[[export]]: --heal is for int8: give --int8 too (--heal is the key",
        ),
        (
            {"export": [{"format": "onnx", "candidates": 3}]},
            "[[export]]: --rungs is for the int8 search: add --int8, or leave it out (--rungs is the key candidates of",
        ),
        ({"export": [{"format": "onnx", "max_drop": 2.0}]}, "[[export]]: --max-drop is for the gate"),
        ({"distill": {"stored_k": 4}}, "[distill]: --store-k is about the targets that are written: give --store-tar"),
        ({"export": [{**INT8, "heal": math.nan}]}, "[[export]]: heal must be a finite number, got nan"),
        ({"export": [{**INT8, "heal": -1}]}, "[[export]]: --heal must be a positive number of minutes"),
        (
            {"export": [{**INT8, "heal": 1e9}]},
            "[[export]]: --heal must be a positive number of minutes, at most 10080, got 1e+09",
        ),
        ({"export": [{**INT8, "heal": "5"}]}, "[[export]]: heal must be a number, got '5'"),
        ({"export": [{**INT8, "max_drop": math.nan}]}, "[[export]]: max_drop must be a finite number"),
        ({"export": [{"format": "onnx", "int8": "no"}]}, "[[export]]: int8 must be true or false, got 'no'"),
        ({"export": [{"format": "onnx", "optional": "yes"}]}, "[[export]]: optional must be true or false"),
        ({"export": [{"format": "onnx"}, {"format": "ncnn", "size": 1.5}]}, "[[export]] 2: size must be"),
        (
            {"export": [{"format": "onnx"}, {"format": "onnx", "batch": 1}]},
            "[[export]] 1 and [[export]] 2 would both write to",
        ),
        (
            {"export": [{"format": "onnx", "batch": 1}, INT8]},  # where int8 is refused, a dynamic fp32 model ships
            "[[export]] 1 and [[export]] 2 would both write to",
        ),
        ({"export": [{"format": "onnx", "int8": True}]}, "[[export]]: photos has 40 different calibration images and"),
        (
            {"export": [{**INT8, "calibration_images": 41}]},
            "(--calibration-images is the key calibration_images of this",
        ),
        ({"export": [{"format": "onnx", "rungs": 2}]}, "unknown key rungs: --rungs is the key candidates in a plan"),
        ({"export": [{"format": "onnx", "out": ""}]}, "[[export]]: out is an empty path"),
        ({"eval": {"lowshot": 5}}, "[eval]: lowshot must be a string, got 5"),
        ({"eval": {"lowshot": "1,x"}}, "[eval]: low-shot 'x' is neither"),
        ({"eval": {"threads": 0}}, "[eval]: threads must be at least 1, got 0"),
        ({"eval": {"device": "quantum"}}, "[eval]: unknown provider 'quantum'"),
        ({"eval": {"transfer": ["x"]}}, "[eval]: unknown key transfer: --transfer is the key transfers in a plan"),
        ({"bench": [{}, {"provider": "quantum"}]}, "[[bench]] 2: unknown provider 'quantum'"),
        ({"bench": [{"threads": 0}]}, "[[bench]]: threads is 0"),
        ({"bench": [{"affinity": "a"}]}, "[[bench]]: affinity 'a' is not a list of cores"),
        ({"bench": [{"formats": ["trt"]}]}, "[[bench]]: formats: there is no [[export]] with format trt: give onnx"),
        ({"report": {"budgets": "30"}}, "[report]: budgets must be a list of numbers or strings, got '30'"),
        ({"report": {"budgets": ["30ms"]}}, "[report]: budget 30ms is not a latency in ms"),
        ({"report": {"budget": [30]}}, "[report]: unknown key budget: --budget is the key budgets in a plan"),
        ({"distill": {"workers": -1}}, "[distill]: workers must be at least 0, got -1"),
        ({"distill": {"keep": "x"}}, "[distill]: keep must be a whole number, got 'x'"),
        ({"distill": {"store_k": 4}}, "[distill]: unknown key store_k: --store-k is the key stored_k in a plan"),
        ({"margin": 101, "export": [INT8]}, "[[export]]: --max-drop must be between 0 and 100 points"),
    ],
)
def test_a_plan_that_must_fail_is_refused_at_the_start(
    tmp_path: Path, photos: Path, tables: dict[str, Any], said: str
) -> None:
    assert said in _refused(_plan(tmp_path, photos, **tables))


def test_folders_that_are_in_use(tmp_path: Path, photos: Path) -> None:
    for out, said in (
        (photos, "that of the images"),
        (tmp_path / "run", "the plan's own folder"),
        (tmp_path / "run/student", "the student's"),
    ):
        assert said in _refused(_plan(tmp_path, photos, export=[{"format": "onnx", "out": str(out)}]))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert _refused(_plan(tmp_path, photos, out=str(out))).startswith(f"out: {tmp_path / 'file'} is not a folder")
    assert "is the folder of the images" in _refused(_plan(tmp_path, photos, out=str(photos)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    taken = [{"format": "onnx", "out": str(tmp_path / "mine")}]
    assert "[[export]]: " in (line := _refused(_plan(tmp_path, photos, export=taken))) and "is not empty" in line
    line = _refused(_plan(tmp_path, photos, export=[{"format": "onnx", "out": str(tmp_path / "file/bundle")}]))
    assert line.startswith("[[export]]: ") and "file is not a folder: give --out in another folder" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.html").write_text("mine")
    line = _refused(_plan(tmp_path, photos))
    assert line.startswith("[report]: ") and "report.html exists and is not a robx report" in line


def test_exports_that_differ_in_precision_or_folder_are_no_conflict(tmp_path: Path, photos: Path) -> None:
    exports = [{"format": "onnx"}, INT8, {"format": "ncnn"}, {"format": "onnx", "size": 64, "out": str(tmp_path / "s")}]
    check_plan(Stages(_plan(tmp_path, photos, export=exports)), api.VERBS)


@pytest.mark.parametrize("key", ["data", "out"])
def test_empty_paths_are_not_the_current_folder(key: str) -> None:
    values = {"teacher": "t", "student": "s", "data": "d", "out": "o", "export": [{"format": "onnx"}]}
    with pytest.raises(InputError, match=f"{key} is an empty path"):
        make_plan(values | {key: ""}, where="plan.toml")


@pytest.mark.parametrize(
    "command",
    [
        ["ship", "--teacher", "t", "--student", "s", "--data", "", "--out", "o", "--format", "onnx"],
        ["distill", "--teacher", "ema", "--student", "s", "--data", "d", "--out", ""],
        ["export", "", "--format", "onnx"], ["eval", "r", "--data", ""], ["bench", ""], ["report", "r", "--out", ""],
        ["run", "b", ""], ["inspect", ""], ["demo", "--out", ""],
    ],
)  # fmt: skip
def test_no_command_takes_an_empty_path(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "the path is empty" in result.stderr and result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- stages left out


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Stand-ins for the stages that write next to nothing, and the list of those that were called."""
    called: list[str] = []

    def stand_in(name: str, real: Callable[..., Any]) -> Any:
        @functools.wraps(real)
        def verb(**arguments: Any) -> Any:
            called.append(name)
            folder = arguments.get("out") if name == "distill" else arguments.get("student")
            if name == "export":
                folder = Path(folder) / "onnx-fp32"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "measurements.jsonl").touch()
                (folder.parent / "measurements.jsonl").touch()
            record = SimpleNamespace(precision="fp32", requested="fp32", verdict="PASS", rungs=())
            benched = [SimpleNamespace(values={}, verdict="VALID", reasons=())] * len(arguments.get("bundles", ()))
            return benched if name in ("bench", "eval") else SimpleNamespace(path=Path(folder or "."), record=record)

        return verb

    student = SimpleNamespace(sha256="s", timm_name="test_resnet", images_seen=96)
    bundle = SimpleNamespace(id="b", format="onnx", precision="fp32", bytes=5, verdict="PASS", runtime="onnxruntime")
    monkeypatch.setattr(stages_module, "load_student", lambda _: student)
    monkeypatch.setattr(stages_module, "load_bundle", lambda _: bundle)
    yield {name: stand_in(name, real) for name, real in api.VERBS.items()}, called


def test_without_labels_or_splits_the_accuracy_is_left_out(
    tmp_path: Path, photos: Path, verbs: tuple[dict[str, Any], list[str]]
) -> None:
    said: list[str] = []
    shipped = run_plan(_plan(tmp_path, photos), verbs[0], progress=silent, announce=lambda _: None, say=said.append)
    assert not shipped.failed and verbs[1] == ["distill", "export", "bench", "report"]
    assert said == [
        f"[3/5] Evaluate: left out, as {photos} has no train/ and test/, so the report will have no accuracy "
        "([eval] test names a test set)"
    ]


def test_stages_can_be_switched_off(tmp_path: Path, photos: Path, verbs: tuple[dict[str, Any], list[str]]) -> None:
    plan = _plan(tmp_path, photos, eval=False, bench=False, report=False)
    shipped = run_plan(plan, verbs[0], progress=silent, announce=lambda _: None, say=lambda _: None)
    assert verbs[1] == ["distill", "export"] and shipped.report is None and shipped.to_dict()["report"] is None
    assert read_plan(plan.out / "plan.toml") == plan
    assert _plan(tmp_path, photos, eval=True, bench=True) == _plan(tmp_path, photos)
    assert _plan(tmp_path, photos, bench=[]) == _plan(tmp_path, photos, bench=False)


def test_a_dry_run_after_a_run_measures_nothing_and_says_done(
    tmp_path: Path, photos: Path, verbs: tuple[dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robx.ship import costs

    plan = _plan(tmp_path, photos, distill={"blur_p": [0.0, 0.0, 1.0], "epochs": 2})
    run_plan(plan, verbs[0], progress=silent, announce=lambda _: None, say=lambda _: None)
    monkeypatch.setattr(costs, "estimate", lambda _: pytest.fail("the training step was measured"))
    monkeypatch.setattr(costs, "_forward_seconds", lambda *_: pytest.fail("the student was measured"))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    found = {cost.title: cost.cost for cost in estimate_plan(plan, verbs[0])}
    assert found["distil test_resnet"] == found["export to onnx fp32"] == found["bench on local"] == "done"
    assert found["evaluate"].startswith("left out: ") and found["report"] == "seconds"
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    monkeypatch.setattr(costs, "_distill_cost", lambda *_: costs.StageCost(title="distil", cost="an hour"))
    assert "done" not in {cost.cost for cost in estimate_plan(plan, verbs[0], fresh=True)}


def test_a_plans_margin_goes_to_an_evaluation_that_compares(tmp_path: Path, photos: Path) -> None:
    def arguments(**table: Any) -> dict[str, Any]:
        plan = _plan(tmp_path, photos, margin=2, eval=table)
        entry = next(entry for entry in plan.tables() if entry.stage == "eval")
        return Stages(plan).eval_arguments(entry, [])

    assert arguments(knn=True, fidelity=True)["margin"] == 2
    assert "margin" not in arguments(knn=True)


def test_a_dry_run_asks_the_runner_that_will_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    from robx.ship import costs

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(costs, "examine", lambda _, **how: asked.append(how) or ({}, []))
    costs._missing_there("adb://x", {"runner": "native"}, set())
    assert asked == [{"runner": "native", "python": None}]


# ------------------------------------------------------------------------------------------------------ messages


def test_errors_name_their_table_and_the_keys_of_their_options(tmp_path: Path, photos: Path) -> None:
    plan = _plan(tmp_path, photos, export=[{"format": "onnx"}, {"format": "ncnn"}])
    distill, _, export, *_ = plan.tables()
    with pytest.raises(InputError) as caught, naming_table(distill, api.VERBS):
        raise InputError("too few images: lower --prototypes, give --data or --fresh")
    assert str(caught.value) == (
        "[distill]: too few images: lower --prototypes, give --data or --fresh (--prototypes is the key prototypes of "
        "this table; --data is the key data at the top of the plan; --fresh is robx ship --fresh, which runs every "
        "stage again)"
    )
    with pytest.raises(MissingExtra) as missing, naming_table(export, api.VERBS):
        raise MissingExtra("ncnn", "ncnn", purpose="exporting")
    assert str(missing.value).startswith("[[export]] 2: exporting needs the package ncnn")


def test_another_recipe_for_a_finished_student_is_refused_with_where_force_goes(
    tmp_path: Path, photos: Path, verbs: tuple[dict[str, Any], list[str]]
) -> None:
    @functools.wraps(api.distill)
    def refuse(**_: Any) -> Any:
        compare({"recipe": {"epochs": 2}}, {"recipe": {"epochs": 3}}, run=tmp_path / "run/student")

    own = {**verbs[0], "distill": refuse}
    with pytest.raises(InputError, match=r"recipe\.epochs: 2 -> 3") as caught:
        run_plan(_plan(tmp_path, photos), own, progress=silent, announce=lambda _: None, say=lambda _: None)
    said = str(caught.value)
    assert said.endswith(
        "(--force is force = true in this table; --fresh is robx ship --fresh, which runs every stage again; --out is "
        f"the key out at the top of the plan; the plan that was run is {tmp_path / 'run/plan.toml'})"
    )
    assert said.startswith("[distill]: ") and (tmp_path / "run/plan.toml").is_file()


def test_a_damaged_student_is_told_how_to_be_made_again(
    tmp_path: Path, photos: Path, verbs: tuple[dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> Any:
        raise ArtifactError(f"{folder / 'student.safetensors'} is not the file that was written: create it again")

    monkeypatch.setattr(stages_module, "load_student", damaged)
    with pytest.raises(ArtifactError, match=r"\[distill\]: .* \(robx ship --fresh runs every stage again\)"):
        run_plan(_plan(tmp_path, photos), verbs[0], progress=silent, announce=lambda _: None, say=lambda _: None)
    assert module.STATE in {path.name for path in (tmp_path / "run").iterdir()} or verbs[1] == ["distill"]


def test_a_plan_may_start_with_a_byte_order_mark(tmp_path: Path, photos: Path) -> None:
    plan = _plan(tmp_path, photos)
    (tmp_path / "plan.toml").write_text(plan.to_toml(), encoding="utf-8-sig")
    assert read_plan(tmp_path / "plan.toml") == plan
