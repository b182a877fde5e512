"""Build, save and load a student's trunk (the network without its classifier)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from robx.errors import ArtifactError, InputError, did_you_mean, first_line, is_exhausted
from robx.image_size import ImageSize, Shape, height_and_width, plain_size
from robx.records import Student, load_student, save_student
from robx.store.files import sha256_file, write_bytes

_FINEST = 4  # stride of the finest feature maps given; finer ones hold edges, which a student learns in any case
_MOST_PLACES = 16  # of a side of the feature maps that `map_stages` gives


def build_trunk(
    timm_name: str, *, image_size: ImageSize | None = None, drop_path: float = 0.0, pretrained: Path | None = None
) -> nn.Module:
    """A timm model without its classifier, randomly initialised; its output is the embedding, (N, D).

    A plain ViT returns its CLS token if it has one, and accepts any image size divisible by its patch size (for 96-px
    local crops).

    Args:
        timm_name: with or without a tag.
        image_size: side of a square or (height, width), in pixels; a network of one fixed size (Swin, LeViT, MaxViT,
            CoaT) is built for it. None: timm's own.
        drop_path: rate of stochastic depth.
        pretrained: the folder for downloads, to load timm's weights; timm's own errors pass if there are none.

    Raises:
        InputError: timm has no model of that name; the message suggests the closest names.
    """
    if not timm.is_model(timm_name):
        others = "robx students lists some; timm.list_models() lists all"
        hint = did_you_mean(timm_name, timm.list_models(), otherwise=others)
        raise InputError(f"unknown student {timm_name!r}: {hint}")
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    options |= {"pretrained": True, "cache_dir": pretrained} if pretrained else {}
    if is_vit(timm_name):
        options["dynamic_img_size"] = True
        # timm asserts that there is a CLS token (SigLIP has none), and has no other way to ask.
        with contextlib.suppress(AssertionError):
            return _create(timm_name, **options, global_pool="token")
    if image_size is not None and not fits(timm_name, height_and_width(image_size)):
        with contextlib.suppress(Exception):  # timm and its models refuse img_size in many ways
            # Squares as one number, which is all that some models take.
            height, width = height_and_width(image_size)
            resized = _create(timm_name, **options, img_size=height if height == width else (height, width))
            if not size_error(resized, image_size):
                return resized
    return _create(timm_name, **options)


def sizes_near(timm_name: str, size: ImageSize) -> list[int | str]:
    """Image sizes that a timm model can be built for; see `nearest_sizes`."""
    return nearest_sizes(size, lambda shape: fits(timm_name, shape, built_for=shape))


@functools.cache
def fits(timm_name: str, shape: Shape, *, built_for: Shape | None = None) -> bool:
    """Whether a timm model, built for images of `built_for` pixels, can process `shape`: by its shapes alone."""
    # The answer is kept: as later calls draw no random numbers, the first one leaves the generator alone.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return not size_error(build_trunk(timm_name, image_size=built_for), shape)
        except (AssertionError, RuntimeError, ValueError):
            return False


def nearest_sizes(size: ImageSize, takes: Callable[[Shape], bool]) -> list[int | str]:
    """Sizes that a network `takes`, as a message has them: the nearest below and above `size`, if any.

    One that takes nothing of about this aspect ratio may take squares, and one of a fixed size the usual one.
    """
    shape = height_and_width(size)
    found = [one for sign in (-1, 1) for one in islice(filter(takes, _sizes_beside(shape, sign)), 1)]
    if not found and shape[0] != shape[1]:
        side = max(shape)
        return [side] if takes((side, side)) else nearest_sizes(side, takes)
    found = found or list(islice(filter(takes, _USUAL), 1))
    return [plain_size(one) for one in found]


_USUAL = [(side, side) for side in (224, 256, 240, 384)]  # that published networks are made for


def _sizes_beside(shape: Shape, sign: int) -> list[Shape]:
    """Sizes below (sign -1) or above (1) a shape, both sides whole multiples of a step; the nearest first."""
    height, width = shape
    least, tries = (32, 3) if height == width else (16, 2)
    found = {
        (step * (-(-height // step) + more), step * (-(-width // step) + more))
        if sign > 0
        else (step * (height // step - more), step * (width // step - more))
        for step in (32, 28, 16)
        for more in range(tries)
    }
    return sorted((one for one in found - {shape} if min(one) >= least), key=lambda one: sign * one[0] * one[1])


def _create(timm_name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(timm_name, num_classes=0, **options)
    return model


def is_vit(timm_name: str) -> bool:
    """Whether timm builds this name as a plain ViT (ViT, DeiT, DINOv2, SigLIP); False for unknown names."""
    if not timm.is_model(timm_name):
        return False
    return timm.model_entrypoint(timm_name).__module__.rpartition(".")[2] in ("vision_transformer", "deit")


def has_batch_norm(timm_name: str) -> bool:
    """Whether a timm model has BatchNorm layers.

    Raises:
        InputError: timm has no model of that name.
    """
    with torch.device("meta"):
        return any(isinstance(module, _BatchNorm) for module in build_trunk(timm_name).modules())


def embedding_width(trunk: nn.Module) -> int:
    """D, the width of the trunk's output; for MobileNetV3 it is more than ``num_features``."""
    width: int = getattr(trunk, "head_hidden_size", None) or trunk.num_features  # type: ignore[assignment]
    return width


def save_trunk(folder: Path, trunk: nn.Module, student: Student) -> Student:
    """Write a trunk's weights and its record to `folder`; returns the record with the weights' SHA-256."""
    return save_weights(folder, trunk.state_dict(), student)


def save_weights(folder: Path, weights: Mapping[str, Tensor], student: Student) -> Student:
    """Write a trunk's state dict and its record to `folder`; returns the record with the weights' SHA-256.

    The weights are written first: a reader between the two writes finds a hash mismatch, never a wrong network.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    path = folder / "student.safetensors"
    # A single key of metadata, because safetensors writes several in random order. Not with save_file, which leaves a
    # temporary file of its own when the process is killed.
    write_bytes(path, save(state, metadata={"format": "pt"}))
    student = dataclasses.replace(student, sha256=sha256_file(path))
    save_student(student, folder)
    return student


def load_trunk(folder: Path) -> tuple[Student, nn.Module]:
    """A student's record and its trunk, in eval mode, on the CPU, in float32.

    Raises:
        ArtifactError: the folder is damaged or altered, or its weights or its width do not fit the network.
    """
    student = load_student(folder)
    size = student.preprocessing.shape
    with torch.device("meta"):  # a record may name a network of any size: it takes no memory until the weights fit
        empty = build_trunk(student.timm_name, image_size=size)
    try:
        # From bytes, because safetensors cannot open a file whose name is not UTF-8.
        state = load((folder / "student.safetensors").read_bytes())
        empty.load_state_dict({key: value.to("meta") for key, value in state.items()})
        trunk = build_trunk(student.timm_name, image_size=size)
        trunk.load_state_dict(state)
    except Exception as error:
        if is_exhausted(error):
            raise
        raise ArtifactError(
            f"{folder}: the weights do not fit {student.timm_name} ({first_line(error)}): distil again"
        ) from error
    if (width := embedding_width(trunk)) != student.width:
        raise ArtifactError(
            f"{folder}: student.json says {student.width} but the network gives {width}: restore student.json"
        )
    return student, trunk.eval()


def map_strides(trunk: nn.Module) -> dict[int, int]:
    """The feature maps that `map_stages` gives: {stride: channels}; empty if timm cannot give this network's maps."""
    if not hasattr(trunk, "forward_intermediates"):
        return {}
    stages: Any = trunk.feature_info
    return {stage["reduction"]: stage["num_chs"] for stage in stages if stage["reduction"] >= _FINEST}


def map_stages(trunk: nn.Module, pixels: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """One forward pass up to the pooling: its input, for ``forward_head``, and the last feature map of each stride.

    Args:
        trunk: one that `map_strides` knows.
        pixels: (N, 3, H, W).

    Returns:
        What ``trunk.forward_head`` takes, and {stride: (N, C, h, w)} of strides from 4 on, each averaged so that no
        side is longer than 16: larger maps cost memory. All blocks of a ViT have one stride, so its map is that of the
        last block.
    """
    last, maps = trunk.forward_intermediates(pixels)  # type: ignore[operator]
    strides = [stage["reduction"] for stage in trunk.feature_info]  # type: ignore[union-attr]
    found = dict(zip(strides, maps, strict=True))
    return last, {stride: _averaged(each) for stride, each in found.items() if stride >= _FINEST}


def _averaged(maps: Tensor) -> Tensor:
    height, width = maps.shape[-2:]
    if max(height, width) <= _MOST_PLACES:
        return maps
    return F.adaptive_avg_pool2d(maps, (min(height, _MOST_PLACES), min(width, _MOST_PLACES)))


@torch.inference_mode()
def embed(trunk: nn.Module, pixels: Tensor) -> Tensor:
    """Embeddings (N, D) in float32 of preprocessed pixels (N, 3, H, W)."""
    features: Tensor = trunk(pixels)
    return features.float()


@torch.no_grad()
def size_error(trunk: nn.Module, size: ImageSize) -> str:
    """The trunk's error message for images of `size` pixels; empty if it can process them."""
    training = trunk.training
    pixels = torch.zeros(1, 3, *height_and_width(size), device=next(trunk.parameters()).device)
    shapes = {name: tensor.to("meta") for name, tensor in (*trunk.named_parameters(), *trunk.named_buffers())}
    try:
        trunk.eval()
        # From shapes alone, in milliseconds: a forward pass of a ViT-L takes seconds. A failure is confirmed by one.
        with contextlib.suppress(Exception):
            functional_call(trunk, shapes, pixels.to("meta"))
            return ""
        trunk(pixels)
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)
    finally:
        trunk.train(training)
    return ""
