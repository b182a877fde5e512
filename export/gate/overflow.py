"""The layers whose activations are beyond the range of float16, which is why an fp16 model returns NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from robx.export.image_splits import whole_batches
from robx.export.int8 import ranges
from robx.export.onnx_graph import input_batch

LARGEST = float(np.finfo(np.float16).max)  # 65504
_BATCH = 4  # every activation of these images is in memory at once
_SHOWN = 3


def overflowing_layers(model: onnx.ModelProto, images: np.ndarray) -> list[str]:
    """Each layer of the float32 `model` that overflows in float16 on `images`, in order, with its largest value.

    Args:
        model: float32 ONNX.
        images: its input, (N, 3, H, W); a few are enough.
    """
    name = model.graph.input[0].name
    seen = ranges.collect(model, whole_batches(images, input_batch(model) or _BATCH), input_name=name)
    reach = {tensor: max(abs(found.low), abs(found.high)) for tensor, found in seen.items()}
    largest = (
        (node, max((reach.get(output, 0.0) for output in node.output), default=0.0)) for node in model.graph.node
    )
    return [f"{n.name or n.output[0]} ({n.op_type}) reaches {value:.2g}" for n, value in largest if value > LARGEST]


def overflow_line(layers: Sequence[str]) -> str:
    """What is beyond the range of float16, in one line."""
    if not layers:
        return f"a sum inside a layer exceeds float16's largest value, {LARGEST:.0f}, although no activation does"
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return f"beyond float16's largest value, {LARGEST:.0f}: {', '.join(layers[:_SHOWN])}{more}"
