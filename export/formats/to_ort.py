"""ONNX Runtime's own format (.ort), with the list of operators that a minimal build of the runtime needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from robx.errors import ArtifactError, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import write_bytes


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.ort and operators.config from ONNX that is in the requested precision already.

    The graph is optimised at conversion and not again at load; for the local CPU that includes its memory layout, for
    ARM it does not.

    Raises:
        ArtifactError: ONNX Runtime cannot convert the model.
    """
    from onnxruntime.tools import convert_onnx_models_to_ort as tool

    with tempfile.TemporaryDirectory(prefix="robx-") as scratch:
        copy = Path(scratch) / "model.onnx"
        copy.write_bytes(source.onnx.read_bytes())
        try:
            with _quiet():
                tool.convert_onnx_models_to_ort(
                    copy,
                    optimization_styles=[tool.OptimizationStyle.Fixed],
                    target_platform="arm" if request.target.device.startswith("arm") else "amd64",
                )
        except (Exception, SystemExit) as error:
            raise ArtifactError(
                f"ONNX Runtime cannot convert this model to .ort ({first_line(error)}): export --format onnx instead"
            ) from error
        written = {path.suffix: path for path in Path(scratch).rglob("*") if path.suffix in (".ort", ".config")}
        if set(written) != {".ort", ".config"}:
            raise ArtifactError("ONNX Runtime wrote no .ort file and operator list: export --format onnx instead")
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
    """The operators listed in an operator config: "domain;opset" -> names."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        parts = line.split("#")[0].strip().split(";")
        if len(parts) == 3:
            found[f"{parts[0]};{parts[1]}"] = sorted(name for name in parts[2].split(",") if name)
    return found


def _without_paths(text: str) -> str:
    """The config without its comments, which contain paths of this machine."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return "# Operators that a minimal build of ONNX Runtime needs: domain;opset;names\n" + "\n".join(lines) + "\n"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`quiet` for ONNX Runtime, whose logger is not Python's."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    try:
        with quiet():
            yield
    finally:
        ort.set_default_logger_severity(2)
