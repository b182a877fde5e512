"""A linear head comes from a file that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import save

from robx.errors import InputError
from robx.export.build import ExportSettings, export
from robx.export.request import ExportTarget
from robx.linear_head import load_head
from robx.records import load_student
from robx.runtime.session import open_session

TENSORS = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}


def test_a_head_brings_its_class_names(tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(save(TENSORS, metadata={"classes": json.dumps(["cat", "dog"])}))
    assert load_head(tmp_path / "head").labels == ("cat", "dog")
    (tmp_path / "head").write_bytes(save(TENSORS))
    assert load_head(tmp_path / "head").labels == ("0", "1")


@pytest.mark.parametrize(
    ("classes", "said"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("7", "expected . class names"),
     ('["cat"]', "expected . class names"), ('{"a": 1, "b": 2}', "expected . class names"),
     ("{}", "expected . class names"), ("[]", "expected . class names"), ("[1, 2]", "expected . class names"),
     ("[null, []]", "expected . class names")],
)  # fmt: skip
def test_class_names_that_are_none_are_refused(tmp_path: Path, classes: str, said: str) -> None:
    (tmp_path / "head").write_bytes(save(TENSORS, metadata={"classes": classes}))
    with pytest.raises(InputError, match=said):
        load_head(tmp_path / "head")


def test_other_tensors_other_shapes_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head"
    for data, said in (
        (save({"weight": TENSORS["weight"]}), "expected weight and bias"),
        (save({"weight": TENSORS["weight"], "bias": np.zeros(3, np.float32)}), r"are not \(C, D\) and \(C,\)"),
        (save({"weight": TENSORS["weight"] * np.nan, "bias": TENSORS["bias"]}), "NaN or infinite"),
        (save({"weight": np.zeros((0, 4), np.float32), "bias": np.zeros(0, np.float32)}), r"are not \(C, D\)"),
        (b"text", "is not a safetensors file"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=said):
            load_head(path)
    with path.open("wb") as file:
        file.truncate(2 * 1024**3)
    with pytest.raises(InputError, match="is larger than"):
        load_head(path)


@pytest.mark.parametrize("fmt", ["onnx", "openvino"])
def test_a_bundle_with_a_head_gives_its_logits_to_who_asks_for_labels(
    cnn_run: Path, scene_pixels: np.ndarray, tmp_path: Path, fmt: Literal["onnx", "openvino"]
) -> None:
    random, width = np.random.default_rng(0), load_student(cnn_run).width
    head = {
        "weight": random.normal(size=(3, width)).astype(np.float32),
        "bias": random.normal(size=3).astype(np.float32),
    }
    (tmp_path / "head").write_bytes(save(head, metadata={"classes": '["x", "y", "z"]'}))
    target = ExportTarget(format=fmt)
    export(ExportSettings(run=cnn_run, target=target, out=tmp_path / "bundle", head=tmp_path / "head"))
    with open_session(tmp_path / "bundle") as session:
        embedding = session.run(scene_pixels[:4])
    with open_session(tmp_path / "bundle", labels=True) as session:
        logits = session.run(scene_pixels[:4])
    assert embedding.shape == (4, width)
    np.testing.assert_allclose(logits, embedding @ head["weight"].T + head["bias"], atol=1e-3)
