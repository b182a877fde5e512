"""The contents of a bundle: operators, precisions, sizes, what its target does not support, sensitive layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import onnx
from onnx import numpy_helper

from robx.errors import ArtifactError, MissingExtra
from robx.export.formats.operators import needed_operators, read_config
from robx.export.int8.tensorrt_qdq import trt_advice, trt_faults
from robx.export.onnx_graph import WEIGHTED, Graph
from robx.records import Bundle
from robx.store.files import read_json
from robx.store.onnx_safety import load_checked
from robx.store.xml_safety import read_xml

_NOT_LAYERS = ("QuantizeLinear", "DequantizeLinear", "Constant", "Const", "Parameter", "Result", "FakeQuantize")
# Operators of vision models that TensorRT 10, 11 and TensorRT-RTX have no kernel for.
_NOT_IN_TRT = (
    "Attention",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
)
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True)
class Operators:
    """One kind of operator."""

    name: str
    count: int
    int8: int  # how many of them run in int8
    bytes: int  # of their weights


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or matrix product."""

    name: str
    operator: str
    precision: str
    bytes: int
    cost: float | None  # 1 - centred cosine with only this layer in int8


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `robx inspect` shows besides the manifest."""

    operators: tuple[Operators, ...] = ()
    layers: tuple[Layer, ...] = ()
    unsupported: tuple[str, ...] = ()
    sensitivity: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def inspect_bundle(folder: Path, bundle: Bundle) -> Inspection:
    """Read the model file of an already verified bundle; nothing is executed.

    Raises:
        ArtifactError: the model file is damaged.
    """
    costs = _sensitivity(folder, bundle)
    path = folder / bundle.model.path
    match path.suffix:
        case ".onnx":
            return _of_onnx(load_checked(path), bundle, costs)
        case ".xml":
            return _of_openvino(path, costs)
        case ".ort" | ".tflite":
            return _of_mobile(folder, bundle, costs)
        case other:
            return Inspection(sensitivity=costs, notes=(f"layers of {other} files cannot be listed",))


def _of_onnx(model: onnx.ModelProto, bundle: Bundle, costs: dict[str, float]) -> Inspection:
    graph = Graph(model)
    counts, int8, sizes = Counter[str](), Counter[str](), Counter[str]()
    layers, unsupported = [], set()
    for node in graph.nodes:
        if node.domain not in _STANDARD_DOMAINS:
            unsupported.add(f"{node.domain}.{node.op_type}")
        if node.op_type in _NOT_LAYERS:
            continue
        quantised = _is_int8(graph, node)
        weights = sum(_stored_bytes(graph, name) for name in node.input)
        counts[node.op_type] += 1
        int8[node.op_type] += quantised
        sizes[node.op_type] += weights
        if node.op_type in WEIGHTED:
            kind = "int8" if quantised else _float_kind(graph, node)
            layers.append(
                Layer(name=node.name, operator=node.op_type, precision=kind, bytes=weights, cost=costs.get(node.name))
            )
    operators = tuple(
        Operators(name=name, count=count, int8=int8[name], bytes=sizes[name]) for name, count in counts.most_common()
    )
    lines, advice = sorted(unsupported), list[str]()
    if bundle.format == "trt":
        lines += sorted({n.op_type for n in graph.nodes if n.op_type in _NOT_IN_TRT})
        if bundle.precision == "int8":
            lines, advice = lines + trt_faults(model), trt_advice(model)
    opset = next((o.version for o in model.opset_import if o.domain in _STANDARD_DOMAINS), None)
    return Inspection(
        operators=operators,
        layers=tuple(layers),
        unsupported=tuple(lines),
        sensitivity=costs,
        notes=(f"opset {opset}, IR {model.ir_version}, {len(graph.nodes)} nodes", *advice),
    )


def _of_openvino(path: Path, costs: dict[str, float]) -> Inspection:
    try:
        root = ElementTree.fromstring(read_xml(path))
    except ElementTree.ParseError as error:
        raise ArtifactError(f"{path} is not XML ({error}): export it again") from error
    nodes = {layer.get("id", ""): layer for layer in root.iter("layer")}
    sources = {(e.get("to-layer"), e.get("to-port")): e.get("from-layer", "") for e in root.iter("edge")}
    inputs: dict[str, list[str]] = {}
    for (to, _), source in sorted(sources.items(), key=lambda item: str(item[0])):
        inputs.setdefault(str(to), []).append(source)
    counts, int8, sizes, layers = Counter[str](), Counter[str](), Counter[str](), []
    for key, layer in nodes.items():
        kind = layer.get("type", "")
        if kind in _NOT_LAYERS:
            continue
        counts[kind] += 1
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        precision, weights = _openvino_product([_openvino_input(nodes, inputs, name) for name in inputs.get(key, [])])
        int8[kind] += precision == "int8"
        sizes[kind] += weights
        name = layer.get("name", "")
        cost = costs.get(name.split("/")[0])
        layers.append(Layer(name=name, operator=kind, precision=precision, bytes=weights, cost=cost))
    operators = tuple(Operators(name=n, count=c, int8=int8[n], bytes=sizes[n]) for n, c in counts.most_common())
    version = root.get("version", "?")
    return Inspection(
        operators=operators,
        layers=tuple(layers),
        sensitivity=costs,
        notes=(f"OpenVINO IR {version}, {len(nodes)} nodes",),
    )


def _openvino_input(
    nodes: dict[str, ElementTree.Element], inputs: dict[str, list[str]], start: str
) -> tuple[set[str], int]:
    """Element types and bytes of the constants behind an input, looking through conversions, scales and reshapes.

    A FakeQuantize counts as "i8".
    """
    types, size, seen, key = set(), 0, set(), start
    while (node := nodes.get(key)) is not None and key not in seen:  # a hostile file may contain cycles
        seen.add(key)
        kind, data = node.get("type"), node.find("data")
        if kind == "Const" and data is not None:
            types.add(data.get("element_type", ""))
            stored = data.get("size", "")
            size = int(stored) if stored.isdigit() else 0
        if kind == "FakeQuantize":
            types.add("i8")
        elif kind not in ("Convert", "Multiply", "Subtract", "Reshape"):
            break
        key = next(iter(inputs.get(key, [])), "")
    return types, size


def _openvino_product(sides: list[tuple[set[str], int]]) -> tuple[str, int]:
    """A product's precision and the bytes of its weights; it is int8 with int8 weights or two quantised activations."""
    types = set().union(*(side for side, _ in sides))
    weights = max((size for _, size in sides), default=0)
    quantised = [bool(side & {"i8", "u8"}) for side, _ in sides]
    if all(quantised) if not weights else any(q for q, (_, size) in zip(quantised, sides, strict=True) if size):
        return "int8", weights
    return ("fp16" if "f16" in types else "fp32"), weights


def _of_mobile(folder: Path, bundle: Bundle, costs: dict[str, float]) -> Inspection:
    """Of an .ort or .tflite file; without the package that describes the format, from the bundle's operators.config."""
    config = next((f.path for f in bundle.files if f.role == "operators"), None)
    listed = read_config(folder / config) if config else {}
    notes = tuple(f"needs {domain.replace(';', ' version ')}: {', '.join(names)}" for domain, names in listed.items())
    try:
        found = needed_operators(folder / bundle.model.path)
    except MissingExtra as error:
        return Inspection(sensitivity=costs, notes=(*notes, f"sizes are not known: {error}"))
    counts, int8, sizes = Counter[str](), Counter[str](), Counter[str]()
    for one in found:
        counts[one.name] += one.count
        int8[one.name] += one.int8
        sizes[one.name] += one.bytes
    operators = tuple(Operators(name=n, count=c, int8=int8[n], bytes=sizes[n]) for n, c in counts.most_common())
    return Inspection(operators=operators, sensitivity=costs, notes=notes)


def _is_int8(graph: Graph, node: onnx.NodeProto) -> bool:
    dynamic = [name for name in node.input if name and name not in graph.initializers]
    return bool(dynamic) and all(graph.dequantized(name) is not None for name in dynamic[:2])


def _stored_bytes(graph: Graph, name: str) -> int:
    while (producer := graph.producers.get(name)) is not None and producer.op_type in (
        "DequantizeLinear",
        "QuantizeLinear",
    ):
        name = producer.input[0]
    tensor = graph.initializers.get(name)
    return 0 if tensor is None else int(numpy_helper.to_array(tensor).nbytes)


def _float_kind(graph: Graph, node: onnx.NodeProto) -> str:
    kinds = {graph.initializers[n].data_type for n in node.input if n in graph.initializers}
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"


def _sensitivity(folder: Path, bundle: Bundle) -> dict[str, float]:
    path = folder / "sensitivity.json"
    if not any(file.path == path.name for file in bundle.files):
        return {}
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(v, int | float) for v in value.values()):
        raise ArtifactError(f"{path} does not map layers to numbers: export the bundle again")
    return {str(name): float(cost) for name, cost in value.items()}
