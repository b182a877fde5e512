"""The native runner on LiteRT's library against LiteRT's Python package; skipped where that is not installed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from robx.records import Bundle, describe_file, from_json, save_bundle
from robx.runtime.bench.native_runner import device_abi, native_folder
from robx.runtime.device_build import build
from tests.runtime.device.test_native import Job

WHERE = "ai_edge_litert is not installed here: make test-mobile runs this in .venv-litert"
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=WHERE)
flatbuffers = pytest.importorskip("flatbuffers", reason=WHERE)
pytestmark = [
    pytest.mark.mobile,
    pytest.mark.skipif(
        not shutil.which("cmake") or not shutil.which("c++"), reason="no cmake and C++ compiler (Debian: cmake, g++)"
    ),
]
WIDTH, PIXELS = 8, 3 * 32 * 32
INPUT, WEIGHT, OUTPUT = (0.05, -3), (0.02, 0), (0.4, 5)  # scale and zero point of the int8 model


def _tensor(name, shape, kind, buffer, quantization):
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
    if quantization:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [quantization[0]], [quantization[1]]
    return tensor


def _buffer(array):
    buffer = schema.BufferT()
    if array is not None:
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
    return buffer


def _operator(index, inputs, outputs, options, kind):
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = index, inputs, outputs
    operator.builtinOptions, operator.builtinOptionsType = options, kind
    return operator


def tflite(*, int8):
    """(1, 3, 32, 32) -> (1, 8): a reshape and a matrix product."""
    weights = np.random.default_rng(1).normal(size=(WIDTH, PIXELS))
    kinds, codes = schema.TensorType, schema.BuiltinOperator
    kind, sums = (kinds.INT8, kinds.INT32) if int8 else (kinds.FLOAT32, kinds.FLOAT32)
    stored = np.clip(np.rint(weights / WEIGHT[0]), -127, 127).astype(np.int8) if int8 else weights.astype(np.float32)
    flat = np.array([1, PIXELS], np.int32)
    graph = schema.SubGraphT()
    graph.tensors = [
        _tensor("images", (1, 3, 32, 32), kind, 0, int8 and INPUT),
        _tensor("shape", (2,), kinds.INT32, 1, None),
        _tensor("flat", (1, PIXELS), kind, 0, int8 and INPUT),
        _tensor("weights", weights.shape, kind, 2, int8 and WEIGHT),
        _tensor("bias", (WIDTH,), sums, 3, int8 and (INPUT[0] * WEIGHT[0], 0)),
        _tensor("embedding", (1, WIDTH), kind, 0, int8 and OUTPUT),
    ]
    graph.inputs, graph.outputs = [0], [5]
    reshape, product = schema.ReshapeOptionsT(), schema.FullyConnectedOptionsT()
    reshape.newShape = flat
    graph.operators = [
        _operator(0, [0, 1], [2], reshape, schema.BuiltinOptions.ReshapeOptions),
        _operator(1, [2, 3, 4], [5], product, schema.BuiltinOptions.FullyConnectedOptions),
    ]
    model = schema.ModelT()
    model.version, model.subgraphs = 3, [graph]
    bias = np.zeros(WIDTH, np.int32 if int8 else np.float32)
    model.buffers = [_buffer(None), _buffer(flat), _buffer(stored), _buffer(bias)]
    model.operatorCodes = []
    for code, version in ((codes.RESHAPE, 1), (codes.FULLY_CONNECTED, 4 if int8 else 1)):
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, code, version
        model.operatorCodes.append(entry)
    signature, source, target = schema.SignatureDefT(), schema.TensorMapT(), schema.TensorMapT()
    (source.name, source.tensorIndex), (target.name, target.tensorIndex) = ("images", 0), ("embedding", 5)
    signature.signatureKey, signature.inputs, signature.outputs = "serving_default", [source], [target]
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        abi = device_abi(os.uname().machine)
        assert {library["runtime"] for library in build(abi)["libraries"]} == {"onnxruntime", "litert"}
        return native_folder(abi)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_its_outputs_are_the_python_packages_bit_for_bit(make_bundle, tmp_path, runner, int8):
    bundle = make_bundle(batch=1, runtime="litert", format="litert")
    (bundle / "model.tflite").write_bytes(tflite(int8=int8))
    record = from_json(Bundle, json.loads((bundle / "manifest.json").read_text()))
    files = (describe_file(bundle, "model.tflite", "model"),)
    save_bundle(dataclasses.replace(record, files=files), bundle)
    folder = tmp_path / "job"
    folder.mkdir()
    images = np.random.default_rng(3).normal(size=(6, 3, 32, 32)).astype(np.float32)
    job = Job(folder, bundle, images, runner)
    native, python = job.measured(latency=False), job.measured("python", latency=False)
    assert native.seen.all() and native.outputs.tobytes() == python.outputs.tobytes()
    assert np.unique(native.outputs).size > WIDTH
    facts = native.report["facts"]
    assert facts["fully_delegated"] and facts["provider"] == python.report["facts"]["provider"] == "xnnpack"
    assert facts["input_dtype"] == python.report["facts"]["input_dtype"] == ("int8" if int8 else "float32")
