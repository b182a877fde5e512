"""What a uint8 model does to its input before the network: axes, order of channels, resize and crop, as ONNX operators.

The resize is ONNX's antialiased Resize on uint8 with the cubic coefficient -0.5 and the weights outside of the image
left out, as Pillow computes it. In ONNX Runtime every pixel is then within one of 255 levels of Pillow's. Sizes are
computed in the graph as `robx.images.decode.resize_and_crop` computes them, so an image of any size gets its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from robx.images.decode import MAX_ASPECT
from robx.records import Normalisation, Preprocessing, TensorSpec

_INT, _DOUBLE = TensorProto.INT64, TensorProto.DOUBLE


def front_input(core: TensorSpec, front: Normalisation) -> TensorSpec:
    """The input of a model with this front; `core` is the network's own, uint8 (N, 3, H, W)."""
    batch, channels, *sides = core.shape
    sides = [None, None] if front.resize else sides
    shape = (batch, channels, *sides) if front.layout == "NCHW" else (batch, *sides, channels)
    return TensorSpec(name=core.name, dtype=core.dtype, shape=shape)


def add_front(model: onnx.ModelProto, front: Normalisation, pre: Preprocessing) -> onnx.ModelProto:
    """A copy of a uint8 model, whose input is RGB (N, 3, H, W), that takes images as `front` says."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    (given,) = graph.input
    batch = given.type.tensor_type.shape.dim[0]
    inner, nodes = f"{given.name}_network", _Nodes(prefix="front")
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == given.name:
                node.input[position] = inner
    image = given.name
    if front.layout == "NHWC":
        image = nodes.add("Transpose", [image], perm=[0, 3, 1, 2])
    if front.resize:
        image = _resize_and_crop(nodes, image, pre)
    if front.channels == "BGR":
        image = nodes.add("Gather", [image, nodes.constant(np.array([2, 1, 0]))], axis=1)
    # The network's own shape, which the runtime cannot infer through sizes that are computed.
    shape = nodes.constant(np.array([batch.dim_value or -1, 3, *pre.shape]))
    nodes.add("Reshape", [image, shape], output=inner)
    later = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes.nodes, *later])
    graph.initializer.extend(nodes.constants)
    dims = list(front_input(TensorSpec(name="", dtype="uint8", shape=(None, 3, *pre.shape)), front).shape[1:])
    named = [dim or name for dim, name in zip(dims, _names(front), strict=True)]
    graph.input[0].CopyFrom(
        helper.make_tensor_value_info(
            given.name, TensorProto.UINT8, [batch.dim_value or batch.dim_param or "N", *named]
        )
    )
    return made


def _names(front: Normalisation) -> Sequence[str]:
    return ("C", "height", "width") if front.layout == "NCHW" else ("height", "width", "C")


@dataclass
class _Nodes:
    """Nodes and constants that are being written, with names of their own."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, inputs: Sequence[str], *, output: str = "", **attributes: Any) -> str:
        name = f"{self.prefix}_{operator.lower()}_{len(self.nodes)}"
        output = output or name
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: np.ndarray) -> str:
        name = f"{self.prefix}_constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def cast(self, name: str, kind: int) -> str:
        return self.add("Cast", [name], to=kind)


def _resize_and_crop(nodes: _Nodes, image: str, pre: Preprocessing) -> str:
    """`resize_and_crop` of uint8 (N, 3, height, width)."""
    axes, two = nodes.constant(np.array([2, 3])), nodes.constant(np.array([2]))
    sides = nodes.add("Shape", [image], start=2)
    # Of a very long image only the square in its centre.
    short, long = (nodes.add(name, [sides], keepdims=1) for name in ("ReduceMin", "ReduceMax"))
    is_long = nodes.add("Greater", [long, nodes.add("Mul", [short, nodes.constant(np.array([MAX_ASPECT]))])])
    kept = nodes.add("Where", [is_long, short, sides])
    start = nodes.add("Div", [nodes.add("Sub", [sides, kept]), two])
    image = nodes.add("Slice", [image, start, nodes.add("Add", [start, kept]), axes])

    scaled = _scaled(nodes, kept, pre)
    first = nodes.add("Shape", [image], end=2)
    image = nodes.add(
        "Resize",
        [image, "", "", nodes.add("Concat", [first, scaled], axis=0)],
        mode="cubic" if pre.interpolation == "bicubic" else "linear",
        cubic_coeff_a=-0.5,
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )
    crop = nodes.constant(np.array(pre.shape))
    rest = nodes.cast(nodes.add("Sub", [scaled, crop]), _DOUBLE)
    half = nodes.add("Round", [nodes.add("Div", [rest, nodes.constant(np.array([2.0]))])])  # half to even, as in Python
    corner = nodes.cast(half, _INT)
    return nodes.add("Slice", [image, corner, nodes.add("Add", [corner, crop]), axes])


def _scaled(nodes: _Nodes, sides: str, pre: Preprocessing) -> str:
    """Height and width after the resize, int64 (2,): as `robx.images.decode.resized_size`."""
    height, width = pre.shape
    if height == width:
        short, long = (nodes.add(name, [sides], keepdims=1) for name in ("ReduceMin", "ReduceMax"))
        size = nodes.constant(np.array([pre.size]))
        longer = nodes.add("Div", [nodes.add("Mul", [long, size]), short])  # of positive integers: rounded down
        return nodes.add("Where", [nodes.add("Equal", [sides, short]), size, longer])
    wanted = nodes.constant(np.array([pre.size, pre.size * width / height], dtype=np.float64))
    exact = nodes.cast(sides, _DOUBLE)
    scale = nodes.add("ReduceMax", [nodes.add("Div", [wanted, exact])], keepdims=1)
    rounded = nodes.cast(nodes.add("Round", [nodes.add("Mul", [exact, scale])]), _INT)
    return nodes.add("Max", [rounded, nodes.constant(np.array(pre.shape))])
