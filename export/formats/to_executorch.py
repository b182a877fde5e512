"""ExecuTorch with the XNNPACK delegate: fp32, and int8 by PT2E (see ``int8/by_pt2e.py``)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robx.errors import ArtifactError, InputError, MissingExtra, first_line
from robx.export.formats.builder import BuiltFile, BuiltModel, Source
from robx.export.formats.mobile import calibration_batches, example_input, fix_batch, float_modules, mobile_model
from robx.export.int8 import by_pt2e
from robx.export.int8.candidate import Candidate
from robx.export.quiet import quiet
from robx.export.request import ExportRequest
from robx.store.files import write_bytes


def build(source: Source, request: ExportRequest, folder: Path) -> BuiltModel:
    """Write model.pte, with a fixed batch.

    fp16 is not offered: XNNPACK would compute it in float32 on most CPUs.

    Raises:
        InputError: too few calibration images.
        MissingExtra: executorch is not installed.
        ArtifactError: the converter failed; the message has its own error.
    """
    try:
        import executorch.exir
    except ImportError as error:
        raise MissingExtra("executorch", "executorch", purpose="exporting to ExecuTorch", cause=error) from error
    mobile, example = mobile_model(source.model, request), (example_input(request),)
    try:
        with quiet():
            if request.precision == "int8":
                candidate = source.candidate or Candidate(name="static, min-max", quantiser="pt2e")
                images = torch.cat(calibration_batches(source.calibration, request))
                mobile = by_pt2e.quantize(mobile, images, candidate, kept=float_modules(source, mobile))
            program, delegates, portable = _lower(executorch.exir, mobile, example)
    except (InputError, ArtifactError):
        raise
    except Exception as error:
        raise ArtifactError(
            f"ExecuTorch cannot convert {request.student.timm_name} ({first_line(error)}): choose another format"
        ) from error
    write_bytes(folder / "model.pte", program)
    left = f"; {', '.join(portable)} run on ExecuTorch's portable kernels" if portable else ""
    return BuiltModel(
        files=(BuiltFile(path="model.pte", role="model"),),
        runtime="executorch",
        inputs=fix_batch(request.inputs, request.fixed_batch),
        outputs=fix_batch(request.outputs, request.fixed_batch),
        versions={name: version(name) for name in ("executorch", "torch", "torchao")},
        notes=(f"{delegates} XNNPACK partition{'s' if delegates != 1 else ''}{left}",),
    )


def _lower(exir: Any, model: nn.Module, example: tuple[torch.Tensor]) -> tuple[bytes, int, list[str]]:
    """The serialised program, the number of XNNPACK partitions, and the operators outside of them."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    exported = torch.export.export(model, example)
    program = exir.to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    plan = program.executorch_program.execution_plan[0]
    return bytes(program.buffer), len(plan.delegates), sorted({operator.name for operator in plan.operators})
