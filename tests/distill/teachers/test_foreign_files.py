"""Weights from elsewhere that are made to hang, to fill the memory, to run code, or that are simply no weights."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from robx.distill.teachers.checkpoints import read_trunk
from robx.distill.teachers.foreign_files import read_checkpoint, require_sound
from robx.errors import ArtifactError, InputError

NESTED = 45


def nested_key() -> bytes:
    """{t45: 0} with t0 = () and t(n + 1) = (tn, tn): 2**45 tuples to hash."""
    code = b"\x80\x02})q\x000"
    for n in range(NESTED):
        code += b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0"
    return code + b"h" + bytes([NESTED]) + b"K\x00s."


def marks(number: int) -> bytes:
    return b"\x80\x02" + b"(" * number + b"l" + b"."


def as_zip(path: Path, data: bytes, compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("weights/data.pkl", data)
        archive.writestr("weights/version", b"3\n")
    return path


def as_stream(path: Path, data: bytes) -> Path:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    path.write_bytes(magic + data)
    return path


def many_tensors(path: Path, number: int) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(number)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "nested key, zip": lambda folder: as_zip(folder / "a.pth", nested_key()),
    "nested key, stream": lambda folder: as_stream(folder / "b.pth", nested_key()),
    "nested key, bare": lambda folder: (folder / "c.pth").write_bytes(nested_key()) and folder / "c.pth",  # type: ignore[return-value, dict-item]
    "20 million marks, zip": lambda folder: as_zip(folder / "d.pth", marks(20_000_000)),
    "20 million marks, stream": lambda folder: as_stream(folder / "e.pth", marks(20_000_000)),
    "compressed": lambda folder: as_zip(folder / "f.pth", b" " * 10_000_000, zipfile.ZIP_DEFLATED),
    "1.5 million tensors": lambda folder: many_tensors(folder / "g.safetensors", 1_500_000),
    "header of 2**60 bytes": lambda folder: (
        (folder / "h.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}") and folder / "h.safetensors"  # type: ignore[return-value, dict-item]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_within_limits(tmp_path: Path, name: str) -> None:
    path = HOSTILE[name](tmp_path)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ArtifactError) as error:
        read_trunk(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message and len(message) < 400
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("how", ["zip", "stream", "bare"])
def test_code_is_named_whatever_the_protocol(tmp_path: Path, protocol: int, how: str) -> None:
    data = pickle.dumps({"weight": Evil()}, protocol)
    path = tmp_path / "evil.pth"
    if how == "bare":
        path.write_bytes(data)
    else:
        (as_zip if how == "zip" else as_stream)(path, data)
    with pytest.raises(ArtifactError, match=r"contains Python objects \((__builtin__|builtins)\.eval\)"):
        read_trunk(path)


@pytest.mark.parametrize("protocol", [4, 5])
def test_tensors_of_another_protocol_say_how_to_save_them(tmp_path: Path, protocol: int) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "new.pth", pickle_protocol=protocol)
    try:
        assert torch.equal(read_trunk(tmp_path / "new.pth")["weight"], torch.ones(2))
    except ArtifactError as error:
        assert f"pickle protocol {protocol}" in str(error)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe.pth")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(0, 4), "is empty"),
        (torch.ones(3).to_sparse(), "is not a dense tensor"),
        (torch.empty(3, device="meta"), "has no data"),
        (torch.ones(1).expand(10**9), "claims to be"),
        (torch.ones(2, dtype=torch.complex64), "complex64 instead of floating point"),
        (torch.ones(2, dtype=torch.bool), "bool instead of floating point"),
        (torch.tensor([1.0, float("inf")]), "contains NaN or infinity"),
        (torch.tensor([float("nan")]), "contains NaN or infinity"),
    ],
)
def test_tensors_that_cannot_be_weights_are_named(tmp_path: Path, value: torch.Tensor, said: str) -> None:
    with pytest.raises(ArtifactError, match=f"file: some.weight {said}|file: some.weight has values of type {said}"):
        require_sound({"fine": torch.ones(1), "some.weight": value}, where="file")
    torch.save({"fine": torch.ones(1), "some.weight": value}, tmp_path / "odd.pth")
    with pytest.raises(ArtifactError) as error:
        read_trunk(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_half_precision_and_counters_are_weights(tmp_path: Path) -> None:
    state = {"a": torch.ones(2, dtype=torch.float16), "bn.num_batches_tracked": torch.tensor(7)}
    save_file(state, tmp_path / "half.safetensors")
    assert read_trunk(tmp_path / "half.safetensors").keys() == state.keys()
