"""ONNX Runtime's own format (.ort), with the list of operators that a minimal build of the runtime needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from robx.errors import ArtifactError, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.operators import NAME as OPERATORS
from robx.export.formats.operators import needed_operators, to_config
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import write_bytes, write_text


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
        written = next(Path(scratch).rglob("*.ort"), None)
        if written is None:
            raise ArtifactError("ONNX Runtime wrote no .ort file: export --format onnx instead")
        write_bytes(folder / "model.ort", written.read_bytes())
    operators = needed_operators(folder / "model.ort")
    config = to_config(operators, runtime="ONNX Runtime", model_bytes=(folder / "model.ort").stat().st_size)
    write_text(folder / OPERATORS, config)
    return BuiltModel(
        files=(BuiltFile(path="model.ort", role="model"), BuiltFile(path=OPERATORS, role="operators")),
        runtime="onnxruntime",
        inputs=request.inputs,
        outputs=request.outputs,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        opset=request.target.opset,
    )


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
