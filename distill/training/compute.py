"""How a run computes on its device: precision, TF32, crops and loader workers. What the user leaves open is set here.

On a CPU everything is float32 and Pillow makes the crops, so that a run gives the same bits as ever; only the recipe
"quick" computes in bf16 where the CPU has instructions for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robx.distill.recipes import Recipe
from robx.errors import counted
from robx.images.jpeg import PILLOW, jpeg_decoder

# Recipe keys whose default depends on the device.
KEYS = ("precision", "tf32", "augment", "decode")
# As /proc/cpuinfo calls the instructions of x86 processors that multiply in bf16.
_BF16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the decision needs to know about the device and this process's share of the machine."""

    kind: str  # "cpu", "cuda", ...
    name: str = ""  # of a GPU
    bf16: bool = False  # computes in bfloat16 natively
    tf32: bool = False  # multiplies float32 matrices in TF32
    cores: int = 1  # processors of this process


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a run computes; recipe.json records it under "compute"."""

    device: str  # kind, or the GPU's name
    precision: str
    tf32: bool
    augment: str
    decode: str
    cudnn_benchmark: bool  # time cuDNN's algorithms for each shape and keep the fastest
    channels_last: bool  # memory format of networks with convolutions
    workers: int  # data-loading processes
    jpeg_decoder: str = PILLOW  # with its version; always the same pixels

    @property
    def line(self) -> str:
        """One line for the user."""
        products = ", TF32 for float32 products" if self.tf32 else ""
        crops = "on the device" if self.augment == "device" else "by the workers"
        scaled = ", large JPEGs decoded at reduced size" if self.decode == "scaled" else ""
        decoder = f", JPEG decoder {self.jpeg_decoder}" if self.augment == "device" else ""
        tuned = "cuDNN autotuning, " if self.cudnn_benchmark else ""
        return (
            f"computing on {self.device}: {self.precision}{products}, {tuned}crops made {crops}{scaled}{decoder}, "
            f"{counted(self.workers, 'loader worker')}"
        )


def decide(facts: DeviceFacts, given: Mapping[str, Any], *, workers: int | None = None, quick: bool = False) -> Compute:
    """The settings of a run on a device; a pure function.

    A CUDA GPU computes in bf16, or in fp16 with a loss scaler where bf16 would be emulated; what stays in float32 uses
    TF32; the device makes the crops, of JPEGs decoded at reduced size where that is enough; and all of the process's
    cores but one load images. Precision fp32 that the user asks for means IEEE float32, without TF32.

    Args:
        facts: of the device.
        given: recipe keys that are decided already, by the user or by the run that is resumed.
        workers: data-loading processes, if decided already.
        quick: whether the recipe is "quick": a CPU then computes in bf16 if it has instructions for it.
    """
    cuda = facts.kind == "cuda"
    default = ("bf16" if facts.bf16 else "fp16") if cuda else ("bf16" if facts.bf16 and quick else "fp32")
    if workers is None:
        workers = max(1, facts.cores - 1) if cuda else max(1, min(8, facts.cores // 2))
    return Compute(
        device=facts.name or facts.kind,
        precision=given.get("precision", default),
        tf32=given.get("tf32", cuda and facts.tf32 and given.get("precision") != "fp32"),
        augment=given.get("augment", "device" if cuda else "pillow"),
        decode=given.get("decode", "scaled" if cuda else "full"),
        cudnn_benchmark=cuda,
        channels_last=True,
        workers=workers,
    )


def facts_of(device: str | None) -> DeviceFacts:
    """The facts of a device by the name that ``--device`` takes; one that is not there gets no features."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine
    cores = max(1, len(os.sched_getaffinity(0)) // here)
    kind, _, index = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind != "cuda" or not torch.cuda.is_available():
        return DeviceFacts(kind=kind, bf16=kind == "cpu" and cpu_has_bf16(), cores=cores)
    number = int(index or os.environ.get("LOCAL_RANK", "0")) if index.isdigit() or not index else -1
    if not 0 <= number < torch.cuda.device_count():  # refused when the run opens the device
        return DeviceFacts(kind=kind, cores=cores)
    found = torch.cuda.get_device_properties(number)
    modern = torch.version.hip is not None or found.major >= 8  # what torch.cuda.is_bf16_supported tests
    return DeviceFacts(kind=kind, name=found.name, bf16=modern, tf32=modern, cores=cores)


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this x86 CPU multiplies in bf16; elsewhere bf16 is emulated, or its speed was not measured."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(_BF16 & set(line.split()) for line in lines if line.startswith("flags"))


def compute_of(recipe: Recipe, device: torch.device, *, workers: int) -> Compute:
    """How a run of a complete recipe computes."""
    found = decide(facts_of(str(device)), {key: getattr(recipe, key) for key in KEYS}, workers=workers)
    # Pillow's crops need Pillow's images, so that another decoder gains nothing there.
    return replace(found, jpeg_decoder=jpeg_decoder()) if found.augment == "device" else found


@contextlib.contextmanager
def cuda_settings(compute: Compute) -> Iterator[None]:
    """Torch's global CUDA settings inside the block, and the earlier ones after it; nothing for other devices."""
    if not compute.cudnn_benchmark:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    products = (torch.backends.cuda.matmul, cudnn.conv)
    before = cudnn.benchmark, [place.fp32_precision for place in products]
    cudnn.benchmark = True
    for place in products:
        place.fp32_precision = "tf32" if compute.tf32 else "ieee"
    try:
        yield
    finally:
        cudnn.benchmark = before[0]
        for place, value in zip(products, before[1], strict=True):
            place.fp32_precision = value
