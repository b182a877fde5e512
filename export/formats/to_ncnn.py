"""ncnn, converted from TorchScript by pnnx: fp32, and fp16 weights.

ncnn's batch is always one image, and its wheels hold no int8 converter: int8 is refused, not imitated.
"""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robx.errors import ArtifactError, InputError, MissingExtra
from robx.export.formats.mobile import fix_batch, mobile_model
from robx.export.request import BuiltFile, BuiltModel, ExportRequest
from robx.store.files import write_bytes

_TIMEOUT = 600  # seconds


def build(
    model: nn.Module | None, onnx_path: Path, request: ExportRequest, folder: Path, calibration: np.ndarray | None
) -> BuiltModel:
    """Write model.ncnn.param (the graph, text) and model.ncnn.bin (the weights).

    Raises:
        InputError: int8, or a batch other than one.
        MissingExtra: pnnx is not installed.
        ArtifactError: pnnx failed, or left an operator that ncnn does not have.
    """
    if request.precision == "int8":
        raise InputError("ncnn's packages have no int8 converter: export ncnn as fp32 or fp16")
    if request.fixed_batch != 1:
        raise InputError(f"ncnn takes one image at a time, not {request.fixed_batch}: drop --batch")
    try:
        import pnnx
    except ImportError as error:
        raise MissingExtra("pnnx", "ncnn", purpose="exporting to ncnn", cause=error) from error
    example = torch.zeros((1, 3, request.image_size, request.image_size))
    with tempfile.TemporaryDirectory() as scratch:
        traced = Path(scratch) / "model.pt"
        _trace(mobile_model(model, request), example, traced)
        _convert(pnnx.EXEC_PATH, traced, example, fp16=request.precision == "fp16")
        param = (traced.parent / "model.ncnn.param").read_bytes()
        weights = (traced.parent / "model.ncnn.bin").read_bytes()
    if foreign := _foreign_layers(param.decode()):
        raise ArtifactError(f"ncnn has no {', '.join(foreign)}: choose another format for {request.student.timm_name}")
    write_bytes(folder / "model.ncnn.param", param)
    write_bytes(folder / "model.ncnn.bin", weights)
    return BuiltModel(
        files=(
            BuiltFile(path="model.ncnn.param", role="model"),
            BuiltFile(path="model.ncnn.bin", role="weights"),
        ),
        runtime="ncnn",
        inputs=fix_batch(request.inputs, 1),
        outputs=fix_batch(request.outputs, 1),
        versions={name: version(name) for name in ("pnnx", "torch")},
    )


def _trace(model: nn.Module, example: Tensor, path: Path) -> None:
    """TorchScript, the one form of a PyTorch model that pnnx reads."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and tracing warns of every constant shape
        torch.jit.trace(model, example).save(str(path))  # type: ignore[no-untyped-call]


def _convert(pnnx: str, traced: Path, example: Tensor, *, fp16: bool) -> None:
    """Run pnnx's own program: its Python wrapper ignores the exit status and imports the code that it generates.

    Raises:
        ArtifactError: a non-zero status, no files, or no answer in ten minutes.
    """
    shape = ",".join(map(str, example.shape))
    command = [pnnx, traced.name, f"inputshape=[{shape}]f32", f"fp16={int(fp16)}"]
    try:
        done = subprocess.run(command, cwd=traced.parent, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"pnnx did not convert the model: {error}") from error
    if done.returncode or not (traced.parent / "model.ncnn.param").is_file():
        lines = (done.stderr + done.stdout).strip().splitlines() or ["it gave no reason"]
        raise ArtifactError(f"pnnx failed with status {done.returncode}: {lines[-1]}")


def _foreign_layers(param: str) -> list[str]:
    """Layers that pnnx could not translate: PyTorch's names (``aten::where``, ``torch.roll``) stay in the graph."""
    layers = {line.split()[0] for line in param.splitlines()[2:] if line.strip()}
    return sorted(layer for layer in layers if "." in layer or "::" in layer)
