"""ONNX Runtime's own format (.ort) with the list of operators that a minimal build of the runtime needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from robx.errors import ArtifactError, first_line
from robx.export.quiet import quiet
from robx.export.request import BuiltFile, BuiltModel, ExportRequest
from robx.store.files import write_bytes


def build(
    model: nn.Module | None, onnx_path: Path, request: ExportRequest, folder: Path, calibration: np.ndarray | None
) -> BuiltModel:
    """Write model.ort and operators.config from ONNX that is in the requested precision already.

    The graph is optimised at conversion and not again at load: for the local CPU with its own memory layout, for an ARM
    without.

    Raises:
        ArtifactError: ONNX Runtime cannot convert the model.
    """
    from onnxruntime.tools import convert_onnx_models_to_ort as tool

    with tempfile.TemporaryDirectory(prefix="robx-") as scratch:
        source = Path(scratch) / "model.onnx"
        source.write_bytes(onnx_path.read_bytes())
        try:
            with _quiet():
                tool.convert_onnx_models_to_ort(
                    source,
                    optimization_styles=[tool.OptimizationStyle.Fixed],
                    target_platform="arm" if request.target.device.startswith("arm") else "amd64",
                )
        except (Exception, SystemExit) as error:
            raise ArtifactError(f"ONNX Runtime cannot convert this model to .ort: {first_line(error)}") from error
        written = {path.suffix: path for path in Path(scratch).rglob("*") if path.suffix in (".ort", ".config")}
        if set(written) != {".ort", ".config"}:
            raise ArtifactError("ONNX Runtime wrote no .ort file with its operator list: export --format onnx instead")
        write_bytes(folder / "model.ort", written[".ort"].read_bytes())
        write_bytes(folder / "operators.config", _without_paths(written[".config"].read_text()).encode())
    return BuiltModel(
        files=(BuiltFile(path="model.ort", role="model"), BuiltFile(path="operators.config", role="operators")),
        runtime="onnxruntime",
        inputs=request.inputs,
        outputs=request.outputs,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        opset=request.target.opset,
    )


def read_operators(path: Path) -> dict[str, list[str]]:
    """The operators of an operator config: "domain;opset" -> names."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        parts = line.split("#")[0].strip().split(";")
        if len(parts) == 3:
            found[f"{parts[0]};{parts[1]}"] = sorted(name for name in parts[2].split(",") if name)
    return found


def _without_paths(text: str) -> str:
    """The config without the comments, that hold the folders of this machine."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return "# Operators that a minimal build of ONNX Runtime needs: domain;opset;names\n" + "\n".join(lines) + "\n"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's own logger is not Python's."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    try:
        with quiet():
            yield
    finally:
        ort.set_default_logger_severity(2)
