"""The operator list of mobile bundles, against the one that ONNX Runtime's own converter writes."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.tools import convert_onnx_models_to_ort as tool

from robx.errors import ArtifactError, MissingExtra
from robx.export.formats.operators import NeededOperator, needed_operators, read_config, to_config


@pytest.fixture(scope="module")
def ort_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised convolution, a matrix product and an If with a subgraph, as .ort with ONNX Runtime's own list."""
    folder = tmp_path_factory.mktemp("ort")
    rng = np.random.default_rng(0)
    kernel, matrix = rng.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8), rng.normal(size=(4, 5)).astype(np.float32)
    branch = helper.make_graph(
        [helper.make_node("Sigmoid", ["m"], ["s"])], "b", [], [helper.make_tensor_value_info("s", 1, [1, 5])]
    )
    other = helper.make_graph(
        [helper.make_node("Softsign", ["m"], ["t"])], "o", [], [helper.make_tensor_value_info("t", 1, [1, 5])]
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("QLinearConv", ["q", "scale", "zero", "k", "scale", "kzero", "scale", "zero"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["p"]),
        helper.make_node("Flatten", ["p"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    constants = {"scale": np.float32(0.1), "zero": np.uint8(3), "kzero": np.int8(0), "k": kernel, "w": matrix}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8]),
            helper.make_tensor_value_info("yes", 9, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(folder / "model.onnx"))
    fixed = [tool.OptimizationStyle.Fixed]
    tool.convert_onnx_models_to_ort(folder / "model.onnx", optimization_styles=fixed, target_platform="arm")
    return folder / "model.ort"


def test_the_list_is_onnx_runtimes_own(ort_model: Path, tmp_path: Path) -> None:
    found = needed_operators(ort_model)
    (tmp_path / "operators.config").write_text(to_config(found, runtime="ONNX Runtime", model_bytes=1))
    own = next(ort_model.parent.glob("*.config"))
    assert read_config(tmp_path / "operators.config") == read_config(own)
    assert {"Sigmoid", "Softsign", "If"} <= {o.name for o in found}


def test_it_counts_constants_and_int8(ort_model: Path) -> None:
    found = {o.name: o for o in needed_operators(ort_model)}
    assert found["QLinearConv"].int8 == 1 and found["QLinearConv"].bytes >= 4 * 3 * 3 * 3
    product = next(o for name, o in found.items() if name in ("MatMul", "Gemm", "FusedMatMul"))
    assert product.int8 == 0 and product.bytes == 4 * 5 * 4
    assert sum(o.bytes for o in found.values()) < ort_model.stat().st_size


def test_a_damaged_file_is_an_artifact_error(ort_model: Path, tmp_path: Path) -> None:
    data, rng = ort_model.read_bytes(), np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(data[: len(data) // (1 + number % 3)])
        for at in rng.integers(0, len(damaged), 8):
            damaged[at] = rng.integers(0, 256)
        (tmp_path / "x.ort").write_bytes(damaged)
        try:
            needed_operators(tmp_path / "x.ort")
        except ArtifactError as error:
            assert "export it again" in str(error)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.tflite").write_bytes(b"\0\0\0\0TFL3")
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(MissingExtra, match="ai-edge-litert"):
        needed_operators(tmp_path / "model.tflite")


def test_the_comments_have_the_sizes() -> None:
    one = NeededOperator(domain="builtin", version=3, name="CONV_2D", count=20, int8=20, bytes=44)
    text = to_config([one], runtime="LiteRT", model_bytes=50)
    assert text.splitlines()[1:] == [
        "# The model file has 50 bytes, 44 of them constants.",
        "# CONV_2D (version 3): 20 times, 44 bytes of constants",
        "builtin;3;CONV_2D",
    ]
