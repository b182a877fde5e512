"""A linear head comes from a file that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from robx.errors import InputError
from robx.export.to_onnx import load_head

TENSORS = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}


def test_a_head_brings_its_class_names(tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(save(TENSORS, metadata={"classes": json.dumps(["cat", "dog"])}))
    assert load_head(tmp_path / "head").labels == ("cat", "dog")
    (tmp_path / "head").write_bytes(save(TENSORS))
    assert load_head(tmp_path / "head").labels == ("0", "1")


@pytest.mark.parametrize(
    ("classes", "said"),
    [("{", "damaged JSON"), ("[" * 100_000, "damaged JSON"), ("7", "does not name the classes"),
     ('["cat"]', "does not name the classes"), ('{"a": 1, "b": 2}', "does not name the classes")],
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
        (b"text", "is not a safetensors file"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=said):
            load_head(path)
    with path.open("wb") as file:
        file.truncate(2 * 1024**3)
    with pytest.raises(InputError, match="is larger than"):
        load_head(path)
