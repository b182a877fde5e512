"""Every key that docs/plan-keys.md and docs/recipe-keys.md list reaches the command of its table.

Two plans have every key of every table, with values that are not the defaults. They are run with the real functions of
``robx.api``; only the work behind them is replaced, by notes of the settings that it gets.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import robx.distill.train
import robx.eval.evaluate
import robx.eval.report.render
import robx.export.build
import robx.export.gate.gate
import robx.records
import robx.runtime.bench.bench
from robx import api
from robx.arguments import described
from robx.cli import main
from robx.distill import recipes
from robx.distill.recipe_toml import read_recipe
from robx.distill.recipes import Recipe
from robx.distill.resolve import resolve_recipe
from robx.distill.training.run import Options
from robx.errors import InputError
from robx.progress import silent
from robx.ship import checks, run, stages
from robx.ship.command_line import command_line
from robx.ship.plan import Entry, Plan, check_keys, make_plan, table_types
from robx.ship.run import run_plan
from robx.ship.stages import RECIPE, Stages

DOCS = Path(__file__).parents[2] / "docs"

RECIPE_KEYS: dict[str, Any] = {
    "objective": "swav", "base": False, "pairing": "swapped", "teacher_temperature": 0.06, "student_temperature": 0.2,
    "head": "mlp", "swav_prototypes": "teacher", "prototypes": 50, "fit_images": 77, "sinkhorn_iterations": 2,
    "sinkhorn_epsilon": 0.06, "queue": 128, "teacher_mean": [0.4, 0.5, 0.6], "teacher_std": [0.2, 0.3, 0.4],
    "teacher_size": 64, "teacher_crops": 1, "prototype_weight": 0.7, "feature_weight": 0.4,
    "feature_projection": "linear", "stage_weight": 0.3, "centering": True, "center_momentum": 0.8, "me_max": 0.6,
    "patch_weight": 0.5, "mask_ratios": [[0.1, 0.05]], "patch_drop": 0.1,
    "ema_momentum": [0.9, 0.95], "teacher_temperature_start": 0.02, "teacher_temperature_epochs": 3,
    "freeze_last_layer_epochs": 2, "freeze_trunk": False,
    "drop_path": 0.15, "quantize": "int8", "student_ema": 0.99,
    "crop_size": 48, "local_crop_size": "32x16", "global_crops": 1, "local_crops": 3, "global_scale": [0.3, 0.9],
    "local_scale": [0.1, 0.2], "color": [0.1, 0.2, 0.3, 0.1], "color_strength": 0.9, "color_p": 0.55, "gray_p": 0.15,
    "flip_p": 0.25, "blur_p": [0.3, 0.4, 0.6], "solarize_p": [0.1, 0.3, 0.2], "mixup": 0.2, "augment": "device",
    "decode": "scaled",
    "optimizer": "sgd", "lr": 0.03, "lr_batch": 96, "warmup_lr": 0.01, "final_lr": 0.002, "warmup_share": 0.07,
    "weight_decay": 0.03, "weight_decay_end": 0.05, "momentum": 0.85, "nesterov": True, "trust": 0.002,
    "clip_grad": 2.5, "epochs": 12, "target_epochs": 4, "batch_size": 24, "accumulate": 2, "precision": "fp32",
    "tf32": True, "seed": 5,
}  # fmt: skip
DISTILL: dict[str, Any] = {
    "image_member": "left.png", "teacher_weights": "w.pth", "init": "pretrained", "recipe": "paper",
    "store_targets": "stored", "cache": "c", "device": "cpu", "workers": 3, "compile": True, "force": True,
    "probe_every": 2, "probe_images": 99, "checkpoint_minutes": 5.5, "checkpoint_steps": 7, "keep": 4,
    "corrupt_budget": 0.5, "log_every": 3, "monitor_every": 9, "measure": False, "tensorboard": True, "stored_k": 16,
}  # fmt: skip
INT8: dict[str, Any] = {
    "format": "onnx", "int8": True, "test": "held-out", "labels": "l.csv", "image_member": "left.png", "out": "bundle",
    "head": "h", "max_drop": 2.5, "min_speedup": 1.5, "opset": 19, "batch": 4, "target": "arm64", "uint8_input": True,
    "resize_in_graph": True, "input_layout": "NHWC", "input_channels": "BGR", "size": [96, 64], "candidates": 3,
    "budget": 60.0, "calibration_images": 30, "judging_images": 100, "heal": 5.5, "sensitivity": True, "force": True,
    "optional": True,
}  # fmt: skip
EVAL: dict[str, Any] = {
    "test": "held-out", "labels": "l.csv", "image_member": "left.png", "knn": True, "linear": True, "lowshot": "1,2",
    "lowshot_splits": "lists", "transfers": ["cifar10=cifar", "folder=mine"], "fidelity": True, "reference": "earlier",
    "margin": 2.5, "cached": True, "save_head": "h", "device": "cuda", "threads": 2, "batch": 8, "cache": "c",
    "no_cache": True,
}  # fmt: skip
BENCH: dict[str, Any] = {
    "device": "ssh://pi@board", "profile": "rapid", "threads": 2, "provider": "cpu", "precision_hint": "f16",
    "processes": 3, "affinity": [0, 2], "batch": 4, "data": "others", "image_member": "left.png", "runner": "python",
    "python": "python3.9", "seed": 5, "retries": 1, "optional": True, "formats": ["onnx"],
}  # fmt: skip
TABLES: dict[str, Any] = {
    "distill": DISTILL | RECIPE_KEYS,
    "export": [INT8, {"format": "ncnn", "fp16": True, "optional": True}],
    "eval": EVAL,
    "bench": [BENCH, {"device": "adb://phone", "emulated": True}],
    "report": {"margin": 3.5, "budgets": [20.0, "pi=30"]},
}
# A base method, whose keys exclude those of a teacher.
BASE: dict[str, Any] = {
    "objective": "dino", "base": True, "freeze_trunk": True, "init": "pretrained", "precision": "bf16", "device": "cpu",
}  # fmt: skip
PLAN_OWN = {"optional", "formats"}  # not for the stage's command
# Keys that the settings of a command call otherwise.
RENAMED = {"export": {"target": "device", "heal": "minutes", "int8": "precision", "fp16": "precision"}}
SAID = {("export", "int8"): "int8", ("export", "fp16"): "fp16"}


def _documented() -> dict[str, set[str]]:
    """The keys of each table, read from the pages."""
    found: dict[str, set[str]] = {}
    for line in (DOCS / "plan-keys.md").read_text().splitlines():
        if heading := re.match(r"## `\[+(\w+)\]+`", line):
            keys = found.setdefault(heading[1], set())
        elif row := re.match(r"\| `(\w+)` \|", line):
            keys.add(row[1])
    found["distill"] |= set(re.findall(r"^\| `(\w+)` \|", (DOCS / "recipe-keys.md").read_text(), flags=re.MULTILINE))
    return found


def _plan(root: Path, **tables: Any) -> Plan:
    top = {
        "teacher": "timm:test_resnet",
        "student": "test_resnet",
        "data": str(root / "images"),
        "out": str(root / "o"),
    }
    return make_plan(top | {"export": [{"format": "onnx"}]} | tables, where="plan.toml")


@pytest.fixture
def got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The settings that the work behind each function of ``robx.api`` gets."""
    seen: dict[str, list[Any]] = {stage: [] for stage in api.VERBS}

    def note(stage: str, result: Any) -> Any:
        def work(settings: Any, **_: Any) -> Any:
            seen[stage].append(settings)
            return result(settings)

        return work

    def render(_: Any, **how: Any) -> Any:
        seen["report"].append(how)

    record = SimpleNamespace(
        sha256="s", id="b", timm_name="test_resnet", images_seen=1, format="onnx", precision="fp32", requested="fp32",
        bytes=5, verdict="PASS", runtime="onnxruntime", reason="",
    )  # fmt: skip
    monkeypatch.setattr(robx.distill.train, "distill", note("distill", lambda settings: [settings.out]))
    monkeypatch.setattr(robx.export.build, "export", note("export", lambda _: record))
    monkeypatch.setattr(robx.eval.evaluate, "evaluate", note("eval", lambda _: []))
    timed = SimpleNamespace(values={}, verdict="VALID", reasons=())
    monkeypatch.setattr(
        robx.runtime.bench.bench, "bench", note("bench", lambda settings: [timed] * len(settings.bundles))
    )
    monkeypatch.setattr(robx.eval.report.render, "render", render)
    for place in (robx.records, stages):
        monkeypatch.setattr(place, "load_student", lambda _: record)
    others = SimpleNamespace(**vars(record) | {"format": "ncnn"})
    monkeypatch.setattr(stages, "load_bundle", lambda folder: record if folder.name == INT8["out"] else others)
    for place in (robx.export.gate.gate, run):
        monkeypatch.setattr(place, "gate_error", lambda *_, **__: None)
    images = SimpleNamespace(fingerprint="f", split=True, labelled=True)
    monkeypatch.setattr(stages.Stages, "images_in", lambda *_: images)
    monkeypatch.setattr(checks, "open_split", lambda *_, **__: SimpleNamespace(bank=None))
    monkeypatch.setattr(checks, "open_data", lambda *_, **__: (None, None))
    for name in ("check_splits", "require_images", "require_places"):
        monkeypatch.setattr(checks, name, lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return seen


def _run(plan: Plan) -> list[str]:
    """Run a plan; returns the lines that it announces."""
    lines: list[str] = []
    shipped = run_plan(plan, api.VERBS, progress=silent, announce=lines.append, say=lines.append)
    assert not (shipped.failed or shipped.skipped), lines
    return lines


def _flat(settings: Any) -> dict[str, Any]:
    """The fields of settings, then those of settings in them, by name; of two with one name the first."""
    if isinstance(settings, Mapping):
        return dict(settings)
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    found = {name: value for name, value in own.items() if not _is_nested(value)}
    for value in filter(_is_nested, own.values()):
        found = _flat(value) | found
    return found


def _is_nested(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, Mapping)


def _plain(value: Any) -> Any:
    return (
        list(map(_plain, value))
        if isinstance(value, list | tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )


def test_every_documented_key_reaches_its_command(tmp_path: Path, got: dict[str, list[Any]]) -> None:
    plan = _plan(tmp_path, **TABLES)
    lines = _run(plan)
    numbers = dict.fromkeys(api.VERBS, 0)
    for stage, table, _, _ in plan.tables():
        reached = _flat(got[stage][numbers[stage]])
        numbers[stage] += 1
        if stage == "distill":
            reached |= _flat(resolve_recipe(got[stage][0])) | {"recipe": _named(reached["recipe"])}
        names = RENAMED.get(stage, {})
        for key in table.keys() - PLAN_OWN:
            wanted = SAID.get((stage, key), table[key])
            assert _plain(reached[names.get(key, key)]) == _plain(wanted), f"{stage} {key}"
    assert [len(settings.bundles) for settings in got["bench"]] == [1, 2]  # `formats` chooses among the exports
    assert "  with probe_images = 99, keep = 4" in "\n".join(lines)
    tried = {stage: set().union(*map(set, _tables(stage))) for stage in api.VERBS}
    assert tried == _documented()


def _tables(stage: str) -> list[dict[str, Any]]:
    table = TABLES[stage]
    return table if isinstance(table, list) else [table]


def _named(file: Path) -> str:
    """The named recipe that a recipe file starts from."""
    return str(read_recipe(file)["like"])


def test_a_base_method_gets_its_own_keys(tmp_path: Path, got: dict[str, list[Any]]) -> None:
    _run(_plan(tmp_path, teacher="ema", distill=BASE))
    recipe = resolve_recipe(got["distill"][0])
    assert recipe.base and recipe.freeze_trunk and recipe.precision == "bf16" and recipe.objective == "dino"


@pytest.mark.parametrize(
    "distill", [DISTILL | RECIPE_KEYS, RECIPE_KEYS, DISTILL, {}, {"measure": False}, {"recipe": "quick"}]
)
def test_the_recipe_file_has_keys_of_the_recipe_alone(
    tmp_path: Path, got: dict[str, list[Any]], distill: dict[str, Any]
) -> None:
    if "quantize" in distill:
        distill = distill | {"init": "pretrained"}
    _run(_plan(tmp_path, distill=distill))
    file = tmp_path / "o" / RECIPE
    written = read_recipe(file) if file.is_file() else {}
    assert written.keys() - {"like"} <= {field.name for field in dataclasses.fields(Recipe)}
    assert file.is_file() == bool(distill.keys() & {"blur_p"})
    assert got["distill"][0].recipe == (
        file if file.is_file() else Path(distill["recipe"]) if distill.get("recipe") else None
    )


def test_a_shown_command_leaves_out_what_it_has_no_option_for(tmp_path: Path, got: dict[str, list[Any]]) -> None:
    lines = _run(_plan(tmp_path, distill={"measure": False, "epochs": 3}))
    assert lines[1].startswith("  $ robx distill ") and lines[1].endswith(" --epochs 3")
    assert lines[2] == "  with measure = false, for which the command has no option"


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"like": "quick"}, '[distill]: unknown key like: like is a line of a recipe file: write recipe = "quick"'),
        (
            {"targets": "stored"},
            "[distill]: targets: stored targets replace the teacher, which every plan has: use robx",
        ),
    ],
)
def test_keys_that_a_plan_does_not_take_say_what_to_do(tmp_path: Path, distill: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_keys(_plan(tmp_path, distill=distill), api.VERBS)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"blur_p": [2, 0, 0]}, "[distill]: recipe: blur_p must be between 0 and 1"),
        ({"lr": "x"}, "[distill]: --lr must be a number, got 'x' (--lr is the key lr of this table)"),
        ({"base": True}, "[distill]: recipe: base = true contradicts --teacher timm:test_resnet (--teacher is the key"),
    ],
)
def test_a_wrong_value_of_a_recipe_key_is_refused_before_anything_is_written(
    tmp_path: Path, got: dict[str, list[Any]], distill: dict[str, Any], said: str
) -> None:
    """In words of the plan: a recipe file that robx would have written is nothing that a user could edit."""
    with pytest.raises(InputError) as caught:
        _run(_plan(tmp_path, distill=distill))
    assert str(caught.value).startswith(said) and not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------ the shown commands


def _values(key: str, kind: Any, default: Any) -> list[Any]:
    """Values at the edges of what a key may take: false, 0, 1, an empty list or text, "none", and its default."""
    words = described(kind)
    edges: list[Any] = []
    if "true or false" in words:
        edges += [True, False]
    if "number" in words and "list" not in words:
        edges += [0, 1]
    if "list" in words:
        edges += [[]]
    if key in recipes._OPTIONAL:
        edges += ["none"]
    elif "a string" in words:
        edges += [""]
    edges += [list(default) if isinstance(default, tuple) else default] * (
        default not in (None, dataclasses.MISSING, inspect.Parameter.empty)
    )
    return [value for place, value in enumerate(edges) if repr(value) not in map(repr, edges[:place])]


def _edge_tables(stage: str) -> Iterator[dict[str, Any]]:
    """A table for each key of a stage and each value at an edge, after those with every key."""
    defaults = {name: one.default for name, one in inspect.signature(api.VERBS[stage]).parameters.items()}
    if stage == "distill":
        defaults |= {one.name: one.default for one in (*dataclasses.fields(Recipe), *dataclasses.fields(Options))}
    needs = {"format": "onnx"} if stage == "export" else {}
    yield from _tables(stage)
    for key, kind in table_types(stage, api.VERBS[stage]).items():
        for value in _values(key, kind, defaults.get(key)):
            yield {**needs, key: value}


@pytest.mark.parametrize("stage", list(api.VERBS))
def test_the_command_line_takes_every_shown_command(tmp_path: Path, got: dict[str, list[Any]], stage: str) -> None:
    command: Any = main.get_command(click.Context(main), stage)
    for table in _edge_tables(stage):
        plan = _plan(tmp_path, **{stage: [table] if stage in ("export", "bench") else table})
        stages = Stages(plan)
        entry = next(entry for entry in plan.tables() if entry.stage == stage)
        command.make_context(stage, shlex.split(command_line(stage, _arguments(stages, entry)))[2:])


def _arguments(stages: Stages, entry: Entry) -> dict[str, Any]:
    """What a run of the plan gives to the function of this stage."""
    models = [stages.student]
    match entry.stage:
        case "export":
            return stages.export_arguments(entry)
        case "eval":
            return stages.eval_arguments(entry, models)
        case "bench":
            return stages.bench_arguments(entry, models)
    return getattr(stages, entry.stage)(entry).arguments  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("distill", "file"),
    [
        ({"quantize": "none"}, 'quantize = "none"\n'),
        ({"quantize": "none", "recipe": "quick", "epochs": 3}, 'like = "quick"\nquantize = "none"\n'),
        ({"teacher_mean": "none", "target_epochs": 0}, 'teacher_mean = "none"\ntarget_epochs = 0\n'),
    ],
)
def test_a_value_that_an_option_does_not_take_is_in_the_recipe_file(
    tmp_path: Path, got: dict[str, list[Any]], distill: dict[str, Any], file: str
) -> None:
    lines = _run(_plan(tmp_path, distill=distill))
    assert (tmp_path / "o" / RECIPE).read_text() == file
    recipe = resolve_recipe(got["distill"][0])
    assert recipe.quantize is None and recipe.teacher_mean is None and not recipe.target_epochs
    assert not {"--quantize", "--teacher-mean", "--target-epochs"} & set(lines[1].split())
