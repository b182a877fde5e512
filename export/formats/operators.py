"""What an ONNX Runtime or LiteRT that is built for one model needs: its operators, their versions and their sizes.

Both runtimes can be built with the kernels of a model only, which makes an app smaller by megabytes. The list is
``operators.config`` in a bundle, in the syntax that ONNX Runtime's build takes (--include_ops_by_config):
``domain;version;NAME,NAME``. LiteRT's build reads the model itself (its operators have the domains ``builtin`` and
``custom``). How often each operator occurs and how large its weights are is in comments.
"""

from __future__ import annotations

import importlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robx.errors import ArtifactError, MissingExtra, first_line

NAME = "operators.config"
_MOST = 100_000  # operators or tensors of a graph; larger counts are those of a damaged file


@dataclass(frozen=True, kw_only=True)
class NeededOperator:
    """One operator of a model."""

    domain: str
    version: int
    name: str
    count: int
    int8: int  # how many of them take 8-bit integers
    bytes: int  # of their constants; one that several share counts once


def needed_operators(path: Path) -> list[NeededOperator]:
    """The operators of an .ort or .tflite file, sorted; nothing is executed.

    Raises:
        ArtifactError: the file is damaged.
        MissingExtra: the package that describes the format is not installed.
    """
    try:
        nodes = list(_ort_nodes(path.read_bytes()) if path.suffix == ".ort" else _tflite_nodes(path.read_bytes()))
    except (struct.error, ValueError, TypeError, IndexError, AttributeError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"{path} is damaged ({first_line(error)}): export it again") from error
    counts = Counter(node[:3] for node in nodes)
    int8, sizes, seen = Counter[Any](), Counter[Any](), set[Any]()
    for domain, version, name, takes_int8, constants in nodes:
        int8[domain, version, name] += takes_int8
        for constant, size in constants:
            if constant not in seen:
                seen.add(constant)
                sizes[domain, version, name] += size
    return [
        NeededOperator(domain=d, version=v, name=n, count=count, int8=int8[d, v, n], bytes=sizes[d, v, n])
        for (d, v, n), count in sorted(counts.items())
    ]


def to_config(operators: Sequence[NeededOperator], *, runtime: str, model_bytes: int) -> str:
    """The text of operators.config.

    Args:
        operators: of the model.
        runtime: the project that is built with them, as it spells itself.
        model_bytes: of the model file.
    """
    lines = [
        f"# Operators that a {runtime} built for this model needs: domain;version;names.",
        f"# The model file has {model_bytes} bytes, {sum(o.bytes for o in operators)} of them constants.",
        *(f"# {o.name} (version {o.version}): {o.count} times, {o.bytes} bytes of constants" for o in operators),
    ]
    for domain, version in sorted({(o.domain, o.version) for o in operators}):
        names = [o.name for o in operators if (o.domain, o.version) == (domain, version)]
        lines.append(f"{domain};{version};{','.join(names)}")
    return "\n".join(lines) + "\n"


def read_config(path: Path) -> dict[str, list[str]]:
    """The operators listed in an operators.config: "domain;version" -> names."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        parts = line.split("#")[0].strip().split(";")
        if len(parts) == 3:
            found[f"{parts[0]};{parts[1]}"] = sorted(name for name in parts[2].split(",") if name)
    return found


# (domain, version, name, whether its first input is an 8-bit integer, its constants as (identity, bytes))
_Node = tuple[str, int, str, bool, list[tuple[Any, int]]]


def _ort_nodes(data: bytes) -> Iterator[_Node]:
    """The nodes of an .ort file, those of subgraphs included."""
    importlib.import_module("onnxruntime.tools.ort_format_model")  # makes the schema importable
    fbs: Any = importlib.import_module("ort_flatbuffers_py.fbs")
    session = fbs.InferenceSession.InferenceSession
    if not session.InferenceSessionBufferHasIdentifier(data, 0):
        raise ValueError("it is not an .ort file")
    graphs = [session.GetRootAsInferenceSession(data, 0).Model().Graph()]
    eight_bit = (fbs.TensorDataType.TensorDataType.INT8, fbs.TensorDataType.TensorDataType.UINT8)
    while graphs:
        graph = graphs.pop()
        constants = {t.Name(): t for t in _each(graph.Initializers, graph.InitializersLength())}
        types = {a.Name(): _ort_type(fbs, a) for a in _each(graph.NodeArgs, graph.NodeArgsLength())}
        for node in _each(graph.Nodes, graph.NodesLength()):
            inputs = [node.Inputs(i) for i in range(min(node.InputsLength(), _MOST))]
            used = [(name, _ort_bytes(constants[name])) for name in inputs if name in constants]
            int8 = bool(inputs) and types.get(inputs[0]) in eight_bit
            yield node.Domain().decode() or "ai.onnx", node.SinceVersion(), node.OpType().decode(), int8, used
            attributes = _each(node.Attributes, node.AttributesLength())
            graphs += [a.G() for a in attributes if a.Type() == fbs.AttributeType.AttributeType.GRAPH]


def _ort_type(fbs: Any, argument: Any) -> int | None:
    """The element type of a value; None if it is not a tensor or has no type."""
    kind = argument.Type()
    if kind is None or kind.ValueType() != fbs.TypeInfoValue.TypeInfoValue.tensor_type:
        return None
    tensor = fbs.TensorTypeAndShape.TensorTypeAndShape()
    tensor.Init(kind.Value().Bytes, kind.Value().Pos)
    return int(tensor.ElemType())


def _ort_bytes(tensor: Any) -> int:
    return int(tensor.RawDataLength())


def _tflite_nodes(data: bytes) -> Iterator[_Node]:
    """The operators of all subgraphs of a .tflite file."""
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise MissingExtra(
            "ai-edge-litert", "litert", purpose="listing a .tflite file's operators", cause=error
        ) from error
    if not schema.Model.ModelBufferHasIdentifier(data, 0):
        raise ValueError("it is not a .tflite file")
    model = schema.Model.GetRootAs(data, 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    codes = list(_each(model.OperatorCodes, model.OperatorCodesLength()))
    eight_bit = (schema.TensorType.INT8, schema.TensorType.UINT8)
    for graph in _each(model.Subgraphs, model.SubgraphsLength()):
        for node in _each(graph.Operators, graph.OperatorsLength()):
            code = codes[node.OpcodeIndex()]
            builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            custom = code.CustomCode()
            tensors = [graph.Tensors(i) for i in node.InputsAsNumpy() if i >= 0] if node.InputsLength() else []
            used = [(t.Buffer(), model.Buffers(t.Buffer()).DataLength()) for t in tensors]
            name = custom.decode() if custom else names.get(builtin, f"builtin {builtin}")
            int8 = bool(tensors) and tensors[0].Type() in eight_bit
            yield "custom" if custom else "builtin", code.Version(), name, int8, [u for u in used if u[1]]


def _each(get: Any, count: int) -> Iterable[Any]:
    if count > _MOST:
        raise ValueError(f"it claims to have {count} parts")
    return (get(i) for i in range(count))
