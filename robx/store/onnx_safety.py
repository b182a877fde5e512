"""Read ONNX files that may be hostile: everything is checked before a runtime opens the file.

robx writes self-contained ONNX files, so no tensor may be stored elsewhere. Runtimes follow external-data references in
places that checkers miss (sparse initialisers, attribute tensors, subgraphs, functions), which would let a model read
any file on the machine; here every place that can hold a tensor is visited.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx

from robx.errors import ArtifactError, InputError, first_line

MAX_MODEL_BYTES = 2**31 - 1  # protobuf's own limit
MAX_NODES = 200_000


def load_checked(path: Path, *, full_check: bool = False) -> onnx.ModelProto:
    """Read a self-contained ONNX file.

    Raises:
        InputError: `path` is not a file.
        ArtifactError: a link, too large, not ONNX, invalid, or with a tensor stored outside the file.
    """
    if path.is_symlink():
        raise ArtifactError(f"{path} is a link: give the ONNX file itself")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give an ONNX file")
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes, and an ONNX file at most {MAX_MODEL_BYTES}: export it again"
        )
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX file ({first_line(error)}): export it again") from error
    check_model(model, where=os.fspath(path), full_check=full_check)
    return model


def check_model(model: onnx.ModelProto, *, where: str, full_check: bool = False) -> None:
    """Refuse a model with external tensors, too many nodes (functions expanded), or that the ONNX checker rejects.

    Raises:
        ArtifactError: the message has `where` and the tensor at fault.
    """
    count = 0
    for graph in walk_graphs(model):
        count += len(graph.node)
        if count > MAX_NODES:
            raise ArtifactError(f"{where} has more than {MAX_NODES} nodes: it is not an image model")
    for tensor in walk_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data):
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            raise ArtifactError(
                f"{where}: the tensor {tensor.name!r} is stored in {location!r}, outside the file: robx only opens "
                "self-contained ONNX; save it with its weights inside"
            )
    _require_flat_functions(model, where)
    try:
        onnx.checker.check_model(model, full_check=full_check)
    except Exception as error:
        raise ArtifactError(f"{where} is not a valid ONNX model ({first_line(error)}): export it again") from error


def walk_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Every graph of a model: the main graph, functions, training graphs, and the subgraphs of all their nodes."""
    training = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    yield from _walk([model.graph, *model.functions, *training])


def _walk(pending: list[onnx.GraphProto | onnx.FunctionProto]) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Graphs and functions, and the subgraphs of all their nodes."""
    while pending:  # a stack, not recursion: a hostile file nests deeply
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)
        for default in getattr(graph, "attribute_proto", ()):
            if default.HasField("g"):
                pending.append(default.g)
            pending.extend(default.graphs)


def _require_flat_functions(model: onnx.ModelProto, where: str) -> None:
    """A runtime expands every call of a function: thirty functions that call each other twice are a billion nodes."""
    sizes = {(function.domain, function.name): len(function.node) for function in model.functions}
    if any((n.domain, n.op_type) in sizes for graph in _walk(list(model.functions)) for n in graph.node):
        raise ArtifactError(
            f"{where} has a function that calls another: robx only opens models without nested functions"
        )
    if sum(sizes.get((n.domain, n.op_type), 1) for graph in _walk([model.graph]) for n in graph.node) > MAX_NODES:
        raise ArtifactError(
            f"{where} has more than {MAX_NODES} nodes when its functions are expanded: it is not an image model"
        )


def walk_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initialisers, sparse initialisers and attributes, in every graph and function."""
    for graph in walk_graphs(model):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        else:
            for default in graph.attribute_proto:
                yield from _attribute_tensors(default)
        for node in graph.node:
            for attribute in node.attribute:
                yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for tensor in [*sparse, *attribute.sparse_tensors]:
        yield from (tensor.values, tensor.indices)
