"""The engine cache with a real builder, and execution with stand-ins for a GPU that this machine may not have.

The stand-in keeps device memory in numpy and "computes" the sum of each image: it shows that shapes, types, addresses
and batches are right, and nothing about a real GPU's numbers.
"""

from __future__ import annotations

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from robx.runtime.engines import on_tensorrt

MISSING = "tensorrt_rtx is not installed: pip install 'robx[trt-rtx]'"
GPU = {"name": "NVIDIA L4", "capability": "8.9"}
MANIFEST = {
    "runtime": "tensorrt_rtx",
    "inputs": [{"name": "pixels", "dtype": "float32", "shape": [None, 3, 4, 4]}],
    "outputs": [{"name": "embedding", "dtype": "float32", "shape": [None, 2]}],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose model is the mean of each channel."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, 4, 4])
    y = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3])
    node = helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0)
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [axes]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, folder / "model.onnx")
    recipe = {
        "runtime": "tensorrt_rtx",
        "onnx": {"path": "model.onnx", "sha256": sha256(folder / "model.onnx")},
        "profile": {"pixels": [[1, 3, 4, 4], [1, 3, 4, 4], [4, 3, 4, 4]]},
        "flags": {"strongly_typed": True, "tf32": True},
        "engines": [],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(trt: Any, bundle: Path, cache: Path, *, gpu: dict[str, Any] = GPU, **changed: Any) -> tuple[bytes, str]:
    recipe = {**json.loads((bundle / "recipe.json").read_text()), **changed}
    return on_tensorrt.load_engine(trt, bundle, recipe, gpu, cache)


def test_a_real_engine_is_built_once_and_cached(bundle: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason=MISSING)
    cache = tmp_path / "cache"
    plan, source = load(trt, bundle, cache)
    assert source == "built"
    assert len(plan) > 1000
    assert load(trt, bundle, cache) == (plan, "cache")
    assert cache.stat().st_mode & 0o077 == 0  # an engine is code: nobody else writes one here


def test_any_change_builds_a_new_engine(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = types.SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    built: list[str] = []
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: built.append("x") or f"engine {len(built)}".encode())
    cache = tmp_path / "cache"
    first = load(trt, bundle, cache)
    assert first == (b"engine 1", "built")
    for gpu in ({"name": "NVIDIA L40", "capability": "8.9"}, {"name": "NVIDIA L4", "capability": "8.6"}):
        assert load(trt, bundle, cache, gpu=gpu)[1] == "built"
    assert load(types.SimpleNamespace(__name__="tensorrt", __version__="10.4.0"), bundle, cache)[1] == "built"
    assert load(types.SimpleNamespace(__name__="tensorrt_rtx", __version__="10.3.0"), bundle, cache)[1] == "built"
    assert load(trt, bundle, cache, flags={"strongly_typed": True, "tf32": False})[1] == "built"
    assert load(trt, bundle, cache, profile={})[1] == "built"
    assert len(built) == 7
    assert load(trt, bundle, cache) == (b"engine 1", "cache")


def test_a_changed_engine_is_never_opened(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = types.SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: b"sound")
    cache = tmp_path / "cache"
    load(trt, bundle, cache)
    (engine,) = cache.glob("*.engine")
    engine.write_bytes(b"evil!")
    assert load(trt, bundle, cache) == (b"sound", "built")
    ready = {"path": "ready.engine", "runtime": "tensorrt", "version": "10.3.0", "capabilities": ["SM89"]}
    (bundle / "ready.engine").write_bytes(b"evil!")
    ready["sha256"] = hashlib.sha256(b"ahead of time").hexdigest()
    assert load(trt, bundle, cache, engines=[ready]) == (b"sound", "cache")


def test_an_engine_built_ahead_of_time_serves_its_capabilities_only(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = types.SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1.116")
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: b"built here")
    (bundle / "ready.engine").write_bytes(b"ahead of time")
    ready = {
        "path": "ready.engine",
        "sha256": hashlib.sha256(b"ahead of time").hexdigest(),
        "runtime": "tensorrt_rtx",
        "version": "1.7.1.116",
        "capabilities": ["SM86", "SM89"],
    }
    cache = tmp_path / "cache"
    assert load(trt, bundle, cache, engines=[ready]) == (b"ahead of time", "bundle")
    blackwell = {"name": "RTX 5090", "capability": "12.0"}
    assert load(trt, bundle, cache, gpu=blackwell, engines=[ready]) == (b"built here", "built")
    assert load(trt, bundle, cache, engines=[{**ready, "version": "1.6.0"}])[1] == "built"


def test_an_onnx_file_that_does_not_match_the_recipe_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"another")
    with pytest.raises(RuntimeError, match="not the file that the recipe was written for"):
        load(types.SimpleNamespace(__name__="tensorrt", __version__="10"), bundle, tmp_path)


def test_a_full_or_read_only_cache_does_not_stop_the_model(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: b"engine")
    (tmp_path / "cache").write_text("a file where a folder should be")
    trt = types.SimpleNamespace(__name__="tensorrt", __version__="10")
    assert load(trt, bundle, tmp_path / "cache") == (b"engine", "built")


def test_a_missing_gpu_or_wrong_provider_is_an_error(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=MISSING)
    with pytest.raises(RuntimeError, match="runs on cuda, and 'cpu' was asked for"):
        on_tensorrt.open_model(str(bundle), MANIFEST, {"provider": "cpu"})
    import torch

    if torch.cuda.is_available():
        pytest.skip("this is about machines without a GPU, and this one has one")
    with pytest.raises(RuntimeError, match="no usable CUDA GPU"):
        on_tensorrt.open_model(str(bundle), MANIFEST, {})


class FakeCuda:
    """Host memory that stands in for device memory, by address."""

    stream = 77

    def __init__(self) -> None:
        self.gpu, self.memory, self.closed = GPU, {}, False

    def allocate(self, size: int) -> int:
        self.memory[1000 + len(self.memory)] = bytearray(size)
        return 999 + len(self.memory)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.memory[pointer][: array.nbytes] = array.tobytes()

    def download(self, array: np.ndarray, pointer: int) -> None:
        array[...] = np.frombuffer(bytes(self.memory[pointer][: array.nbytes]), array.dtype).reshape(array.shape)

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """An engine for up to 4 images of (3, 4, 4) that returns (sum, batch) in float16, and its context."""

    num_io_tensors = 2

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.addresses, self.batches, self.shape = cuda, {}, [], (-1, 3, 4, 4)

    def create_execution_context(self) -> FakeEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return ("pixels", "embedding")[index]

    def get_tensor_dtype(self, name: str) -> type:
        return {"pixels": np.float32, "embedding": np.float16}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3, 4, 4), (1, 3, 4, 4), (4, 3, 4, 4)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == "pixels" else (self.shape[0], 2)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.cuda.stream
        n = self.shape[0]
        self.batches.append(n)
        pixels = np.frombuffer(bytes(self.cuda.memory[self.addresses["pixels"]]), np.float32)
        sums = pixels[: n * 48].reshape(n, -1).sum(1)
        answer = np.stack([sums, np.full(n, n)], axis=1).astype(np.float16)
        self.cuda.memory[self.addresses["embedding"]][: answer.nbytes] = answer.tobytes()
        return True


def fake_trt(engine: FakeEngine | None) -> Any:
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    return types.SimpleNamespace(
        __name__="tensorrt", __version__="10.3.0", Logger=logger, Runtime=lambda _: runtime, nptype=lambda dtype: dtype
    )


def test_images_go_through_in_pieces_of_the_largest_batch(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBX_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: b"engine")
    cuda = FakeCuda()
    engine = FakeEngine(cuda)
    model = on_tensorrt.TensorRtModel(fake_trt(engine), cuda, str(bundle), MANIFEST)
    images = np.random.default_rng(0).integers(0, 5, (10, 4, 4, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    answer = model.run(images)
    assert engine.batches == [4, 4, 2]
    assert answer.dtype == np.float32
    np.testing.assert_array_equal(answer, np.stack([images.reshape(10, -1).sum(1), [4] * 8 + [2] * 2], axis=1))
    facts = model.facts()
    assert (facts["engine"], facts["engine_source"], facts["gpu"], facts["fallback"]) == (
        "tensorrt",
        "built",
        GPU,
        False,
    )
    model.close()
    assert cuda.closed
    assert list((tmp_path / "cache").glob("*.engine"))


def test_an_engine_that_does_not_open_is_an_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBX_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(on_tensorrt, "build_engine", lambda *_: b"engine")
    with pytest.raises(RuntimeError, match=r"tensorrt 10.3.0 cannot open the engine \(built\) on NVIDIA L4"):
        on_tensorrt.TensorRtModel(fake_trt(None), FakeCuda(), str(bundle), MANIFEST)
