"""The benchmarks fit the code that they measure: each of them imports, and compares what it says."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robx.distill.presets import QUICK
from robx.distill.recipes import override, preset
from robx.records import Rung, Value, to_json
from robx.store.files import write_json
from tests.preloaded import Preloaded

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_every_benchmark_imports(preloaded: Preloaded) -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import importlib, sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in names
    )
    status, _, errors = preloaded.run(["-c", code])
    assert status == 0, errors


@pytest.fixture
def equal_compute(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("equal_compute")


def test_the_comparison_at_equal_compute_runs_the_recipe_quick_itself(equal_compute: Any) -> None:
    given = argparse.Namespace(student="resnet10t", size=64)
    found = equal_compute.recipe_of(equal_compute.methods()["quick"], given, seed=3)
    sizes = {"crop_size": 64, "local_crop_size": 32, "seed": 3, "precision": "bf16"}
    assert override(found, {"epochs": 10}) == override(preset("msn", "cnn"), QUICK | sizes)


def test_the_control_of_that_comparison_differs_only_by_the_prototypes(equal_compute: Any) -> None:
    prototypes, control = (equal_compute.methods()[name].keys for name in ("prototypes", "control"))
    changed = {key for key in prototypes if prototypes[key] != control[key]}
    assert changed == {"fit_images"} and set(control) - set(prototypes) == {"prototype_weight"}


def test_leave_one_out_asks_all_other_images_and_never_the_image_itself(equal_compute: Any) -> None:
    judged = importlib.import_module("judged")
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(60, 8)).astype(np.float32), rng.integers(0, 3, 60)
    rows[41] = rows[7]  # a duplicate counts as another image
    parts = [
        judged.Features(features=rows[part], labels=labels[part], indices=np.arange(60)[part], skipped=0)
        for part in (slice(40), slice(40, None))
    ]
    expected = []
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for own in range(60):
        cosines = unit @ unit[own]
        others = sorted((i for i in range(60) if i != own), key=lambda i: -cosines[i])[: judged.NEIGHBOURS]
        votes = [sum(np.exp(cosines[i] / 0.07) for i in others if labels[i] == c) for c in range(3)]
        expected.append(int(np.argmax(votes)) == labels[own])
    assert judged._leave_one_out(*parts).tolist() == expected


def test_differences_are_paired_by_seed_and_image(equal_compute: Any) -> None:
    """Two methods whose hits differ on every image by the same amount have an interval of no width."""
    hits = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    same = equal_compute.difference(hits + 0.25, hits)
    assert (same.value, same.low, same.high) == (25.0, 25.0, 25.0)
    other = equal_compute.difference(np.random.default_rng(1).integers(0, 2, (3, 50)), hits)
    assert other.low < other.value < other.high and other.high - other.low > 10


def test_the_published_table_can_be_continued_without_its_runs(
    equal_compute: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Written from its own JSON, the table is the same: figures, and intervals from the answers kept in it."""
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    monkeypatch.setattr(equal_compute, "RESULTS", tmp_path)
    known, rng = equal_compute.methods(), np.random.default_rng(0)
    compared = equal_compute.COMPARED
    for name in ("quick", "control"):
        for seed in range(2):
            hits = {what: rng.integers(0, 2, 101).astype(float).tolist() for what in compared}
            facts = {"method": name, "seed": seed, "minutes": 2.0, "cpu_seconds": 1.0, "images": 3}
            folder = tmp_path / "efficientnet_lite0-resnet10t" / name / f"2min-{seed}"
            write_json(folder / "result.json", {**facts, "hits": {**hits, "5-shot, clip art": [0.25, 0.7]}})
    options = ["--methods", "quick", "control", "--budgets", "2", "--seeds", "2", "--finished", "--name", "table"]
    pages = []
    for more in (["--out", str(tmp_path)], ["--out", str(tmp_path / "nothing"), "--published"]):
        monkeypatch.setattr("sys.argv", ["equal_compute.py", *options, *more])
        given = equal_compute.arguments(known)
        runs = [equal_compute.finished(name, seed, 2.0, given) for seed in range(2) for name in ("quick", "control")]
        equal_compute.write_down(runs, known, given)
        pages.append([line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")])
    assert pages[0] == pages[1] and "47.5" in pages[0][3] and "[" in pages[0][3]
    assert "4 of the runs are those of an earlier version of this table." in (tmp_path / "table.md").read_text()


@pytest.fixture
def export_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("export_page")


def _row(ships: str, cosine: float, rungs: list[dict[str, Any]]) -> dict[str, Any]:
    values = {"cosine_mean": Value(value=cosine)}
    return {
        "student": "net", "engine": "onnx", "variant": "robx int8", "ships": ships, "rungs": rungs, "values": values,
        "latency_ratio": None,
    }  # fmt: skip


def test_a_row_without_int8_names_its_best_judged_candidate(export_page: Any) -> None:
    drop = to_json(Value(value=1.5, low=0.5, high=2.5))
    screened = {"cosine_mean": {"value": 0.999}, "probe_drop": drop, "screened": {"value": 400}}
    judged = {"cosine_mean": {"value": 0.93}, "probe_drop": drop}
    rungs = [
        {"name": name, "precision": "int8", "accuracy": "INCONCLUSIVE", "values": values}
        for name, values in (("a", screened), ("b", judged), ("c", {}))
    ]
    (said,) = export_page._refusals([_row("fp32", 1.0, rungs), _row("int8", 0.98, [])])
    assert said == (
        "net, ONNX Runtime, robx int8 ships fp32: the best of 2 was b, INCONCLUSIVE with a centred cosine of 0.9300 "
        "and a probe drop of 1.5 [0.5, 2.5] on the judged images."
    )
    (said,) = export_page._refusals([_row("fp16", 1.0, [])])
    assert said.endswith("none could be run.")


def test_int8_below_the_aimed_cosine_is_listed(export_page: Any) -> None:
    rows = [_row("int8", 0.98, []), _row("int8", 0.995, []), _row("fp32", 0.5, [])]
    (said,) = export_page._short_of_aim(rows)
    assert said == "Int8 that ships with a centred cosine below 0.99: net, ONNX Runtime, robx int8 0.9800."
    assert export_page._short_of_aim(rows[1:]) == []


def test_healing_is_shown_beside_what_ships_and_an_unjudged_candidate_is_not_said_to(
    export_page: Any,  # which puts the benchmarks on the path
) -> None:
    heal = importlib.import_module("heal")

    def rung(name: str, cosine: float, **values: Any) -> Rung:
        settings: dict[str, Any] = {"healed": True} if name.endswith("healed") else {}
        kept = values.pop("kept", False)
        measured = {"cosine_mean": Value(value=cosine)} | {key: Value(value=value) for key, value in values.items()}
        return Rung(
            name=name, settings=settings, precision="int8", accuracy="PASS" if kept else "INCONCLUSIVE", speed="PASS",
            values=measured, reason="why", kept=kept,
        )  # fmt: skip

    ships, closer = rung("a", 0.98, kept=True), rung("a, healed", 0.99, screened=366)
    bundle = argparse.Namespace(rungs=(ships, rung("b", 0.97), closer), healing=None, reason="")
    (own,) = heal._rows("onnx", bundle, healed=False, minutes=1.0)
    assert own[1:4] == ["own", "a: ships", "0.9800"] and own[7] == "judging"
    healed, shipped = heal._rows("onnx", bundle, healed=True, minutes=1.0)
    assert healed[1:4] == ["healed", "a, healed: not judged", "0.9900"] and healed[7] == "screening"
    assert shipped[:9] == own[:9]
    failed = argparse.Namespace(rungs=(rung("b", 0.97),), healing=None, reason="the weights were not healed")
    assert heal._rows("onnx", failed, healed=True, minutes=1.0)[0][2] == "none: the weights were not healed"


@pytest.mark.parametrize("rows", [[{"method": "quick", "seed": 0, "minutes": 2.0}], "damaged", None])
def test_a_published_table_without_answers_is_refused_in_one_line(
    equal_compute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: Any
) -> None:
    monkeypatch.setattr(equal_compute, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["equal_compute.py", "--published", "--name", "old"])
    if rows is not None:
        write_json(tmp_path / "old.json", {"rows": rows})
    with pytest.raises(SystemExit) as stopped:
        equal_compute.arguments(equal_compute.methods())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "--published: " in said and "old.json" in said
