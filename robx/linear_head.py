"""A linear classification head in a file: written by `robx eval --save-head`, appended by `robx export --head`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from robx.errors import InputError
from robx.store.files import write_bytes

_MAX_HEAD_BYTES = 1024**3


@dataclass(frozen=True)
class Head:
    """A linear classifier on the embedding: logits = weight @ embedding + bias."""

    weight: np.ndarray  # (C, D) float32
    bias: np.ndarray  # (C,) float32
    labels: tuple[str, ...]


def save_head(head: Head, path: Path) -> None:
    """Write a head in the format that `load_head` reads."""
    tensors = {"weight": head.weight.astype(np.float32), "bias": head.bias.astype(np.float32)}
    write_bytes(path, save(tensors, metadata={"classes": json.dumps(head.labels)}))


def load_head(path: Path) -> Head:
    """Read a linear head: safetensors with ``weight`` (C, D), ``bias`` (C,) and the class names in the metadata.

    Raises:
        InputError: no such file, or not these tensors; the message says what is expected.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_file() and path.stat().st_size > _MAX_HEAD_BYTES:
        raise InputError(f"{path} is larger than {_MAX_HEAD_BYTES} bytes: it is not a linear head")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give safetensors with weight (C, D) and bias (C,)")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if not {"weight", "bias"} <= names:
                raise InputError(f"{path} has the tensors {', '.join(sorted(names))}: expected weight and bias")
            weight, bias = file.get_tensor("weight").astype(np.float32), file.get_tensor("bias").astype(np.float32)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({error}): save the head again") from error
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise InputError(f"{path} has weights that are NaN or infinite: save the head again")
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not len(weight):
        raise InputError(f"{path}: weight {weight.shape} and bias {bias.shape} are not (C, D) and (C,)")
    try:
        names_of = json.loads(metadata["classes"]) if "classes" in metadata else [str(i) for i in range(len(bias))]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the class names are not valid JSON ({error}): save the head again") from error
    strings = isinstance(names_of, list) and all(isinstance(name, str) for name in names_of)
    if not strings or len(names_of) != len(bias):
        raise InputError(f"{path}: expected {len(bias)} class names, one for each row: save the head again")
    return Head(weight, bias, tuple(names_of))
