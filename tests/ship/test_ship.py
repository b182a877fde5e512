"""`robx ship`: plans, the commands they stand for, what is reused, and what happens when a stage fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from robx import api
from robx.cli import main
from robx.distill.recipe_toml import read_recipe
from robx.distill.resolve import recipe_values
from robx.errors import InputError, RobxError
from robx.eval.evaluate import EvalSettings
from robx.progress import silent
from robx.records import SUPERSEDED, load_bundle, load_measurements, load_student
from robx.runtime.bench.profiles import PROFILES
from robx.ship import stages as module
from robx.ship.command_line import command_line
from robx.ship.plan import Plan, check_keys, make_plan, read_plan
from robx.ship.run import Shipped, _latency, run_plan
from robx.store.toml import read_toml, toml_value

SMALL = {
    "epochs": 1, "batch_size": 16, "crop_size": 32, "local_crops": 0, "prototypes": 8, "workers": 0,
    "objective": "msn", "optimizer": "adamw", "lr": 0.001,
}  # fmt: skip


def _values(root: Path, data: Path, **more: Any) -> dict[str, Any]:
    weights = root / "teacher.safetensors"
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    return {
        "teacher": "timm:test_resnet",
        "student": "test_resnet",
        "data": str(data),
        "out": str(root / "run"),
        "distill": {**SMALL, "teacher_weights": str(weights), "cache": str(root / "cache")},
        "export": [{"format": "onnx"}],
        "bench": [{"profile": "rapid", "processes": 1, "retries": 0}],
        **more,
    }


def _write(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(make_plan(values, where="test").to_toml())
    return path


def _ship(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["ship", *map(str, arguments)], catch_exceptions=False)


# ------------------------------------------------------------------------------------------------ the whole way


def test_a_plan_runs_from_teacher_to_report_and_a_second_run_reuses_everything(
    tmp_path: Path, scene_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "rapid", replace(PROFILES["rapid"], seconds=0.2, warm_up_limit=0.3))
    exports = [{"format": "onnx"}, {"format": "trt", "fp16": True, "target": "rtx:none", "optional": True}]
    plan = _write(tmp_path / "plan.toml", _values(tmp_path, scene_shards, export=exports))
    first = _ship(plan)
    assert first.exit_code == 0, first.stderr
    run = tmp_path / "run"
    assert load_student(run / "student").images_seen == 96
    assert load_bundle(run / "student/onnx-fp32").verdict == "PASS"
    kinds = {type(one).__name__ for one in load_measurements(run / "student/onnx-fp32/measurements.jsonl")}
    assert kinds == {"Accuracy", "Fidelity", "Latency"}
    assert (run / "report.html").is_file() and "onnx fp32" in first.stdout
    assert "[6/6] Write the report" in first.stderr and "skipped: " in first.stderr
    assert read_plan(run / "plan.toml") == read_plan(plan)

    before = (run / "student/student.safetensors").stat().st_mtime_ns
    second = _ship(run / "plan.toml", "--json")
    assert second.exit_code == 0
    assert second.stderr.count("done earlier, with the same inputs") == 4  # all but the report and what was skipped
    assert json.loads(second.stdout)["bundles"] == [str(run / "student/onnx-fp32")]
    assert (run / "student/student.safetensors").stat().st_mtime_ns == before

    # Every line that was shown is a command that exists, with the arguments of the stage.
    shown = [line.strip()[2:] for line in first.stderr.splitlines() if line.strip().startswith("$ robx ")]
    assert [line.split()[1] for line in shown] == ["distill", "export", "export", "eval", "bench", "report"]
    for line in shown:
        _parse(line)


def _parse(line: str) -> dict[str, Any]:
    """The parameters that click reads from a shown command."""
    import shlex

    words = shlex.split(line.replace(" ~/", f" {Path.home()}/"))
    assert words[0] == "robx"
    command = main.get_command(click.Context(main), words[1])
    assert command is not None
    return command.make_context(words[1], words[2:]).params


def test_shown_commands_are_read_back_to_the_same_arguments() -> None:
    line = command_line("export", {
        "student": Path("r"), "format": "onnx", "data": Path("a b"), "int8": True, "force": False, "max_drop": 4.0,
        "candidates": 3, "size": (160, 96), "batch": 2, "budget": None,
    })  # fmt: skip
    read = _parse(line)
    wanted = {"run": Path("r"), "fmt": "onnx", "data": Path("a b"), "int8": True, "force": False, "rungs": 3}
    assert wanted.items() <= read.items() and read["size"] == "160x96" and read["batch"] == "2"
    sizes = {"crop_size": (160, 96), "local_crop_size": "64x48"}
    read = _parse(command_line("distill", {"student": "s", "teacher_mean": (0.1, 0.2, 0.3), "fresh": True, **sizes}))
    assert read["crop_size"] == "160x96" and read["local_crop_size"] == "64x48"
    assert read["resume"] is False and read["teacher_mean"] == (0.1, 0.2, 0.3) and read["student"] == ("s",)
    read = _parse(command_line("bench", {"bundles": [Path("a"), Path("b")], "affinity": (0, 2), "retries": 0}))
    assert read["bundles"] == (Path("a"), Path("b")) and read["affinity"] == "0,2" and read["retries"] == 0
    read = _parse(command_line("eval", {"models": [Path("a")], "transfers": ("x=y", "z"), "knn": True}))
    assert read["transfers"] == ("x=y", "z") and read["knn"] is True
    read = _parse(command_line("report", {"folders": [Path("a")], "budgets": (10.0, 33.0), "out": Path("p.html")}))
    assert read["budgets"] == ("10.0", "33.0") and read["out"] == Path("p.html")


# -------------------------------------------------------------------------------------------------- what is reused


class Verbs(dict[str, Any]):
    """Stand-ins for the stages: each writes what the next one reads, and notes its call."""

    def __init__(self, *, refuse: str = "", fail: str = "", full: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuse, self.fail, self.full = refuse, fail, full
        super().__init__({name: self._verb(name) for name in api.VERBS})

    def _verb(self, name: str) -> Any:
        import functools

        @functools.wraps(api.VERBS[name])
        def verb(*given: Any, **arguments: Any) -> Any:
            arguments.pop("progress", None)
            self.calls.append((name, arguments))
            if self.fail == name or self.fail == arguments.get("format"):
                cause = OSError(errno.ENOSPC, "No space left on device") if self.full else None
                raise InputError(f"{self.fail} broke") from cause
            return getattr(self, f"_{name}", lambda _: [])(arguments)

        return verb

    def _distill(self, arguments: dict[str, Any]) -> Any:
        return SimpleNamespace(path=Path(arguments["out"]), record=None)

    def _export(self, arguments: dict[str, Any]) -> Any:
        kind = "int8" if arguments.get("int8") and self.refuse != arguments["format"] else "fp32"
        folder = Path(arguments["student"]) / f"{arguments['format']}-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "measurements.jsonl").touch()
        (Path(arguments["student"]) / "measurements.jsonl").touch()
        bundle = SimpleNamespace(
            precision=kind, requested="int8" if arguments.get("int8") else "fp32", verdict="PASS", rungs=()
        )
        return SimpleNamespace(path=folder, record=bundle)

    def _bench(self, arguments: dict[str, Any]) -> Any:
        verdict = "INVALID" if self.refuse == "bench" else "VALID"
        return [SimpleNamespace(values={}, verdict=verdict, reasons=("wrong_output: x",)) for _ in arguments["bundles"]]

    @property
    def names(self) -> list[str]:
        names = [name for name, _ in self.calls]
        self.calls.clear()
        return names


@pytest.fixture
def plan(tmp_path: Path, scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan whose students and bundles are folders without records."""
    student = SimpleNamespace(sha256="s", timm_name="test_resnet", images_seen=96)
    monkeypatch.setattr(module, "load_student", lambda folder: student)

    def bundle(folder: Path) -> Any:
        if not folder.is_dir():
            raise InputError("no bundle")
        form, precision = folder.name.split("-")
        return SimpleNamespace(
            id=folder.name, format=form, precision=precision, bytes=5, verdict="PASS", runtime="onnxruntime"
        )

    monkeypatch.setattr(module, "load_bundle", bundle)
    exports = [{"format": "onnx"}, {"format": "openvino", "int8": True, "calibration_images": 30}]
    return make_plan(_values(tmp_path, scene_shards, export=exports), where="test")


def _run(plan: Plan, verbs: Verbs, *, fresh: bool = False) -> Shipped:
    return run_plan(plan, verbs, fresh=fresh, progress=silent, announce=lambda _: None, say=lambda _: None)


def test_stages_are_announced_and_failures_are_said(plan: Plan) -> None:
    """--quiet hides what is announced."""
    announced, said = list[str](), list[str]()
    run_plan(plan, Verbs(fail="openvino"), progress=silent, announce=announced.append, say=said.append)
    assert announced[0].startswith("[1/6] Distil ") and announced[1].startswith("  $ robx distill ")
    assert said == ["  FAILED: [[export]] 2: openvino broke"]
    assert not any("FAILED" in line for line in announced)


def test_a_student_is_evaluated_where_none_of_its_exports_runs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison without a bundle would be refused, and the kNN accuracy lost with it."""
    monkeypatch.setattr(module, "_runs_here", lambda folder: False)
    verbs, said = Verbs(), list[str]()
    shipped = run_plan(plan, verbs, progress=silent, announce=lambda _: None, say=said.append)
    (arguments,) = [arguments for name, arguments in verbs.calls if name == "eval"]
    assert arguments == {"models": [plan.out / "student"], "data": plan.data, "knn": True} and not shipped.failed
    assert said[0].endswith("Compare the exports with the student: left out, as this machine can run none of them")
    EvalSettings.of(**arguments)


ALL = ["distill", "export", "export", "eval", "bench", "report"]


@pytest.mark.parametrize("own", [True, False])
def test_a_plan_may_start_from_a_recipe_by_name_or_from_a_file(plan: Plan, tmp_path: Path, own: bool) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('like = "quick"\nblur_p = [0, 0, 1]\n')
    verbs = Verbs()
    _run(plan.with_distill(recipe=str(file) if own else "quick", color_p=0.5), verbs)
    given = dict(verbs.calls[0][1])
    written = read_recipe(given["recipe"])
    assert written["like"] == "quick" and written["color_p"] == 0.5 and ("blur_p" in written) == own
    name, values = recipe_values(given["recipe"], "cnn")
    assert name == "quick" and values["stage_weight"] == 1 and values["color_p"] == 0.5


def test_only_what_depends_on_a_change_runs_again(plan: Plan, tmp_path: Path) -> None:
    verbs = Verbs()
    _run(plan, verbs)
    assert verbs.names == ALL
    _run(plan, verbs)
    assert verbs.names == ["report"]
    _run(plan, verbs, fresh=True)
    assert verbs.names == ALL
    # Another margin changes the int8 gate, the comparison and the report; nothing is distilled again.
    other = make_plan({**_toml(plan), "margin": 2}, where="test")
    _run(other, verbs)
    assert verbs.names == ["export", "eval", "report"]
    (tmp_path / "run/student/openvino-int8/measurements.jsonl").unlink()
    _run(other, verbs)
    assert verbs.names == ["eval", "bench", "report"]
    (tmp_path / "run/student/openvino-int8/measurements.jsonl").touch()
    _run(other.with_distill(epochs=2), verbs)
    assert verbs.names == ["distill", "report"]  # the stand-in makes the same student again


def test_an_export_runs_again_where_a_later_one_in_its_place_was_refused(plan: Plan, tmp_path: Path) -> None:
    verbs = Verbs()
    _run(plan, verbs)
    verbs.calls.clear()
    (tmp_path / "run/student/openvino-int8" / SUPERSEDED).touch()
    _run(plan, verbs)
    assert verbs.calls[0][1]["format"] == "openvino" and verbs.names == ["export", "report"]


def test_changed_images_run_everything_again(plan: Plan, tmp_path: Path, scene_shards: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(scene_shards, data)
    moved = make_plan({**_toml(plan), "data": str(data)}, where="test")
    verbs = Verbs()
    _run(moved, verbs)
    verbs.calls.clear()
    shutil.copy(data / "test-00000.tar", data / "train-99999.tar")
    _run(moved, verbs)
    assert verbs.names == ALL


def test_a_weights_file_that_changed_distils_again(plan: Plan, tmp_path: Path) -> None:
    verbs = Verbs()
    _run(plan, verbs)
    verbs.calls.clear()
    (tmp_path / "teacher.safetensors").write_bytes(b"other")
    _run(plan, verbs)
    assert verbs.names == ["distill", "report"]


def test_an_earlier_run_to_start_from_that_was_trained_again_distils_again(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/student.json").write_text('{"sha256": "1"}')
    started = plan.with_distill(init=str(tmp_path / "earlier"))
    verbs = Verbs()
    _run(started, verbs)
    verbs.calls.clear()
    (tmp_path / "earlier/measurements.jsonl").touch()
    _run(started, verbs)
    assert verbs.names == ["report"]
    verbs.calls.clear()
    (tmp_path / "earlier/student.json").write_text('{"sha256": "2"}')
    _run(started, verbs)
    assert verbs.names == ["distill", "report"]


def test_the_evaluation_follows_its_transfer_sets_and_writes_a_lost_head_again(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar/data.bin").write_bytes(b"one")
    head = tmp_path / "head.safetensors"
    table = {"knn": True, "transfers": [f"cifar10={tmp_path / 'cifar'}"], "save_head": str(head)}
    wider = make_plan({**_toml(plan), "eval": table, "export": [{"format": "onnx"}]}, where="test")
    verbs = Verbs()
    verbs._eval = lambda arguments: Path(arguments["save_head"]).write_bytes(b"head") and []  # type: ignore[attr-defined]
    _run(wider, verbs)
    verbs.calls.clear()
    _run(wider, verbs)
    assert verbs.names == ["report"], "the head is written by the stage, not read"
    head.unlink()
    _run(wider, verbs)
    assert verbs.names == ["eval", "report"] and head.is_file()
    (tmp_path / "cifar/data.bin").write_bytes(b"other")
    _run(wider, verbs)
    assert verbs.names == ["eval", "report"]


def test_a_stage_that_fails_does_not_stop_the_others(plan: Plan) -> None:
    verbs = Verbs(fail="openvino")
    shipped = _run(plan, verbs)
    assert verbs.names == ALL and shipped.failed == ("[[export]] 2: openvino broke",)
    assert [folder.name for folder in shipped.bundles] == ["onnx-fp32"]
    verbs.fail = ""
    assert _run(plan, verbs).failed == ()
    assert verbs.names == ["export", "eval", "bench", "report"]  # the failed stage, and those that read its bundle
    with pytest.raises(RobxError, match="distill broke"):
        _run(plan.with_distill(epochs=9), Verbs(fail="distill"))


@pytest.mark.parametrize("stage", ["distill", "openvino", "eval", "bench", "report"])
def test_a_full_disk_in_any_stage_ends_the_plan_with_status_1(
    stage: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed export or measurement may be optional; what comes after a full disk would fail too."""
    exports = [{"format": "onnx"}, {"format": "openvino", "optional": True}]
    values = {**_toml(plan), "export": exports}
    verbs = Verbs(fail=stage, full=True)
    monkeypatch.setattr(api, "VERBS", verbs)
    result = _ship(_write(tmp_path / "plan.toml", values))
    assert result.exit_code == 1, result.stderr
    said = [line for line in result.stderr.splitlines() if f"{stage} broke" in line]
    assert len(said) == 1 and said[0].startswith("robx: [") and "FAILED" not in result.stderr
    done = ALL[: 3 if stage == "openvino" else ALL.index(stage) + 1]
    assert verbs.names == done
    verbs.fail = ""
    shipped = _run(make_plan(values, where="test"), verbs)
    assert not shipped.failed and not shipped.skipped and verbs.names == ALL[len(done) - 1 :]


def test_gates_that_refuse_are_remembered_by_a_run_that_skips_them(plan: Plan) -> None:
    verbs = Verbs(refuse="openvino")
    for _ in range(2):
        shipped = _run(plan, verbs)
        assert len(shipped.refused) == 1 and "no int8 candidate passed the gate" in shipped.refused[0]
        assert (
            shipped.refused[0].startswith("[[export]] 2: ") and "is the key target of this table" in shipped.refused[0]
        )
        assert [folder.name for folder in shipped.bundles] == ["onnx-fp32", "openvino-fp32"]
    wrong = _run(plan, Verbs(refuse="bench"), fresh=True).refused
    assert len(wrong) == 2 and "wrong_output" in wrong[0]


def test_formats_choose_the_bundles_of_a_device(plan: Plan) -> None:
    benches = [{"device": "ssh://pi@pi", "formats": ["openvino"]}, {"device": "adb://x", "formats": "onnx"}]
    verbs = Verbs()
    _run(make_plan({**_toml(plan), "bench": benches}, where="test"), verbs)
    benched = [arguments for name, arguments in verbs.calls if name == "bench"]
    assert [[folder.name for folder in one["bundles"]] for one in benched] == [["openvino-int8"], ["onnx-fp32"]]
    assert "formats" not in benched[0]


def _toml(plan: Plan) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(plan.to_toml())


# ---------------------------------------------------------------------------------------------------- bad plans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"studnet": "x"}, "unknown key studnet: did you mean student"),
        ({"student": 3}, "student must be a string, got 3"),
        ({"margin": True}, "margin must be a number"),
        ({"margin": float("nan")}, "margin must be a number of points"),
        ({"export": {"format": "onnx"}}, r"write \[\[export\]\]"),
        ({"export": []}, "the plan has no export"),
        ({"distill": [1]}, r"write \[distill\]"),
        ({"export": [{"int8": True}]}, "has no format"),
        ({"export": [{"format": "onnx", "quantise": True}]}, r"\[\[export\]\]: unknown key quantise"),
        ({"distill": {"epoch": 3}}, r"\[distill\]: unknown key epoch: did you mean epochs"),
        ({"distill": {"out": "x"}}, "sets it from its top level"),
        ({"distill": {"epochs": {"a": 1}}}, "is not a string, a number, true or false"),
        ({"eval": {"models": ["x"]}}, "sets it from its top level"),
        ({"bench": [{"devise": "x"}]}, r"\[\[bench\]\]: unknown key devise: did you mean device"),
        ({"report": {"folders": ["x"]}}, "sets it from its top level"),
        ({"data": "a\nb"}, "cannot be printed"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(tmp_path: Path, scene_shards: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_keys(make_plan({**_values(tmp_path, scene_shards), **change}, where="plan.toml"), api.VERBS)
    assert "\n" not in str(caught.value)


def test_missing_keys_files_and_contradicting_options(tmp_path: Path, scene_shards: Path) -> None:
    with pytest.raises(InputError, match=r"plan: student, data, out, export missing: add them"):
        make_plan({"teacher": "x"}, where="plan")
    assert "cannot be read" in _ship(tmp_path / "none.toml").stderr
    (tmp_path / "bad.toml").write_text("a = ")
    assert "not valid TOML" in _ship(tmp_path / "bad.toml").stderr
    plan = _write(tmp_path / "plan.toml", _values(tmp_path, scene_shards))
    result = _ship(plan, "--int8")
    assert result.exit_code == 2 and "lists exports, devices and budgets" in result.stderr
    assert "give --format NAME, or a PLAN" in _ship("--teacher", "x").stderr
    own = {"export": [{"format": "onnx"}, {"format": "ort", "max_drop": 2}], "report": {"margin": 3}}
    plan = _write(tmp_path / "own.toml", _values(tmp_path, scene_shards, **own))
    result = _ship(plan, "--margin", "2", "--dry-run")
    assert result.exit_code == 2 and f"--margin: [[export]] 2, [report] of {plan} has its own" in result.stderr


def test_files_that_robx_did_not_write_are_kept(tmp_path: Path, scene_shards: Path) -> None:
    plan = _write(tmp_path / "plan.toml", _values(tmp_path, scene_shards))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ship.json").write_text("mine")
    result = _ship(plan)
    assert result.exit_code == 2 and "was not written by robx" in result.stderr
    assert (tmp_path / "run/ship.json").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- options and costs


def test_options_make_the_same_plan_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Plan] = []
    monkeypatch.setattr("robx.ship.commands.run_and_show", lambda plan, **_: seen.append(plan) or Shipped(
        student=Path(), bundles=(), report=Path(), refused=("refused",)
    ))  # fmt: skip
    result = _ship(
        *("--teacher", "t", "--student", "s", "--data", "d", "--out", "o", "--format", "onnx", "--format", "ncnn"),
        *("--int8", "--device", "local", "--device", "adb://x", "--budget-ms", "20", "--margin", "2", "--epochs", "7"),
    )
    assert result.exit_code == 3 and result.stderr == "robx: refused\n"
    assert seen[0] == Plan(
        teacher="t",
        student="s",
        data=Path("d"),
        out=Path("o"),
        margin=2.0,
        distill={"epochs": 7},
        export=(
            {"format": "onnx"},
            {"format": "onnx", "int8": True},
            {"format": "ncnn"},
            {"format": "ncnn", "int8": True},
        ),
        bench=({"device": "local"}, {"device": "adb://x"}),
        report={"budgets": [20.0]},
    )


def test_a_dry_run_says_costs_and_what_is_missing_and_writes_nothing(
    tmp_path: Path, scene_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robx.ship.costs._FORWARD_SECONDS", 0.01)
    exports = [{"format": "onnx", "int8": True, "calibration_images": 30}, {"format": "executorch", "optional": True}]
    benches = [{"profile": "standard"}, {"device": "ssh://nobody@127.0.0.1:9", "formats": ["onnx"]}]
    plan = _write(tmp_path / "plan.toml", _values(tmp_path, scene_shards, export=exports, bench=benches))
    before = sorted(tmp_path.rglob("*"))
    result = _ship(plan, "--dry-run", "--json")
    assert result.exit_code == 2 and "bench on ssh://nobody@127.0.0.1:9" in result.stderr
    costs = {one["title"]: one for one in json.loads(result.stdout)}
    assert "6 steps" in costs["distil test_resnet"]["cost"]
    assert "for each candidate" in costs["export to onnx int8"]["cost"] and not costs["export to onnx int8"]["missing"]
    assert costs["export to executorch fp32"]["missing"] == "pip install 'robx[executorch]'"
    assert costs["evaluate"]["cost"].endswith("(3 models x 144 images)")
    # 60 s and five processes that warm up for a second, for each of two bundles.
    assert costs["bench on local"]["cost"] == "at least 2 minutes (2 bundles, profile standard)"
    assert sorted(tmp_path.rglob("*")) == before


# -------------------------------------------------------------------------------------------------------- TOML


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3),
))  # fmt: skip
def test_values_survive_toml(value: Any) -> None:
    import math
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        path.write_text(f"x = {toml_value(value)}\n", encoding="utf-8", newline="")
        found = read_toml(path, what="x")["x"]
    if isinstance(value, float) and math.isnan(value):
        assert math.isnan(found)
    elif "nan" not in repr(value):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("verdict", "shown"), [("INCONCLUSIVE", True), ("PASS", False)])
def test_the_line_of_a_bundle_gives_the_reason_of_a_verdict_that_did_not_pass(
    verdict: Any, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(Path(__file__).parents[1] / "golden" / "bundle-1")
    judged = replace(bundle, verdict=verdict, reason="the interval is too wide")
    monkeypatch.setattr(module, "load_bundle", lambda _: judged)
    said = module.bundle_result(Path("b"))["said"]
    assert said.endswith(f": {verdict} (the interval is too wide)" if shown else f": {verdict}")


def test_the_line_of_a_latency_gives_the_reasons_of_an_unstable_one() -> None:
    record: Any = SimpleNamespace(values={}, verdict="UNSTABLE", reasons=("background_load: 80 % of a core",))
    assert _latency(Path("b"), record) == "b UNSTABLE (background_load: 80 % of a core)"
