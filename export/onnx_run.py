"""Running an ONNX model of the export itself on this CPU: one way to open a session, for ranges, checks and parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper


def open_model(model: onnx.ModelProto, *, literal: bool, outputs: Sequence[str] | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, without the runtime's own log lines.

    Args:
        model: ONNX in memory.
        literal: compute every operator as the standard defines it, without graph optimisation. No Q/DQ pair is then
            fused into an int8 kernel, so the result has the model's own error and not the saturation of this CPU's
            instructions (int8 times int8 saturates on AVX2, not on a GPU). A float model runs faster without it.
        outputs: names of tensors to return instead of the model's own outputs.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if literal:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if outputs is not None:
        model = _with_outputs(model, outputs)
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def run_model(
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    batch: int = 16,
    literal: bool = True,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The first output (N, D), float32, of `model` for N images.

    Args:
        model: ONNX whose first output is the embedding.
        images: (N, 3, H, W); the model's input, or what `prepare` turns into it.
        batch: images in one call where the model's batch is dynamic; a fixed batch is filled with the last image.
        literal: as for `open_model`.
        prepare: turns a slice of `images` into the model's input.
    """
    session = open_model(model, literal=literal)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    fixed = session.get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else batch
    pieces = []
    for start in range(0, len(images), step):
        piece = images[start : start + step] if prepare is None else prepare(images[start : start + step])
        missing = step - len(piece) if isinstance(fixed, int) else 0
        full = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
        pieces.append(session.run([output], {name: full})[0][: len(piece)])
    result: np.ndarray = np.concatenate(pieces).astype(np.float32, copy=False)
    return result


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` that returns the tensors `names`; the runtime infers their types."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.output[:]
    wide.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return wide
