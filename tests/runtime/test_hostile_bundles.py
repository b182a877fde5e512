"""Bundles with false manifests, wrong outputs or endless loops: one line each; nothing hangs or fills the memory."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robx.errors import DeviceError
from robx.records import Bundle, describe_file, from_json, load_bundle, save_bundle
from robx.runtime.session import open_session, run_within

SHORT_WAIT = "import robx.runtime.session as s; s.RUN_SECONDS = {}; from robx.cli import main; main()"


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder


def replace_graph(folder, nodes, output, initializers=()):
    """Put another graph with the input "images" into the bundle; its hash is right."""
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, output)],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, str(folder / "model.onnx"))
    manifest = load_manifest(folder)
    save_bundle(dataclasses.replace(manifest, files=(describe_file(folder, "model.onnx", "model"),)), folder)
    return folder


def load_manifest(folder):
    return from_json(Bundle, json.loads((folder / "manifest.json").read_text()))


def set_input(shape):
    return lambda m: m["inputs"][0].update(shape=shape)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.update(inputs=[]), "lists no input"),
        (lambda m: m.update(outputs=[]), "lists no output"),
        (set_input([]), "has shape [], which is not (N, 3, H, W)"),
        (set_input([1, 3, 32]), "which is not (N, 3, H, W)"),
        (set_input([0, 3, 32, 32]), "which is not (N, 3, H, W)"),
        (set_input([1, 3, 64, 64]), "the model takes images of shape [3, 64, 64] and preprocessing makes [3, 32, 32]"),
        (set_input([1, 4, 32, 32]), "the model takes images of shape [4, 32, 32]"),
        (set_input([10**9, 3, 32, 32]), "a batch of 1000000000 images of 32 x 32 px"),
        (
            lambda m: [
                m["preprocessing"].update(size=64, crop=32, crop_width=64),
                m["inputs"][0].update(shape=[10**9, 3, 32, 64]),
            ],
            "a batch of 1000000000 images of 32 x 64 px",  # height x width, as --size
        ),
        (set_input([10**400, 3, 32, 32]), "is too large"),
        (lambda m: m["outputs"][0].update(shape=[]), "has shape [], which is not (N, D)"),
        (lambda m: m["preprocessing"].update(crop=8192, size=8192), "must be between 1 and 4096 pixels"),
        (lambda m: m["preprocessing"].update(crop=4096, size=4096), "preprocessing makes [3, 4096, 4096]"),
    ],
)
def test_a_manifest_that_cannot_be_true(call, make_bundle, scenes, change, line):
    bundle = edit(make_bundle(), change)
    for command in (("run", bundle, scenes / "test"), ("bench", bundle), ("inspect", bundle)):
        done = call(*command)
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
        assert line in done.stderr and len(done.stderr) < 600


def test_an_input_that_is_not_square_is_taken(make_bundle):
    def set_width(manifest):
        set_input([1, 3, 32, 48])(manifest)
        manifest["preprocessing"]["crop_width"] = 48

    assert load_bundle(edit(make_bundle(), set_width)).preprocessing.shape == (32, 48)


def test_a_batch_that_does_not_fit_is_refused_before_any_image_is_made(call, make_bundle):
    done = call("bench", make_bundle(), "--batch", 10**7)
    assert done.exit_code == 2 and "use at most 87381" in done.stderr


AXES = numpy_helper.from_array(np.array([0, 1, 2, 3], dtype=np.int64), "axes")
OUTPUTS = {
    "scalar": ([helper.make_node("ReduceMean", ["images", "axes"], ["embedding"], keepdims=0)], [], [AXES]),
    "three dimensions": ([helper.make_node("ReduceMax", ["images"], ["m"], keepdims=1),
                          helper.make_node("Squeeze", ["m", "one"], ["embedding"])], ["a", "b", "c"],
                         [numpy_helper.from_array(np.array([3], dtype=np.int64), "one")]),
    "no rows": ([helper.make_node("Flatten", ["images"], ["f"]),
                 helper.make_node("Slice", ["f", "none", "none"], ["embedding"])], ["a", "b"],
                [numpy_helper.from_array(np.array([0], dtype=np.int64), "none")]),
    "another width": ([helper.make_node("Flatten", ["images"], ["embedding"])], ["a", 3072], []),
}  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_is_not_what_the_manifest_says(call, make_bundle, images, short_profile, kind, runtime):
    nodes, shape, initializers = OUTPUTS[kind]
    bundle = replace_graph(make_bundle(runtime=runtime), nodes, shape, initializers)
    with pytest.raises(DeviceError, match=r"shape \(.*\), expected \(5, 8\)"), open_session(bundle) as session:
        session.run(images)
    done = call("bench", bundle, "--profile", "rapid", "--processes", 1)
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()[-1:]) == 1
    assert "expected (1, 8)" in done.stderr


def nan_bundle(make_bundle):
    return make_bundle(kernel=np.full((8, 3, 3, 3), np.nan, np.float32))


def test_an_output_of_nan_is_refused(call, make_bundle, scenes, tmp_path):
    bundle = nan_bundle(make_bundle)
    image = next((scenes / "test").rglob("*.png"))
    for more in ((), ("--out", tmp_path / "x.npz")):
        done = call("run", bundle, image, *more)
        assert done.exit_code == 2 and not done.stdout and not (tmp_path / "x.npz").exists()
        assert f"the output for {image} contains NaN or infinity" in done.stderr


def endless(folder):
    """A loop of 2^62 rounds that returns its input's mean."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["cond_in"], ["cond_out"]), helper.make_node("Cos", ["v_in"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Flatten", ["images"], ["f"]),
        helper.make_node("Slice", ["f", "zero", "eight", "one"], ["s"]),
        helper.make_node("Loop", ["rounds", "true", "s"], ["embedding"], body=body),
    ]
    constants = {"rounds": 2**62, "zero": [0], "eight": [8], "one": [1]}
    initializers = [numpy_helper.from_array(np.array(v, dtype=np.int64), k) for k, v in constants.items()]
    return replace_graph(folder, nodes, ["N", 8], [*initializers, numpy_helper.from_array(np.array(True), "true")])


def start(bundle, *arguments, seconds):
    command = [sys.executable, "-c", SHORT_WAIT.format(seconds), *(str(a) for a in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_loop_without_end_is_given_up(make_bundle, scenes, runtime):
    bundle = endless(make_bundle(runtime=runtime))
    image = next((scenes / "test").rglob("*.png"))
    done = start(bundle, "run", bundle, image, seconds=1)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 2, errors
    assert errors.splitlines() == ["robx: the engine did not process 1 images within 1 s: check the model file"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_without_end_obeys_signals(make_bundle, scenes, number):
    bundle = endless(make_bundle())
    done = start(bundle, "run", bundle, next((scenes / "test").rglob("*.png")), seconds=600)
    time.sleep(6)
    assert done.poll() is None
    done.send_signal(number)
    _, errors = done.communicate(timeout=20)
    assert done.returncode in (1, -signal.SIGTERM), errors


def test_run_within_passes_outputs_and_errors_on(make_bundle, images):
    with open_session(make_bundle()) as session:
        np.testing.assert_array_equal(run_within(session, images), session.run(images))
        with pytest.raises(Exception, match="the model takes float32"):
            run_within(session, images[0])


IR = (
    '<?xml version="1.0"?>{head}<net name="n" version="11"><layers><layer id="0" name="x" type="Parameter" '
    'version="opset1"/></layers><edges/></net>'
)
BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (IR.format(head=BOMB).encode(), "declares XML entities"),
        (IR.format(head='<!DOCTYPE net SYSTEM "file:///etc/passwd">').encode(), "declares XML entities"),
        (IR.format(head=BOMB).replace("1.0?", '1.0" encoding="utf-16?').encode("utf-16"), "is not UTF-8 text"),
        (IR.format(head=BOMB).encode("utf-16-be"), "is not UTF-8 text"),
    ],
)
def test_an_openvino_model_with_a_document_type_is_refused_before_it_runs(call, make_bundle, scenes, data, line):
    bundle = make_bundle(runtime="openvino", format="openvino")
    (bundle / "model.xml").write_bytes(data)
    files = (describe_file(bundle, "model.xml", "model"),)
    save_bundle(dataclasses.replace(load_manifest(bundle), files=files), bundle)
    for command in (("run", bundle, scenes / "test"), ("bench", bundle), ("inspect", bundle)):
        done = call(*command)
        assert done.exit_code == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.output
