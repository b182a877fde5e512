"""Nothing is sent and nothing is left behind: no file appears in the home folder and no socket opens."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# sys.addaudithook sees every socket that Python opens; /proc/self/net would not tell who opened one.
CODE = textwrap.dedent(
    """
    import sys
    opened, watched = [], ("socket.connect", "socket.getaddrinfo")
    sys.addaudithook(lambda event, args: opened.append((event, args)) if event in watched else None)
    import robx
    import numpy, onnxruntime, openvino, nncf
    from onnx import TensorProto, helper
    graph = helper.make_graph(
        [helper.make_node("Relu", ["pixels"], ["embedding"])], "g",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    session.run(None, {"pixels": numpy.zeros((1, 4), numpy.float32)})
    core = openvino.Core()
    openvino.convert_model
    compiled = core.compile_model(core.read_model(model), "CPU")
    compiled(numpy.zeros((1, 4), numpy.float32))
    nncf.quantize(core.read_model(model), nncf.Dataset([numpy.zeros((1, 4), numpy.float32)]))
    print(opened)
    """
)


def test_engines_and_quantisers_leave_no_file_and_open_no_socket(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "CI", "NNCF", "XDG_", "PYTEST"))}
    environment |= {"HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "mpl")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    left = [p for p in tmp_path.rglob("*") if p.is_file() and "mpl" not in p.parts]
    assert left == []
