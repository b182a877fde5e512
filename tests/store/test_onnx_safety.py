"""External data is refused in every place of an ONNX file that can hold a tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from robx.errors import ArtifactError, InputError
from robx.store.onnx_safety import check_model, load_checked, walk_tensors


def _tensor(name: str, location: str | None) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), name)
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
    return tensor


def _model(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _place(where: str, location: str) -> onnx.ModelProto:
    add = helper.make_node("Add", ["x", "w"], ["y"], name="add")
    bad = _tensor("bad", location)
    if where == "initializer":
        return _model([helper.make_node("Add", ["x", "bad"], ["y"])], [bad])
    if where == "attribute":
        return _model([helper.make_node("Constant", [], ["w"], value=bad), add], [])
    model = _model([add], [_tensor("w", None)])
    if where == "sparse initializer":
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(bad)
        sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4), "i"))
        sparse.dims.extend([4])
    elif where == "sparse attribute":
        attribute = AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
        attribute.sparse_tensor.values.CopyFrom(bad)
        node = helper.make_node("Constant", [], ["unused"])
        node.attribute.append(attribute)
        model.graph.node.insert(0, node)
    elif where == "tensor list":
        attribute = AttributeProto(name="values", type=AttributeProto.TENSORS)
        attribute.tensors.append(bad)
        model.graph.node[0].attribute.append(attribute)
    elif where == "subgraph":
        inner = helper.make_graph([helper.make_node("Identity", ["bad"], ["o"])], "inner", [], [], [bad])
        model.graph.node[0].attribute.append(helper.make_attribute("body", inner))
    elif where == "function":
        constant = helper.make_node("Constant", [], ["o"], value=bad)
        model.functions.append(helper.make_function("own", "F", [], ["o"], [constant], [helper.make_opsetid("", 20)]))
    elif where == "training":
        model.training_info.add().initialization.initializer.append(bad)
    return model


PLACES = [
    "initializer", "attribute", "sparse initializer", "sparse attribute", "tensor list", "subgraph", "function",
    "training",
]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("location", ["/etc/hostname", "../secret.bin", "secret.bin"])
def test_external_data_is_refused_wherever_it_is_stored(where: str, location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 16)
    path = tmp_path / "model.onnx"
    path.write_bytes(_place(where, location).SerializeToString())
    with pytest.raises(ArtifactError, match="outside the file") as caught:
        load_checked(path)
    assert location in str(caught.value)


def test_a_self_contained_model_is_read_and_every_tensor_is_walked(tmp_path: Path) -> None:
    model = _model([helper.make_node("Add", ["x", "w"], ["y"])], [_tensor("w", None)])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert [t.name for t in walk_tensors(load_checked(path, full_check=True))] == ["w"]


def _function(name: str, body: list[onnx.NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], body, opsets)


def _calling(names: list[str], functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    tensors = ["x", *(f"t{i}" for i in range(len(names) - 1)), "y"]
    nodes = [
        helper.make_node(name, [tensors[i]], [tensors[i + 1]], name=f"call{i}", domain="own")
        for i, name in enumerate(names)
    ]
    model = _model(nodes, [])
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.extend(functions)
    return model


def test_functions_that_would_grow_without_end_are_refused() -> None:
    leaf = _function("F0", [helper.make_node("Relu", ["a"], ["b"])])
    check_model(_calling(["F0", "F0"], [leaf]), where="flat")
    twice = [helper.make_node("F0", ["a"], ["c"], domain="own"), helper.make_node("F0", ["c"], ["b"], domain="own")]
    with pytest.raises(ArtifactError, match="calls another"):
        check_model(_calling(["F1"], [leaf, _function("F1", twice)]), where="doubling")
    names = ["a", *(f"c{i}" for i in range(499)), "b"]
    long = _function("F0", [helper.make_node("Relu", [names[i]], [names[i + 1]]) for i in range(500)])
    with pytest.raises(ArtifactError, match="more than 200000 nodes when"):
        check_model(_calling(["F0"] * 401, [long]), where="long")


def test_deeply_nested_subgraphs_do_not_overflow_the_stack() -> None:
    model = _model([helper.make_node("Add", ["x", "w"], ["y"])], [_tensor("w", None)])
    graph = model.graph
    for depth in range(3000):  # deeper than Python's recursion limit
        node = graph.node.add(op_type="If", name=str(depth))
        attribute = node.attribute.add(name="then_branch", type=AttributeProto.GRAPH)
        attribute.g.name = "inner"
        graph = attribute.g
    graph.initializer.append(_tensor("deep", "/etc/hostname"))
    assert "deep" in {t.name for t in walk_tensors(model)}


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" + b"\xff" * 50])
def test_what_is_not_onnx_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_checked(path)
    assert "\n" not in str(caught.value)


def test_links_and_missing_files_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "real.onnx"
    target.write_bytes(_model([helper.make_node("Add", ["x", "w"], ["y"])], [_tensor("w", None)]).SerializeToString())
    (tmp_path / "link.onnx").symlink_to(target)
    with pytest.raises(ArtifactError, match="is a link"):
        load_checked(tmp_path / "link.onnx")
    with pytest.raises(InputError, match="does not exist"):
        load_checked(tmp_path / "none.onnx")
