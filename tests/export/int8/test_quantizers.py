"""Quantisers and graph rewrites on real exported networks, against PyTorch, ONNX Runtime and plain numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robx.embeddings import centred_cosine
from robx.errors import ArtifactError, InputError
from robx.export.formats.half import to_half
from robx.export.int8 import by_nncf, by_onnxruntime, for_tensorrt, ranges
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import read_facts
from robx.export.int8.ladder import Machine, healed_candidates, ladder, sensitive_candidates
from robx.export.int8.ranges import Histogram, choose
from robx.export.int8.sensitivity import _quantise_one, measure
from robx.export.int8.tensorrt_qdq import check_trt_qdq, linears, rescale_to_int8, trt_faults
from robx.export.onnx_graph import Graph
from robx.export.onnx_run import run_model
from tests.quantized_onnx import quantized_nodes


@pytest.fixture(scope="module")
def cnn_ranges(cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray) -> dict[str, Histogram]:
    return ranges.collect(cnn_onnx, [scene_pixels[i : i + 16] for i in (0, 16)], input_name="pixels")


@pytest.fixture(scope="module")
def trt_model(cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram]) -> onnx.ModelProto:
    return for_tensorrt.quantize(cnn_onnx, choose(cnn_ranges, "minmax"), Candidate(name="trt", signed=True))


def test_ranges_hold_every_activation(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    found = choose(cnn_ranges, "minmax")
    assert found["pixels"][0] == pytest.approx(scene_pixels[:32].min())
    assert found["pixels"][1] == pytest.approx(scene_pixels[:32].max())
    assert {o for n in cnn_onnx.graph.node if n.op_type in ("Conv", "Add") for o in n.output} <= set(found)


def test_range_rules_on_a_known_distribution() -> None:
    random = np.random.default_rng(0)
    values = np.abs(random.normal(size=200_000)).astype(np.float32)
    values[0] = 40.0  # one outlier
    counts, _ = np.histogram(values, ranges.BINS, (0, 40))
    seen = {"x": Histogram(0.0, 40.0, counts.astype(np.float64))}
    assert choose(seen, "minmax")["x"] == (0.0, 40.0)
    assert choose(seen, "percentile", percentile=99.9)["x"][1] == pytest.approx(np.quantile(values, 0.999), rel=0.05)
    assert 2.0 < choose(seen, "entropy")["x"][1] < 20.0

    def error(high: float) -> float:  # of real 8-bit rounding, not of the formula that the rule minimises
        step = high / 255
        return float(np.mean((np.clip(np.round(values / step), 0, 255) * step - values) ** 2))

    chosen = choose(seen, "mse")["x"][1]
    assert error(chosen) <= 1.05 * min(error(high) for high in np.linspace(12, 40, 57))
    assert error(chosen) < error(40.0)


@pytest.mark.parametrize("centre", [1.0, -1.0])
def test_entropy_does_not_clip_the_bulk_of_the_values(centre: float) -> None:
    """A gate's output lies in a narrow band far from 0: clipped below it, a single value is left, with divergence 0."""
    values = centre * np.abs(1 + 0.1 * np.random.default_rng(0).normal(size=400_000))
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, ranges.BINS, (low, high))
    bounds = choose({"x": Histogram(low, high, counts.astype(np.float64))}, "entropy")["x"]
    assert np.mean((values < bounds[0]) | (values > bounds[1])) < 0.011
    assert min(bounds) <= 0 <= max(bounds)


def test_least_squared_error_uses_the_steps_of_a_symmetric_quantiser() -> None:
    """After a ReLU, half of a signed quantiser's steps are unused, so more clipping pays off."""
    values = np.abs(np.random.default_rng(0).normal(size=200_000)) ** 3
    counts, _ = np.histogram(values, ranges.BINS, (0, values.max()))
    seen = {"x": Histogram(0.0, float(values.max()), counts.astype(np.float64))}

    def error(high: float) -> float:
        step = high / 127
        return float(np.mean((np.clip(np.round(values / step), -127, 127) * step - values) ** 2))

    low, high = choose(seen, "mse", symmetric=True)["x"]
    assert low == 0.0
    assert error(high) <= 1.02 * min(error(share * values.max()) for share in np.linspace(0.3, 1, 71))
    assert error(high) < error(choose(seen, "mse")["x"][1])


@pytest.mark.parametrize("shape", [(16, 197, 192), (16, 64, 112, 112), (3, 7)])
def test_a_sampled_histogram_sees_every_channel(shape: tuple[int, ...]) -> None:
    places = np.arange(np.prod(shape)).reshape(shape).reshape(-1)[:: ranges._stride(int(np.prod(shape)))]
    for axis, count in enumerate(shape):
        seen = np.unravel_index(places, shape)[axis]
        assert len(np.unique(seen)) == count


def test_a_histogram_that_widens_keeps_its_mass() -> None:
    found: dict[str, Histogram] = {}
    for scale in (1.0, 3.0, 2.0):
        ranges._add(found, "x", np.linspace(-scale, scale, 999, dtype=np.float32))
    assert (found["x"].low, found["x"].high) == (-3.0, 3.0)
    assert found["x"].counts.sum() == 3 * 999


def test_a_tensor_that_is_constant_at_first_counts_in_full() -> None:
    """As an activation that is 0 for the first images: nine tenths of its values are then 0."""
    batches = [*[np.zeros(900, np.float32)] * 4, np.linspace(0, 1, 400, dtype=np.float32)]
    found: dict[str, Histogram] = {}
    for batch in batches:
        ranges._add(found, "x", batch)
    assert found["x"].counts.sum() == 4000 and found["x"].counts[0] >= 3600
    for percentile in (80.0, 95.0, 99.0):
        _, high = choose(found, "percentile", percentile=percentile)["x"]
        assert high == pytest.approx(np.percentile(np.concatenate(batches), percentile), abs=0.005)


def test_onnxruntime_quantises_accurately(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    candidate = Candidate(name="x", quantiser="onnxruntime", reduce_range=True)
    quantised = by_onnxruntime.quantize(cnn_onnx, choose(cnn_ranges, "minmax"), candidate)
    cosine = centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(quantised, scene_pixels))
    assert cosine.mean() > 0.95
    assert len(quantized_nodes(quantised)) == sum(n.op_type == "Conv" for n in cnn_onnx.graph.node)
    weights = [numpy_helper.to_array(i) for i in quantised.graph.initializer if i.data_type == TensorProto.INT8]
    # Seven bits, so that AVX2's int16 sums do not saturate.
    assert max(np.abs(w.astype(int)).max() for w in weights if w.ndim == 4) <= 64


def test_a_gates_mean_is_int8_and_the_same_in_any_batch() -> None:
    """ONNX Runtime's float mean depends on the batch in its last bits, which int8 rounds to different steps."""
    random = np.random.default_rng(0)
    constants = {"w": random.normal(size=(32, 3, 3, 3)).astype(np.float32), "axes": np.array([2, 3])}
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["x"], name="conv"),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean", keepdims=1),
        helper.make_node("Mul", ["x", "mean"], ["y"], name="gate"),
        helper.make_node("ReduceMean", ["y", "axes"], ["embedding"], name="pool", keepdims=0),
    ]
    ends = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 32, 32]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 32]),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "gate", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    pixels = random.normal(size=(64, 3, 32, 32)).astype(np.float32)
    chosen = choose(ranges.collect(model, [pixels], input_name="pixels"), "minmax")
    quantised = by_onnxruntime.quantize(model, chosen, Candidate(name="x", quantiser="onnxruntime"))
    kinds = [node.op_type for node in quantised.graph.node]
    assert kinds.count("GlobalAveragePool") == 1 and kinds.count("ReduceMean") == 1
    assert [node.op_type for node in model.graph.node].count("ReduceMean") == 2  # the float model is not changed
    together = run_model(quantised, pixels, batch=64, literal=False)
    alone = run_model(quantised, pixels, batch=1, literal=False)
    assert np.array_equal(together, alone)
    assert centred_cosine(run_model(model, pixels), alone).mean() > 0.99


def test_named_nodes_stay_in_float(cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram]) -> None:
    first = read_facts(cnn_onnx).weighted[:1]
    candidate = Candidate(name="x", quantiser="onnxruntime", float_nodes=first)
    quantised = by_onnxruntime.quantize(cnn_onnx, choose(cnn_ranges, "minmax"), candidate)
    assert first[0] not in quantized_nodes(quantised) and quantized_nodes(quantised)


def test_the_tensorrt_form(trt_model: onnx.ModelProto, cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray) -> None:
    check_trt_qdq(trt_model)
    pairs = list(linears(Graph(trt_model)))
    assert {p.dtype for p in pairs} == {"int8"}
    assert all(p.zero is None or not p.zero.any() for p in pairs)
    for node in trt_model.graph.node:  # residual additions are quantised on both sides
        if node.op_type == "Add":
            graph = Graph(trt_model)
            assert all(graph.dequantized(name) is not None for name in node.input)
    assert centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(trt_model, scene_pixels)).mean() > 0.95
    half = to_half(trt_model)
    check_trt_qdq(half)
    # Not closer: float16 rounding moves some values to the next of 256 steps.
    assert centred_cosine(run_model(trt_model, scene_pixels), run_model(half, scene_pixels)).mean() > 0.98
    assert centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(half, scene_pixels)).mean() > 0.95


def test_uint8_is_refused_for_tensorrt_and_can_be_rescaled(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    candidate = Candidate(name="x", quantiser="onnxruntime")
    unsigned = by_onnxruntime.quantize(cnn_onnx, choose(cnn_ranges, "minmax"), candidate)
    with pytest.raises(InputError, match="not in TensorRT's Q/DQ form"):
        check_trt_qdq(unsigned)
    assert any("uint8" in fault for fault in trt_faults(unsigned))
    assert any("biases stay in float" in fault for fault in trt_faults(unsigned))
    signed = for_tensorrt.from_uint8(unsigned)
    check_trt_qdq(signed)
    assert centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(signed, scene_pixels)).mean() > 0.95
    # What the parser does instead (the same scales read as int8) is a different model.
    misread = onnx.ModelProto()
    misread.CopyFrom(unsigned)
    for tensor in misread.graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(list(tensor.dims), np.int8), tensor.name))
    del misread.graph.value_info[:]
    wrong = centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(misread, scene_pixels)).mean()
    assert wrong < centred_cosine(run_model(cnn_onnx, scene_pixels), run_model(signed, scene_pixels)).mean() - 0.02


def _mutated(model: onnx.ModelProto, change: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    quantise = next(n for n in graph.nodes if n.op_type == "QuantizeLinear" and n.input[0] == "pixels")
    scale, zero = graph.initializers[quantise.input[1]], graph.initializers[quantise.input[2]]
    if change == "zero point":
        zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    elif change == "uint8":
        zero.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), zero.name))
    elif change == "zero scale":
        scale.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), scale.name))
    elif change == "no zero point":
        del quantise.input[2]
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [("zero point", "zero point"), ("uint8", "uint8"), ("zero scale", "scale"), ("no zero point", "uint8")],
)
def test_each_rule_of_tensorrt_is_checked(trt_model: onnx.ModelProto, change: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_trt_qdq(_mutated(trt_model, change))


def test_a_quantised_softmax_and_per_tensor_weights_are_faults() -> None:
    zero, scale = numpy_helper.from_array(np.array(0, np.int8), "z"), numpy_helper.from_array(np.float32(0.1), "s")
    weight = numpy_helper.from_array(np.ones((4, 4), np.int8), "w")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], name="wd"),
        helper.make_node("MatMul", ["d", "wd"], ["m"], name="product"),
        helper.make_node("Softmax", ["d"], ["n"], name="soft"),
        helper.make_node("Add", ["m", "n"], ["y"], name="sum"),
    ]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], [zero, scale, weight])
    faults = trt_faults(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert any("soft" in f and "stay in float" in f for f in faults)
    assert any("product" in f and "per channel" in f for f in faults)


def test_rescaling_keeps_the_range() -> None:
    """[lo, hi] in uint8 becomes [-m, m]: values are exact to half a step, and none saturates."""
    scale, zero = 0.02, 30
    values = np.linspace(-zero * scale, (255 - zero) * scale, 400, dtype=np.float32)[None]
    constants = [numpy_helper.from_array(np.float32(scale), "s"), numpy_helper.from_array(np.uint8(zero), "z")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 400]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    rescale_to_int8(model)
    step = 225 * scale / 127
    np.testing.assert_allclose(run_model(model, values), values, atol=step / 2 + 1e-6)


@pytest.mark.parametrize("which", ["cnn_onnx", "vit_onnx"])
def test_half_precision_computes_the_same(which: str, scene_pixels: np.ndarray, request: pytest.FixtureRequest) -> None:
    model: onnx.ModelProto = request.getfixturevalue(which)
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert not any(i.data_type == TensorProto.FLOAT for i in half.graph.initializer)
    assert centred_cosine(run_model(model, scene_pixels), run_model(half, scene_pixels)).min() > 0.999


@pytest.mark.parametrize("dead", [1e-12, 1e-7, 1e-4])
def test_a_dead_channel_does_not_prevent_int8_for_tensorrt(
    dead: float, cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    """Its scale underflows in float16: a zero scale would be refused, and a rounded one changes the weights."""
    model = onnx.ModelProto()
    model.CopyFrom(cnn_onnx)
    stem = next(n for n in model.graph.node if n.op_type == "Conv")
    tensor = next(i for i in model.graph.initializer if i.name == stem.input[1])
    weight = numpy_helper.to_array(tensor).copy()
    weight[0] *= dead / np.abs(weight[0]).max()
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    quantised = for_tensorrt.quantize(model, choose(cnn_ranges, "minmax"), Candidate(name="x", signed=True))
    half = to_half(quantised)
    check_trt_qdq(half)
    graph = Graph(half)
    pair = graph.dequantized(next(n for n in graph.nodes if n.name == stem.name).input[1])
    assert pair is not None
    stored, scale = graph.constant(pair.input[0]), graph.constant(pair.input[1])
    assert stored is not None and scale is not None and scale.dtype == np.float16
    restored = stored.astype(np.float64) * scale.astype(np.float64).reshape(-1, 1, 1, 1)
    step = np.maximum(np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127, 2.0**-17).reshape(-1, 1, 1, 1)
    assert (np.abs(restored - weight) <= 0.51 * step + 1e-3 * np.abs(weight)).all()
    assert centred_cosine(run_model(quantised, scene_pixels), run_model(half, scene_pixels)).mean() > 0.98


def test_scales_along_another_axis_are_a_fault(trt_model: onnx.ModelProto) -> None:
    turned = onnx.ModelProto()
    turned.CopyFrom(trt_model)
    graph = Graph(turned)
    weight = next(
        pair
        for n in graph.nodes
        if n.op_type == "Conv" and (pair := graph.dequantized(n.input[1])) and len(graph.constant(pair.input[1])) > 1
    )
    next(a for a in weight.attribute if a.name == "axis").i = -4  # the same axis, from the other end
    assert trt_faults(turned) == []
    next(a for a in weight.attribute if a.name == "axis").i = 1
    assert any("another axis" in fault for fault in trt_faults(turned))


def test_a_weight_beyond_half_precision_is_refused(cnn_onnx: onnx.ModelProto) -> None:
    huge = onnx.ModelProto()
    huge.CopyFrom(cnn_onnx)
    weight = next(i for i in huge.graph.initializer if len(i.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), 1e6, np.float32), weight.name))
    with pytest.raises(ArtifactError, match="65504"):
        to_half(huge)


def test_sensitivity_ranks_the_layer_that_was_made_bad_first(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    names = read_facts(cnn_onnx).weighted
    chosen = choose(cnn_ranges, "minmax")
    victim = next(n for n in cnn_onnx.graph.node if n.name == names[2])
    chosen[victim.input[0]] = (-1e4, 1e4)  # a range a thousand times too wide
    costs = measure(cnn_onnx, chosen, scene_pixels[:16], names)
    assert set(costs) == set(names)
    assert next(iter(costs)) == names[2]
    assert list(costs.values()) == sorted(costs.values(), reverse=True)


def test_sensitivity_tells_the_smallest_costs_apart(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    """Residual branches that contribute almost nothing, as after a short training that starts them at zero."""
    faint = onnx.ModelProto()
    faint.CopyFrom(cnn_onnx)
    graph, random = Graph(faint), np.random.default_rng(0)
    branches = []
    for node in graph.nodes:
        tensor = graph.initializers[node.input[1]] if node.op_type == "Conv" else None
        if tensor is not None and not numpy_helper.to_array(tensor).any():  # timm's, before any training
            value = 1e-5 * random.normal(size=list(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
            branches.append(node.name)
    images = scene_pixels[:16]
    chosen = choose(ranges.collect(faint, [images], input_name="pixels"), "minmax")
    names = read_facts(faint).weighted
    costs = measure(faint, chosen, images, names)
    assert branches and all(0 < costs[name] < 6e-8 for name in branches)  # 0 as 1 minus a float32 cosine
    assert len(set(costs.values())) == len(names)
    worst = next(iter(costs))
    one = run_model(_quantise_one(faint, worst, chosen), images)
    assert costs[worst] == pytest.approx(1 - centred_cosine(run_model(faint, images), one).mean(), rel=1e-6)


def test_sensitivity_refuses_a_layer_that_it_cannot_quantise(
    cnn_onnx: onnx.ModelProto, cnn_ranges: dict[str, Histogram], scene_pixels: np.ndarray
) -> None:
    chosen = choose(cnn_ranges, "minmax")
    for names, known in ((["nobody"], chosen), (read_facts(cnn_onnx).weighted[:1], {})):
        with pytest.raises(ArtifactError, match=f"{names[0]}.* is not in the graph, or has no measured input range"):
            measure(cnn_onnx, known, scene_pixels[:2], names)


def test_graph_facts(cnn_onnx: onnx.ModelProto, vit_onnx: onnx.ModelProto) -> None:
    cnn, vit = read_facts(cnn_onnx), read_facts(vit_onnx)
    assert (cnn.kind, vit.kind) == ("cnn", "vit")
    assert len(cnn.weighted) == sum(n.op_type == "Conv" for n in cnn_onnx.graph.node)
    assert vit.weighted[0] == next(n.name for n in vit_onnx.graph.node if n.op_type == "Conv")
    assert cnn.head == vit.head == ()


@pytest.mark.parametrize("fmt", ["onnx", "openvino", "trt"])
def test_the_ladder_has_every_range_rule_and_correction(fmt: str, cnn_onnx: onnx.ModelProto) -> None:
    facts = read_facts(cnn_onnx)
    rungs = ladder(fmt, facts, Machine())  # type: ignore[arg-type]
    assert rungs[0].ranges == "minmax"
    if fmt == "openvino":
        assert {(r.mean_ranges, r.asymmetric) for r in rungs} >= {(True, False), (True, True), (False, True)}
        assert len({r.form for r in rungs}) == 2  # ranges and bias correction do not change the speed
        assert {(r.full_bias, r.keep_bias) for r in rungs} == {(False, False), (True, False), (False, True)}
    else:
        assert {r.ranges for r in rungs} >= {"minmax", "mse", "entropy"}


@pytest.mark.parametrize("kind", ["cnn_onnx", "vit_onnx"])
@pytest.mark.parametrize("fmt", ["onnx", "ort", "openvino", "trt", "executorch", "litert"])
def test_ladders_start_plain(kind: str, fmt: str, request: pytest.FixtureRequest) -> None:
    facts = read_facts(request.getfixturevalue(kind))
    rungs = ladder(fmt, facts, Machine())  # type: ignore[arg-type]
    assert len({r.name for r in rungs}) == len(rungs)
    assert not rungs[0].float_nodes and not rungs[0].full_bias and all(r.precision == "int8" for r in rungs)
    if kind == "vit_onnx" and fmt in ("onnx", "openvino"):
        assert {r.smooth_alpha for r in rungs if r.quantiser == "nncf"} >= {None, 0.5, 0.15}
    if fmt == "executorch":  # static activations break a ViT there, and each candidate takes a minute
        assert (rungs[0].activations == "dynamic") == (kind == "vit_onnx")


def test_the_cpu_decides_the_activation_type(cnn_onnx: onnx.ModelProto) -> None:
    facts = read_facts(cnn_onnx)
    plain = ladder("onnx", facts, Machine())[0]
    assert plain.reduce_range and not plain.signed
    assert not ladder("onnx", facts, Machine(vnni=True))[0].reduce_range
    assert all(c.reduce_range for c in ladder("openvino", facts, Machine()))
    assert not any(c.reduce_range for c in ladder("openvino", facts, Machine(vnni=True)))
    arm = ladder("onnx", facts, Machine(arm=True))[0]
    assert arm.signed and not arm.reduce_range


@pytest.mark.parametrize("fmt", ["onnx", "openvino", "litert", "trt"])
def test_healed_candidates_keep_the_biases_that_were_trained(fmt: str, cnn_onnx: onnx.ModelProto) -> None:
    plain = ladder(fmt, read_facts(cnn_onnx), Machine())  # type: ignore[arg-type]
    healed = healed_candidates(plain)
    assert len({c.name for c in (*plain, *healed)}) == len(plain) + len(healed)
    assert all(c.healed and c.activations != "float" for c in healed)
    assert all(c.keep_bias != c.full_bias for c in healed if c.quantiser == "nncf")
    settings = [dataclasses.replace(c, name="") for c in healed]
    assert len(set(settings)) == len(settings)
    assert {c.form for c in healed} <= {c.form for c in plain}  # as fast as from the student's own weights
    assert [c.ranges for c in healed].count("trained") == (fmt != "litert")


def test_sensitive_candidates_keep_the_worst_layers_in_float() -> None:
    ranking = [f"layer{i}" for i in range(20)]
    rungs = sensitive_candidates(Candidate(name="best", float_nodes=("stem",)), ranking)
    assert [r.float_nodes[1:] for r in rungs] == [tuple(ranking[:count]) for count in (1, 2, 4)]
    assert [r.name for r in rungs[:2]] == ["best, worst layer in float", "best, 2 worst layers in float"]


def test_sensitive_candidates_repeat_no_set_of_layers() -> None:
    plain, ranking = Candidate(name="plain"), [f"layer{i}" for i in range(20)]
    stem = dataclasses.replace(plain, name="stem in float", float_nodes=("layer0",))
    pair = dataclasses.replace(plain, name="pair in float", float_nodes=("layer2", "layer1", "layer0"))
    other = dataclasses.replace(plain, name="other ranges", ranges="mse", float_nodes=("layer0", "layer1"))
    kept = [set(r.float_nodes) for r in sensitive_candidates(plain, ranking, [plain, stem, pair, other])]
    assert kept == [set(ranking[:2]), set(ranking[:4])]
    # What the best one keeps in float already is not added again.
    assert sensitive_candidates(stem, ranking, [stem])[0].float_nodes == ("layer0", "layer1")
    assert sensitive_candidates(plain, ["only"]) == []


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_nncf_quantises_a_transformer_on_onnx(
    vit_onnx: onnx.ModelProto, scene_pixels: np.ndarray, smooth: float | None
) -> None:
    candidate = Candidate(name="x", quantiser="nncf", transformer=True, smooth_alpha=smooth)
    quantised = by_nncf.quantize_onnx(vit_onnx, scene_pixels[:16], candidate)
    assert quantized_nodes(quantised)
    assert centred_cosine(run_model(vit_onnx, scene_pixels), run_model(quantised, scene_pixels)).mean() > 0.9


def test_nncf_leaves_room_where_sums_saturate(cnn_onnx: onnx.ModelProto, scene_pixels: np.ndarray) -> None:
    """AVX2 without VNNI adds pairs of 8-bit products in 16 bits: weights of 7 bits keep every sum within them."""
    reach = {}
    for reduce_range in (False, True):
        candidate = Candidate(name="x", quantiser="nncf", reduce_range=reduce_range)
        graph = Graph(by_nncf.quantize_onnx(cnn_onnx, scene_pixels[:16], candidate))
        pairs = [graph.dequantized(node.input[1]) for node in graph.nodes if node.op_type == "Conv"]
        reach[reduce_range] = [int(np.abs(_stored_weight(graph, pair)).max()) for pair in pairs if pair is not None]
    assert len(reach[True]) > 3 and max(reach[True]) <= 64
    assert reach[False][0] > 64  # NNCF's default keeps 7 bits in the first layer, also where nothing saturates


def _stored_weight(graph: Graph, pair: onnx.NodeProto) -> np.ndarray:
    """The integers that a DequantizeLinear reads, stored or quantised from a constant."""
    stored = graph.constant(pair.input[0])
    if stored is None:
        quantise = graph.producers[pair.input[0]]
        weight, scale = graph.constant(quantise.input[0]), graph.constant(quantise.input[1])
        assert weight is not None and scale is not None
        stored = np.clip(np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))), -128, 127)
    return stored.astype(np.int32)
