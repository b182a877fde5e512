"""ONNX: the student's trunk (and head) as one self-contained, checked file, with its parity against PyTorch measured.

Input ``pixels`` (N, 3, H, W), outputs ``embedding`` (N, D) and, with a head, ``logits`` (N, C). The opset is asserted
after the export (the exporter falls back to another one quietly) and the IR version is pinned, as older runtimes refuse
a newer one.
"""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from robx import __version__
from robx.embeddings import cosine
from robx.errors import ArtifactError, InputError, first_line
from robx.export.quiet import quiet
from robx.export.request import BuiltFile, BuiltModel, ExportRequest
from robx.linear_head import Head
from robx.records import Preprocessing, Student, TensorSpec, Value
from robx.store.files import write_bytes
from robx.store.onnx_safety import check_model

IR_VERSION = 10
PIXELS, EMBEDDING, LOGITS = "pixels", "embedding", "logits"
# The whole difference between PyTorch's and a runtime's float32 kernels, on real images; measured at 1e-5 and below.
_FP32_TOLERANCE = 1e-3
_MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}


class ExportModel(nn.Module):
    """The network that is exported: pixels in, the embedding (and logits) out, float32 at both ends."""

    def __init__(self, trunk: nn.Module, *, head: Head | None, uint8: Preprocessing | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head: nn.Linear | None = None
        if head is not None:
            self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
            self.head.weight = nn.Parameter(torch.from_numpy(head.weight.copy()), requires_grad=False)
            self.head.bias = nn.Parameter(torch.from_numpy(head.bias.copy()), requires_grad=False)
        self.uint8 = uint8 is not None
        self.mean: Tensor
        self.scale: Tensor
        if uint8 is not None:
            self.register_buffer("mean", 255 * torch.tensor(uint8.mean).view(1, 3, 1, 1))
            self.register_buffer("scale", 1 / (255 * torch.tensor(uint8.std)).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Embedding (N, D), and logits (N, C) with a head, of pixels (N, 3, H, W)."""
        if self.uint8:
            pixels = (pixels.float() - self.mean) * self.scale
        embedding: Tensor = self.trunk(pixels)
        return embedding if self.head is None else (embedding, self.head(embedding))


class _MeanPool(nn.Module):
    """Global average pooling as a plain mean over H and W, which every converter and quantiser understands."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keep)


def export_model(
    trunk: nn.Module, student: Student, *, head: Head | None = None, uint8_input: bool = False
) -> ExportModel:
    """A copy of `trunk` ready for any exporter: pools as means, position embedding fixed at the crop, eval, float32.

    With dynamic batch the exporter turns an adaptive pool and its flatten into a chain of Shape, Range and Gather,
    which costs an int8 OpenVINO model half of its accuracy in silence; a mean leaves one ReduceMean.

    Raises:
        InputError: the head's width is another than the student's.
    """
    if head is not None and head.weight.shape[1] != student.width:
        raise InputError(f"the head takes {head.weight.shape[1]} features and the student gives {student.width}")
    trunk = copy.deepcopy(trunk).float().cpu().eval().requires_grad_(False)
    _replace_pools(trunk)
    _fix_image_size(trunk, student.preprocessing.crop)
    return ExportModel(trunk, head=head, uint8=student.preprocessing if uint8_input else None).eval()


def tensor_specs(
    student: Student, *, batch: int | None, uint8_input: bool, labels: int | None
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of the exported model."""
    crop = student.preprocessing.crop
    pixels = TensorSpec(name=PIXELS, dtype="uint8" if uint8_input else "float32", shape=(batch, 3, crop, crop))
    outputs = [TensorSpec(name=EMBEDDING, dtype="float32", shape=(batch, student.width))]
    if labels is not None:
        outputs.append(TensorSpec(name=LOGITS, dtype="float32", shape=(batch, labels)))
    return (pixels,), tuple(outputs)


def export_onnx(model: ExportModel, path: Path, *, student: Student, batch: int | None, opset: int) -> onnx.ModelProto:
    """Write `model` to `path` as float32 ONNX and return it.

    Raises:
        ArtifactError: the exporter failed, gave another opset, or a file that the checker refuses.
    """
    crop = student.preprocessing.crop
    dtype = torch.uint8 if model.uint8 else torch.float32
    # Two images where the batch is dynamic: a one would be taken for a constant.
    example = torch.zeros((2 if batch is None else batch, 3, crop, crop), dtype=dtype)
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[PIXELS],
                output_names=[EMBEDDING] if model.head is None else [EMBEDDING, LOGITS],
                dynamic_shapes=({0: torch.export.Dim("N")},) if batch is None else None,
                verbose=False,
            )
    except Exception as error:
        raise ArtifactError(f"{student.timm_name} cannot be exported to ONNX: {first_line(error)}") from error
    if program is None:
        raise ArtifactError(f"{student.timm_name} cannot be exported to ONNX: the exporter gave nothing")
    proto: onnx.ModelProto = program.model_proto
    finish(proto, student, opset=opset)
    write_bytes(path, proto.SerializeToString())
    return proto


def finish(proto: onnx.ModelProto, student: Student, *, opset: int) -> None:
    """Assert the opset, pin the IR, strip the exporter's paths, add robx's metadata, and check; in place.

    Raises:
        ArtifactError: another opset than was asked for, or a model that the checker refuses.
    """
    found = {entry.domain: entry.version for entry in proto.opset_import}
    if found.get("", 0) != opset:
        raise ArtifactError(
            f"opset {opset} was asked for and the exporter gave {found.get('')}: choose another --opset"
        )
    proto.ir_version = IR_VERSION
    for node in proto.graph.node:  # the exporter writes stack traces, with this machine's paths, into every node
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    pre = student.preprocessing
    onnx.helper.set_model_props(
        proto,
        {
            "robx.version": __version__,
            "robx.student": student.timm_name,
            "robx.student_sha256": student.sha256,
            "robx.preprocessing": json.dumps(
                {
                    "size": pre.size,
                    "crop": pre.crop,
                    "interpolation": pre.interpolation,
                    "mean": pre.mean,
                    "std": pre.std,
                }
            ),
        },
    )
    proto.producer_name, proto.producer_version = "robx", __version__
    check_model(proto, where=f"the export of {student.timm_name}", full_check=True)


def build(
    model: nn.Module | None, onnx_path: Path, request: ExportRequest, folder: Path, calibration: np.ndarray | None
) -> BuiltModel:
    """Ship `onnx_path`, which is in the requested precision already."""
    write_bytes(folder / "model.onnx", onnx_path.read_bytes())
    return BuiltModel(
        files=(BuiltFile(path="model.onnx", role="model"),),
        runtime="onnxruntime",
        inputs=request.inputs,
        outputs=request.outputs,
        versions={name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        opset=request.target.opset,
    )


def parity(
    reference: np.ndarray, candidate: np.ndarray, *, precision: str, what: str, refuse: bool = True
) -> dict[str, Value]:
    """Compare the exported model's embeddings (N, D) with PyTorch's; refuses a float model that differs.

    Without `refuse` the figures are taken alone, and only another shape, NaN and infinity are refused.

    Raises:
        ArtifactError: NaN, or further apart than the precision explains; such a file is broken, not imprecise.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(b).all():
        raise ArtifactError(
            f"{what} answers {b.shape} with NaN or infinity where PyTorch answers {a.shape}: not shipped"
        )
    least = float(cosine(a, b).min())
    worst, spread = float(np.abs(a - b).max()), float(np.abs(a).max())
    figures = {"max_abs": Value(value=worst, n=len(a)), "cosine_min": Value(value=least, n=len(a))}
    if not refuse:
        return figures
    if precision in _MIN_COSINE and least < _MIN_COSINE[precision]:
        raise ArtifactError(f"{what} differs from PyTorch: cosine {least:.5f} on a real image; not shipped")
    if precision == "fp32" and worst > _FP32_TOLERANCE * max(spread, 1e-6):
        raise ArtifactError(f"{what} differs from PyTorch by {worst:.2e} (values up to {spread:.2e}); not shipped")
    return figures


def _replace_pools(module: nn.Module) -> None:
    from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool, SelectAdaptivePool2d

    for name, child in module.named_children():
        if isinstance(child, SelectAdaptivePool2d) and child.pool_type in ("avg", "fast", "fastavg"):
            flat = isinstance(child.flatten, nn.Flatten) or getattr(child.pool, "flatten", False)
            setattr(module, name, _MeanPool(keep=not flat))
        elif isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
            setattr(module, name, _MeanPool(keep=True))
        elif isinstance(child, FastAdaptiveAvgPool):
            setattr(module, name, _MeanPool(keep=not child.flatten))
        else:
            _replace_pools(child)


def _fix_image_size(trunk: nn.Module, crop: int) -> None:
    """A ViT resizes its position embedding in every forward pass; do it once, here, for the crop that is exported."""
    if not getattr(trunk, "dynamic_img_size", False):
        return
    with quiet():
        trunk.set_input_size(img_size=(crop, crop))  # type: ignore[operator]
    trunk.dynamic_img_size = False  # type: ignore[assignment]
    patches: Any = trunk.patch_embed
    patches.dynamic_img_pad, patches.strict_img_size, patches.flatten, patches.output_fmt = False, True, True, None
