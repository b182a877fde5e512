"""Real bundles of tiny models (one convolution, which ONNX Runtime and OpenVINO both open), and a real sshd."""

import contextlib
import dataclasses
import getpass
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from robx.cli import main
from robx.records import Bundle, Preprocessing, Student, TensorSpec, describe_file, from_json, save_bundle
from robx.runtime.bench import profiles
from robx.runtime.bench.profiles import PROFILES
from robx.trunk import build_trunk, embedding_width, save_trunk
from tests.runtime.adbd import Adbd

PREPROCESSING = Preprocessing(size=36, crop=32, interpolation="bilinear")
WIDTH = 8


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, 3, 3, 3)).astype(np.float32)


def save_model(path: Path, *, batch: int | None, kernel: np.ndarray) -> None:
    axis = "N" if batch is None else batch
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["embedding"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [axis, 3, 32, 32])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [axis, WIDTH])],
        [numpy_helper.from_array(kernel, "w"), numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, str(path))


def expected_answers(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The model's outputs computed with numpy."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,dcij->ndhw", windows, kernel), 0).mean(axis=(2, 3))


@pytest.fixture
def make_bundle(tmp_path):
    """make_bundle(name, runtime=..., precision=..., batch=..., kernel=...) -> the bundle's folder."""

    def make(name="onnx-fp32", *, runtime="onnxruntime", precision="fp32", batch=None, kernel=None, **changes):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        save_model(folder / "model.onnx", batch=batch, kernel=weights() if kernel is None else kernel)
        student = Student(
            timm_name="resnet18",
            width=WIDTH,
            preprocessing=PREPROCESSING,
            sha256="0" * 64,
            teacher=None,
            data=None,
            recipe={},
        )
        bundle = Bundle(
            format="onnx",
            precision=precision,
            requested=precision,
            target="local",
            runtime=runtime,
            inputs=(TensorSpec(name="images", dtype="float32", shape=(batch, 3, 32, 32)),),
            outputs=(TensorSpec(name="embedding", dtype="float32", shape=(batch, WIDTH)),),
            preprocessing=PREPROCESSING,
            student=student,
            verdict="PASS",
            reason="made by a test",
            rungs=(),
            calibration=None,
            opset=20,
            versions={},
            files=(describe_file(folder, "model.onnx", "model"),),
        )
        save_bundle(dataclasses.replace(bundle, **changes), folder)
        return folder

    return make


@pytest.fixture
def make_unopenable_bundle(make_bundle):
    """Like make_bundle, but with an operator that no engine has: a valid file that cannot be opened."""

    def make(*names, **changes):
        folder = make_bundle(*names, **changes)
        model = onnx.load(str(folder / "model.onnx"))
        model.graph.node[1].op_type, model.graph.node[1].domain = "Nowhere", "nowhere"
        model.opset_import.append(helper.make_opsetid("nowhere", 1))
        onnx.save(model, str(folder / "model.onnx"))
        seal(folder)
        return folder

    return make


def seal(folder: Path) -> None:
    """Update the hash of the model in `folder` in its manifest."""
    bundle = from_json(Bundle, json.loads((folder / "manifest.json").read_text()))
    save_bundle(dataclasses.replace(bundle, files=(describe_file(folder, "model.onnx", "model"),)), folder)


@pytest.fixture
def make_student_bundle(tmp_path, make_bundle):
    """make_student_bundle() -> the folder of a real student's fp32 bundle; the student is in its parent folder."""

    def make():
        torch.manual_seed(0)
        trunk = build_trunk("test_resnet").eval()
        record = Student(
            timm_name="test_resnet",
            width=embedding_width(trunk),
            preprocessing=PREPROCESSING,
            sha256="",
            teacher=None,
            data=None,
            recipe={},
        )
        student = save_trunk(tmp_path / "run", trunk, record)
        folder = make_bundle(
            student=student,
            inputs=(TensorSpec(name="images", dtype="float32", shape=(1, 3, 32, 32)),),
            outputs=(TensorSpec(name="embedding", dtype="float32", shape=(1, student.width)),),
        )
        names = {"input_names": ["images"], "output_names": ["embedding"]}
        example = (torch.zeros(1, 3, 32, 32),)
        torch.onnx.export(trunk, example, str(folder / "model.onnx"), dynamo=False, opset_version=18, **names)
        seal(folder)
        return folder

    return make


@pytest.fixture
def call():
    """call("bench", ...) -> the command line's result."""

    def invoke(*arguments):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return invoke


@pytest.fixture
def images():
    return np.random.default_rng(3).normal(size=(5, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def short_profile(monkeypatch):
    """The rapid profile in a tenth of its time; an UNSTABLE bundle is not measured again."""
    short = dataclasses.replace(
        PROFILES["rapid"], seconds=0.4, processes=2, warm_up_seconds=0.03, warm_up_limit=0.1, max_seconds=20
    )
    monkeypatch.setitem(PROFILES, "rapid", short)
    monkeypatch.setattr(profiles, "RETRY_SECONDS", 0.0)
    return short


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def shims(tmp_path, monkeypatch):
    """A folder that comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder of this process, and of a "device" that is this machine."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def ssh_device(start_sshd):
    """ssh:// address of a real sshd on the loopback interface: this machine as its own device."""
    return start_sshd()


@pytest.fixture
def start_adbd(tmp_path, monkeypatch):
    """start_adbd(**settings) -> a device (tests/runtime/adbd.py) for the real adb.

    The adb server, its port and its keys are the test's own.
    """
    if shutil.which("adb") is None:
        pytest.skip("adb is not installed (Debian: adb)")
    home = tmp_path / "adb-home"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "5554")  # look for no emulators of this machine
    monkeypatch.setenv("HOME", str(home))
    for name in ("ANDROID_SERIAL", "ADB_VENDOR_KEYS", "ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.ExitStack() as devices:

        def start(**settings):
            folder = tmp_path / f"android-{len(list(tmp_path.glob('android-*')))}"
            folder.mkdir()
            return devices.enter_context(Adbd(folder, **settings))

        yield start
        subprocess.run(["adb", "kill-server"], capture_output=True)


def _with_path(home: Path, path: str) -> Path:
    """A script that does what the client asks for with another PATH, whatever the user's shell set."""
    sftp = "/usr/lib/openssh/sftp-server"
    what = f'case "$SSH_ORIGINAL_COMMAND" in *sftp*) exec {sftp};; *) exec sh -c "$SSH_ORIGINAL_COMMAND";; esac'
    return script(home / "command", f"PATH={path}\nexport PATH\n{what}")


@pytest.fixture
def start_sshd(tmp_path, shims):
    """start_sshd(folder=None, mount=None, path=None) -> ssh:// address of a real sshd with keys of its own.

    The device puts its files in `folder`; `mount` is a shell command that mounts it, in a namespace of the device.
    `path` is its PATH.
    """
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None:
        pytest.skip("sshd is not installed (Debian: openssh-server)")
    home = tmp_path / "sshd"
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
    shutil.copy(home / "user.pub", home / "authorized")
    (home / "config").write_text(f"Host *\n IdentityFile {home}/user\n UserKnownHostsFile {home}/known\n")
    for name in ("ssh", "scp"):
        script(shims / name, f'exec {shutil.which(name)} -F {home}/config "$@"')
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges to
    servers = []

    def start(folder=None, mount=None, path=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (home / "known").write_text(f"[127.0.0.1]:{port} {(home / 'host.pub').read_text()}")
        (home / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized\n"
            f"StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile {home}/pid\nSubsystem sftp internal-sftp\n"
            + (f"SetEnv TMPDIR={folder}\n" if folder else "")
            + (f"ForceCommand {_with_path(home, path)}\n" if path else "")
        )
        command = [sshd, "-D", "-e", "-f", str(home / "sshd_config")]
        if mount:
            command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        return f"ssh://{getpass.getuser()}@127.0.0.1:{port}"

    yield start
    for server in servers:
        server.terminate()
        server.wait(timeout=10)
