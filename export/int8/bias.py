"""Full bias correction: after quantisation each layer's mean output is put back where it was (Nagel et al. 2019, 4.2).

Layers are corrected one after the other, in order, with everything before already quantised and corrected, so that a
correction accounts for the error that its own input carries. The cost is two runs of a few images for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from robx.errors import ArtifactError
from robx.export.image_splits import whole_batches
from robx.export.onnx_graph import Graph, input_batch
from robx.export.onnx_run import open_model
from robx.progress import Progress


def correct_biases(
    quantised: onnx.ModelProto,
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """A copy of `quantised` whose convolutions answer, in the mean over `images`, as those of `model` of the same name.

    Args:
        quantised: Q/DQ ONNX made from `model` by a quantiser that keeps names.
        model: float32 ONNX.
        images: the model's input, (N, 3, H, W).
        progress: told after every layer.

    Raises:
        ArtifactError: no convolution has a bias.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(quantised)
    graph = Graph(corrected)
    float_outputs = {n.name: n.output[0] for n in model.graph.node if n.op_type == "Conv"}
    layers = [n for n in graph.nodes if n.op_type == "Conv" and n.name in float_outputs and len(n.input) > 2]
    if not layers:
        raise ArtifactError("no convolution of this network has a bias that could be corrected")
    wanted = _channel_means(model, [float_outputs[n.name] for n in layers], images)
    for done, (node, want) in enumerate(zip(layers, wanted, strict=True), start=1):
        have = _channel_means(corrected, [node.output[0]], images)[0]
        _add_to_bias(graph, node, want - have)
        if progress:
            progress(done, len(layers), "correcting biases")
    return corrected


def _channel_means(model: onnx.ModelProto, names: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
    """Mean (C,) over images and places of each named tensor (N, C, H, W), Q/DQ computed literally."""
    session = open_model(model, literal=True, outputs=names)
    totals: list[np.ndarray] = []
    batches = whole_batches(images, input_batch(model) or min(16, len(images)))
    for batch in batches:
        outputs = session.run(list(names), {session.get_inputs()[0].name: batch})
        sums = [np.asarray(o, np.float64).mean(axis=(0, 2, 3)) for o in outputs]
        totals = [t + s for t, s in zip(totals, sums, strict=True)] if totals else sums
    return [total / len(batches) for total in totals]


def _add_to_bias(graph: Graph, node: onnx.NodeProto, shift: np.ndarray) -> None:
    """Add `shift` (C,) to a convolution's bias, in float or in its int32 form."""
    name = node.input[2]
    if name in graph.initializers:
        tensor = graph.initializers[name]
        value = numpy_helper.to_array(tensor) + shift
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
        return
    source = graph.dequantized(name)
    if source is None or source.input[0] not in graph.initializers:
        return
    tensor, scale = graph.initializers[source.input[0]], graph.constant(source.input[1])
    if scale is not None:
        limits = np.iinfo(np.int32)
        moved = np.clip(numpy_helper.to_array(tensor) + np.round(shift / scale), limits.min, limits.max)
        tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.int32), source.input[0]))
