"""ncnn, converted from TorchScript by pnnx: fp32, and fp16 weights.

ncnn takes one image at a time, and its wheels have no int8 converter, so int8 is not offered.
"""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from robx.errors import ArtifactError, InputError, MissingExtra
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.mobile import fix_batch, mobile_model
from robx.export.request import ExportRequest
from robx.store.files import write_bytes

_TIMEOUT = 600  # seconds


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.ncnn.param (the graph, text) and model.ncnn.bin (the weights).

    Raises:
        InputError: a batch other than one.
        MissingExtra: pnnx is not installed.
        ArtifactError: pnnx failed, or the network has an operator that ncnn does not support.
    """
    if request.fixed_batch != 1:
        raise InputError(f"ncnn takes one image at a time, got --batch {request.fixed_batch}: drop --batch")
    try:
        import pnnx
    except ImportError as error:
        raise MissingExtra("pnnx", "ncnn", purpose="exporting to ncnn", cause=error) from error
    example = torch.zeros((1, 3, *request.image_shape))
    with tempfile.TemporaryDirectory() as scratch:
        traced = Path(scratch) / "model.pt"
        _trace(mobile_model(source.model, request), example, traced)
        _convert(pnnx.EXEC_PATH, traced, example, fp16=request.precision == "fp16")
        param = (traced.parent / "model.ncnn.param").read_bytes()
        weights = (traced.parent / "model.ncnn.bin").read_bytes()
    if foreign := _foreign_layers(param.decode()):
        raise ArtifactError(
            f"ncnn does not support {', '.join(foreign)} of {request.student.timm_name}: choose another format"
        )
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
    """Save `model` as TorchScript, the one form of a PyTorch model that pnnx reads."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and tracing warns about every constant shape
        torch.jit.trace(model, example).save(str(path))  # type: ignore[no-untyped-call]


def _convert(pnnx: str, traced: Path, example: Tensor, *, fp16: bool) -> None:
    """Run the pnnx executable: its Python wrapper ignores the exit status and imports the code that it generates.

    Raises:
        ArtifactError: a non-zero exit status, no output files, or a timeout.
    """
    shape = ",".join(map(str, example.shape))
    command = [pnnx, traced.name, f"inputshape=[{shape}]f32", f"fp16={int(fp16)}"]
    try:
        done = subprocess.run(command, cwd=traced.parent, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"pnnx did not convert the model ({error}): choose another format") from error
    if done.returncode or not (traced.parent / "model.ncnn.param").is_file():
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no error message"]
        raise ArtifactError(f"pnnx failed with status {done.returncode} ({lines[-1]}): choose another format")


def _foreign_layers(param: str) -> list[str]:
    """Layers that pnnx could not convert: they keep PyTorch's names (``aten::where``, ``torch.roll``)."""
    layers = {line.split()[0] for line in param.splitlines()[2:] if line.strip()}
    return sorted(layer for layer in layers if "." in layer or "::" in layer)
