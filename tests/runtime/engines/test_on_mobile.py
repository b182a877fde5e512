"""What LiteRT and ExecuTorch report, with stand-ins; export/formats/test_mobile.py runs the real ones."""

import sys
import types

import numpy as np
import pytest

from robx.runtime.engines import on_executorch, on_litert

MANIFEST = {
    "files": [{"role": "model", "path": "model"}],
    "inputs": [{"name": "images", "dtype": "float32", "shape": [1, 3, 4, 4]}],
    "outputs": [{"name": "embedding", "dtype": "float32", "shape": [1, 8]}],
}


def fake(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def litert(monkeypatch):
    """litert(operators after the delegates were applied) -> an interpreter with these."""

    def install(*operators):
        class Interpreter:
            def __init__(self, path, num_threads):
                self.num_threads = num_threads

            def allocate_tensors(self):
                pass

            def get_input_details(self):
                return [{"index": 0, "dtype": np.float32}]

            def get_output_details(self):
                return [{"index": 1, "dtype": np.float32, "shape": np.array([1, 8])}]

            if operators:

                def _get_ops_details(self):
                    return [{"op_name": name} for name in operators]

        fake(monkeypatch, "ai_edge_litert")
        fake(monkeypatch, "ai_edge_litert.interpreter", Interpreter=Interpreter)

    return install


@pytest.mark.parametrize(
    ("operators", "provider", "parts"),
    [(("CONV_2D", "DELEGATE", "DELEGATE"), "xnnpack", 2), (("CONV_2D",), "cpu", 0), ((), "cpu", None)],
)
def test_litert_reports_whether_xnnpack_is_used(litert, operators, provider, parts):
    litert(*operators)
    facts = on_litert.open_model("folder", MANIFEST, {"threads": 3}).facts()
    assert (facts["provider"], facts["delegated_parts"], facts["threads"]) == (provider, parts, 3)
    if not parts:
        with pytest.raises(RuntimeError, match="would fall back"):
            on_litert.open_model("folder", MANIFEST, {"threads": 1, "provider": "xnnpack"})


@pytest.fixture
def executorch(monkeypatch, tmp_path):
    """executorch(bytes of the program) -> its folder, with a runtime that opens every file."""
    program = types.SimpleNamespace(load_method=lambda name: name)
    runtime = types.SimpleNamespace(get=lambda: types.SimpleNamespace(load_program=lambda path: program))
    library = types.SimpleNamespace(
        _unsafe_reset_threadpool=lambda threads: None, _threadpool_get_thread_count=lambda: 2
    )
    fake(monkeypatch, "executorch")
    fake(monkeypatch, "executorch.runtime", Runtime=runtime)
    fake(monkeypatch, "executorch.extension")
    fake(monkeypatch, "executorch.extension.pybindings", portable_lib=library)
    monkeypatch.setattr(on_executorch.metadata, "version", lambda name: "0")

    def install(data):
        (tmp_path / "model").write_bytes(data)
        return str(tmp_path)

    return install


def test_executorch_reports_whether_xnnpack_is_used(executorch):
    assert (
        on_executorch.open_model(executorch(b"..XnnpackBackend.."), MANIFEST, {"threads": 2}).facts()["provider"]
        == "xnnpack"
    )
    folder = executorch(b"..aten::convolution..")
    facts = on_executorch.open_model(folder, MANIFEST, {"threads": 2, "provider": "cpu"}).facts()
    assert (facts["provider"], facts["threads"]) == ("cpu", 2), "what the pool has, not what was asked for"
    with pytest.raises(RuntimeError, match="no part of the program is for XNNPACK"):
        on_executorch.open_model(folder, MANIFEST, {"threads": 2, "provider": "xnnpack"})


@pytest.mark.parametrize("engine", [on_litert, on_executorch])
def test_unsupported_settings_are_refused(engine, tmp_path):
    for settings, line in (({"provider": "gpu"}, "'gpu' was asked for"), ({"precision_hint": "f16"}, "f16 was asked")):
        with pytest.raises(RuntimeError, match=line):
            engine.open_model(str(tmp_path), MANIFEST, {"threads": 1, **settings})
