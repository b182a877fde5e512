import os
import subprocess
import sys

import numpy as np
import pytest

from robx.errors import ArtifactError, DeviceError, InputError, MissingExtra
from robx.images.decode import normalise_pixels
from robx.records import Preprocessing, Student
from robx.runtime.session import SessionSettings, open_session
from robx.trunk import build_trunk, embed, embedding_width, save_trunk


def plain_answers(images):
    """The tiny model's outputs computed with numpy, independent of any engine."""
    kernel = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,dcij->ndhw", windows, kernel), 0).mean(axis=(2, 3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_engines_agree_with_numpy_for_every_batch(make_bundle, images, runtime, batch):
    with open_session(make_bundle(runtime=runtime, batch=batch)) as session:
        answers = session.run(images)
        again = session.run(images[:1])
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, plain_answers(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, answers[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_facts_report_what_is_in_use(make_bundle, runtime):
    threads = min(2, len(os.sched_getaffinity(0)))  # OpenVINO takes no more than there are cores, and says so
    with open_session(make_bundle(runtime=runtime), SessionSettings(threads=threads)) as session:
        facts = session.facts()
    assert facts["engine"] == runtime
    assert facts["threads"] == threads
    assert facts["fallback"] is False
    assert "CPU" in str(facts["provider"])


def test_outputs_are_copies(make_bundle, images):
    with open_session(make_bundle(runtime="openvino")) as session:
        first = session.run(images[:1])
        kept = first.copy()
        session.run(images[1:2])
    np.testing.assert_array_equal(first, kept)


def test_a_student_opens_in_torch(tmp_path, images):
    import torch

    torch.manual_seed(0)
    trunk = build_trunk("test_resnet").eval()
    student = Student(
        timm_name="test_resnet",
        width=embedding_width(trunk),
        preprocessing=Preprocessing(size=32, crop=32),
        sha256="",
        teacher=None,
        data=None,
        recipe={},
    )
    save_trunk(tmp_path / "run", trunk, student)
    with open_session(tmp_path / "run") as session:
        np.testing.assert_allclose(session.run(images), embed(trunk, torch.from_numpy(images)), rtol=1e-4, atol=1e-5)
        assert session.facts()["engine"] == "torch"


def test_pixels_are_taken_where_the_engine_normalises_them(tmp_path):
    trunk = build_trunk("test_resnet").eval()
    pre = Preprocessing(size=36, crop=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    record = Student(
        timm_name="test_resnet", width=embedding_width(trunk), preprocessing=pre, sha256="", teacher=None, data=None,
        recipe={},
    )  # fmt: skip
    save_trunk(tmp_path, trunk, record)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = np.stack([normalise_pixels(one, pre) for one in pixels])
    with open_session(tmp_path) as session:
        assert not session.takes_pixels  # on a CPU the threads that read images normalise them
        with pytest.raises(InputError, match="the model takes float32"):
            session.run(pixels)
        session._model.takes_pixels = True
        np.testing.assert_array_equal(session.run(pixels), session.run(images))
        with pytest.raises(InputError, match="images are uint8"):
            session.run(pixels[:, :16])


def test_wrong_inputs_are_refused(make_bundle, images):
    session = open_session(make_bundle())
    for wrong in (images.astype(np.float64), images[:, :2], images[0], images[:0]):
        with pytest.raises(InputError, match="the model takes float32"):
            session.run(wrong)
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="closed"):
        session.run(images)


def test_automatic_threads_are_refused():
    with pytest.raises(InputError, match="threads is 0"):
        SessionSettings(threads=0)
    with pytest.raises(InputError, match="batch is 0"):
        SessionSettings(batch=0)


def test_openvino_compiles_for_the_given_batch(make_bundle, images):
    for batch, said, shape in ((None, None, "[?,3,32,32]"), (None, 2, "[2,3,32,32]"), (1, 2, "[1,3,32,32]")):
        folder = make_bundle(f"ov-{batch}-{said}", runtime="openvino", batch=batch)
        with open_session(folder, SessionSettings(batch=said)) as session:
            assert session.facts()["input_shape"] == shape
            np.testing.assert_allclose(session.run(images), plain_answers(images), rtol=1e-4, atol=1e-5)


class OtherPrecision:
    """A compiled model that computes in another precision than requested, as on a CPU without f16."""

    def __init__(self, compiled):
        self._compiled = compiled

    def __getattr__(self, name):
        return getattr(self._compiled, name)

    def get_property(self, name):
        import openvino as ov

        return ov.Type.bf16 if name == "INFERENCE_PRECISION_HINT" else self._compiled.get_property(name)


def test_an_unavailable_precision_is_an_error_not_a_fallback(make_bundle, monkeypatch):
    with pytest.raises(DeviceError, match="types of the file, and bf16"):
        open_session(make_bundle(), SessionSettings(precision_hint="bf16"))
    import openvino as ov

    plain = ov.Core.compile_model
    monkeypatch.setattr(ov.Core, "compile_model", lambda *a: OtherPrecision(plain(*a)))
    with pytest.raises(DeviceError, match="computes in bf16 here and f32 was asked for"):
        open_session(make_bundle("ov", runtime="openvino"))


def test_an_unavailable_provider_is_an_error_not_a_fallback(make_bundle):
    with pytest.raises(DeviceError, match="CUDAExecutionProvider"):
        open_session(make_bundle(), SessionSettings(provider="cuda"))
    with pytest.raises(DeviceError, match="GPU"):
        open_session(make_bundle("ov", runtime="openvino"), SessionSettings(provider="gpu"))


def test_folders_that_are_not_bundles(tmp_path, make_bundle):
    with pytest.raises(InputError, match="neither a bundle"):
        open_session(tmp_path)
    folder = make_bundle()
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_session(folder)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_model_that_the_engine_cannot_open_is_one_line(make_unopenable_bundle, runtime):
    with pytest.raises(DeviceError, match="cannot run on this machine") as caught:
        open_session(make_unopenable_bundle(runtime=runtime))
    assert "\n" not in str(caught.value)


def test_an_engine_that_is_not_installed_names_its_extra(make_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"robx\[openvino\]"):
        open_session(make_bundle(runtime="openvino"))


def test_a_format_without_an_engine(make_bundle):
    with pytest.raises(ArtifactError, match="no engine 'coreml'"):
        open_session(make_bundle(runtime="coreml", format="coreml"))


def test_onnxruntime_writes_nothing_to_the_home_folder(make_bundle, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    code = "import sys, pathlib, robx.runtime.session as s; s.open_session(pathlib.Path(sys.argv[1])).close()"
    environment = {"HOME": str(home), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(make_bundle())], check=True, env=environment)
    assert list(home.rglob("*")) == []
