"""The same front as `front.py` as OpenVINO operations: its Interpolate has Pillow's own arithmetic as a mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from robx.images.decode import MAX_ASPECT
from robx.records import Normalisation, Preprocessing


def add_front(model: Any, front: Normalisation, pre: Preprocessing) -> Any:
    """A new ``openvino.Model`` of a uint8 model, RGB (N, 3, H, W), that takes images as `front` says.

    `model` shares its operations with the result and is not to be used again.
    """
    import openvino as ov
    from openvino import opset13 as ops

    (given,) = model.inputs
    batch, sides = given.partial_shape[0], given.partial_shape[2:]
    sides = ov.PartialShape([-1, -1]) if front.resize else sides
    order = [batch, ov.Dimension(3), *sides] if front.layout == "NCHW" else [batch, *sides, ov.Dimension(3)]
    image = parameter = ops.parameter(ov.PartialShape(order), ov.Type.u8, name=given.get_any_name())
    parameter.output(0).tensor.set_names(given.get_names())
    if front.layout == "NHWC":
        image = ops.transpose(image, _ints(0, 3, 1, 2))
    if front.resize:
        image = _resize_and_crop(ops, image, pre)
    if front.channels == "BGR":
        image = ops.gather(image, _ints(2, 1, 0), _ints(1)[0])
    # The network's own shape; special zeros keep the batch.
    image = ops.reshape(image, _ints(0, 3, *pre.shape), special_zero=True)
    for target in given.get_target_inputs():
        target.replace_source_output(image.output(0))
    return ov.Model(model.get_results(), [parameter], model.get_friendly_name())


def _ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _resize_and_crop(ops: Any, image: Any, pre: Preprocessing) -> Any:
    """`robx.images.decode.resize_and_crop` of uint8 (N, 3, height, width)."""
    axes, steps, height_and_width = _ints(2, 3), _ints(1, 1), _ints(2, 3)
    sides = ops.gather(ops.shape_of(image), height_and_width, _ints(0)[0])
    # Of a very long image only the square in its centre.
    short, long = ops.reduce_min(sides, _ints(0), True), ops.reduce_max(sides, _ints(0), True)
    kept = ops.select(ops.greater(long, ops.multiply(short, _ints(MAX_ASPECT))), short, sides)
    start = ops.divide(ops.subtract(sides, kept), _ints(2))
    image = ops.slice(image, start, ops.add(start, kept), steps, axes)

    scaled = _scaled(ops, kept, pre)
    image = ops.interpolate(
        image,
        scaled,
        "bicubic_pillow" if pre.interpolation == "bicubic" else "bilinear_pillow",
        "sizes",
        pads_begin=[0, 0, 0, 0],
        pads_end=[0, 0, 0, 0],
        cube_coeff=-0.5,
        axes=axes,
    )
    rest = ops.convert(ops.subtract(scaled, _ints(*pre.shape)), "f64")
    corner = ops.convert(ops.round(ops.divide(rest, np.float64(2)), "half_to_even"), "i64")
    return ops.slice(image, corner, ops.add(corner, _ints(*pre.shape)), steps, axes)


def _scaled(ops: Any, sides: Any, pre: Preprocessing) -> Any:
    """Height and width after the resize, int64 (2,): as `robx.images.decode.resized_size`."""
    height, width = pre.shape
    if height == width:
        short, long = ops.reduce_min(sides, _ints(0), True), ops.reduce_max(sides, _ints(0), True)
        longer = ops.divide(ops.multiply(long, _ints(pre.size)), short)  # of positive integers: rounded down
        return ops.select(ops.equal(sides, short), _ints(pre.size), longer)
    exact = ops.convert(sides, "f64")
    ratios = ops.divide(np.array([pre.size, pre.size * width / height]), exact)
    scale = ops.reduce_max(ratios, _ints(0), True)
    rounded = ops.convert(ops.round(ops.multiply(exact, scale), "half_to_even"), "i64")
    return ops.maximum(rounded, _ints(*pre.shape))
