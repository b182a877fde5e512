"""The whole pipeline through the real commands: distil, evaluate, export, bench, run, report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from robx.cli import main
from robx.images.decode import preprocess
from robx.images.sources import open_source
from robx.records import Accuracy, Fidelity, Latency, load_bundle, load_measurements, load_student
from robx.runtime.session import open_session


@pytest.fixture(scope="module")
def run(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student distilled from a tiny teacher whose weights are a file."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet").state_dict(), root / "teacher.safetensors")
    recipe = root / "recipe.toml"
    recipe.write_text(
        'optimizer = "adamw"\nlr = 0.001\nlr_batch = 16\ncrop_size = 32\nlocal_crops = 0\nprototypes = 8\n'
    )
    _robx(
        *("distill", "--teacher", "timm:test_resnet", "--teacher-weights", str(root / "teacher.safetensors")),
        *("--student", "test_resnet", "--data", str(scene_shards), "--out", str(root / "run"), "--cache", str(root)),
        *("--objective", "msn", "--recipe", str(recipe), "--epochs", "1", "--batch-size", "16", "--workers", "0"),
    )
    return root / "run"


def _robx(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_whole_pipeline(run: Path, scene_shards: Path) -> None:
    data = ("--data", str(scene_shards))
    assert load_student(run).images_seen == 96

    for form in ("onnx", "openvino"):
        _robx("export", str(run), "--format", form, *data)
    bundles = [run / "onnx-fp32", run / "openvino-fp32"]
    assert [load_bundle(b).verdict for b in bundles] == ["PASS", "PASS"]

    names = [str(b) for b in bundles]
    _robx("eval", str(run), *names, *data, "--knn", "--fidelity", "--no-cache")
    top1 = [_of(folder, Accuracy)[0].values["top1"].value for folder in (run, *bundles)]
    assert max(top1) - min(top1) < 3  # one image of 48 may lie on a decision boundary
    assert all(_of(b, Fidelity)[0].values["cosine_min"].value > 0.9999 for b in bundles)

    _robx("bench", *names, "--profile", "rapid", "--processes", "1", "--retries", "0", *data)
    latency = _of(bundles[0], Latency)[0]
    assert latency.verdict != "INVALID" and latency.values["output_cosine_min"].value > 0.9999
    samples = bundles[0] / str(latency.samples)
    assert samples.is_file()

    lines = _robx("run", names[0], str(scene_shards / "test-00000.tar")).splitlines()
    vectors = np.array([json.loads(line)["embedding"] for line in lines])
    assert vectors.shape == (48, load_student(run).width)

    page = run / "report.html"
    _robx("report", str(run), "-o", str(page))
    assert page.is_file() and page.with_suffix(".md").is_file()
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert {(row["format"], row["precision"]) for row in rows} == {
        ("torch", "fp32"),
        ("onnx", "fp32"),
        ("openvino", "fp32"),
    }


def test_an_export_carries_the_head_that_eval_saved(run: Path, scene_shards: Path, tmp_path: Path) -> None:
    data, head, bundle = ("--data", str(scene_shards)), tmp_path / "head.safetensors", tmp_path / "onnx"
    said = _robx("eval", str(run), *data, "--save-head", str(head), "--no-cache", "--json")
    (record,) = [json.loads(line) for line in said.splitlines()]
    assert record["protocol"] == "linear-cached"
    _robx("export", str(run), "--format", "onnx", *data, "--head", str(head), "--out", str(bundle))
    source = open_source(scene_shards, split="test")
    pre, names = load_student(run).preprocessing, source.classes
    pixels = np.stack([preprocess(source.read(i), pre) for i in range(len(source))])
    with open_session(bundle, labels=True) as session:
        logits = session.run(pixels)
    assert names is not None and load_bundle(bundle).labels == names and logits.shape == (48, len(names))
    right = np.mean([source.label(i) == found for i, found in enumerate(logits.argmax(axis=1))])
    assert 100 * right == pytest.approx(
        record["values"]["top1"]["value"], abs=2.1
    )  # one may lie on a decision boundary
    assert right > 1 / len(names)


def _of(folder: Path, kind: type) -> list:  # type: ignore[type-arg]
    return [m for m in load_measurements(folder / "measurements.jsonl") if isinstance(m, kind)]
