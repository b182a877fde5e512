"""Raw samples that are damaged or lie: left out of the page and named, with bounded memory."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robx.errors import ArtifactError
from robx.eval.report.collect import collect
from robx.eval.report.render import make_pages
from robx.eval.report.samples import MAX_SAMPLES, read_samples
from robx.records import append_measurements


def npy(header: str, data: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with any header."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def header(shape: str, descr: str = "<i8") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def packed(data: bytes, name: str = "process_0.npy", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as members:
        members.writestr(name, data)
    return buffer.getvalue()


def savez(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def flipped(data: bytes) -> bytes:
    """The deflate stream overwritten."""
    at = data.index(b"process_0.npy") + len("process_0.npy") + 8
    return data[:at] + b"\xff" * 24 + data[at + 24 :]


def patched(data: bytes, *, flags: int | None = None, method: int | None = None) -> bytes:
    """The flags and the compression method in the local header and in the directory."""
    out = bytearray(data)
    for magic, flag_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(magic) + flag_at
        if flags is not None:
            out[at : at + 2] = flags.to_bytes(2, "little")
        if method is not None:
            out[at + 2 : at + 4] = method.to_bytes(2, "little")
    return bytes(out)


GOOD = savez(process_0=np.arange(1, 2000, dtype=np.int64) ** 2)
BAD: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: savez(process_0=np.zeros(9, np.int64)),
    "one zero": lambda: savez(process_0=np.array([5, 0, 5])),
    "negative": lambda: savez(process_0=np.array([5, -(2**63), 5])),
    "floats": lambda: savez(process_0=np.ones(9)),
    "objects": lambda: savez(process_0=np.array([{}], dtype=object)),
    "two axes": lambda: savez(process_0=np.ones((3, 3), np.int64)),
    "empty": lambda: savez(process_0=np.ones(0, np.int64)),
    "not a zip": lambda: b"no zip at all",
    "nothing": lambda: b"",
    "no member": lambda: savez(),
    "no npy": lambda: packed(b"hello", "notes.txt"),
    "text as npy": lambda: packed(b"hello"),
    "cut": lambda: GOOD[: len(GOOD) // 2],
    "damaged deflate": lambda: flipped(GOOD),
    "encrypted": lambda: patched(GOOD, flags=1),
    "unknown compression": lambda: patched(GOOD, method=99),
    "lzma": lambda: packed(npy(header("(2,)"), b"\1" * 16), method=zipfile.ZIP_LZMA),
    "shape 10^9": lambda: packed(npy(header("(1000000000,)"), b"\1" * 64)),
    "shape 10^30": lambda: packed(npy(header(f"({10**30},)"))),
    "shape of many axes": lambda: packed(npy(header(f"({'1000,' * 40})"))),
    "shape too large": lambda: packed(npy(header("(9,)"), b"\1" * 64)),
    "shape too small": lambda: packed(npy(header("(7,)"), b"\1" * 64)),
    "shape negative": lambda: packed(npy(header("(-1,)"), b"\1" * 64)),
    "header ((((": lambda: packed(npy("(" * 200)),
    "header of calls": lambda: packed(npy("__import__('os')")),
    "header of ten thousand": lambda: packed(npy("(" * 10_000)),
    "header cut": lambda: packed(npy(header("(8,)"))[:20]),
    "header of version 2 that claims 4 GB": lambda: packed(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64)),
    "descr of nothing": lambda: packed(npy(header("(8,)", "<q17"), b"\1" * 64)),
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], str]:
    def write(data: bytes) -> str:
        (tmp_path / "s.npz").write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    return write


def test_good_samples_are_milliseconds_of_each_process(written, tmp_path):
    first, second = np.array([1_500_000, 2_000_000]), np.array([3_000_000], np.uint32)
    digest = written(savez(process_1=second, process_0=first, warm_0=first, telemetry=np.array("[]")))
    assert [list(found) for found in read_samples(tmp_path, "s.npz", digest)] == [[1.5, 2.0], [3.0]]


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_positive_nanoseconds_is_refused_in_one_line(kind, written, tmp_path):
    with pytest.raises(ArtifactError) as refused:
        read_samples(tmp_path, "s.npz", written(BAD[kind]()))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("claimed", "why"),
    [
        ("(8,)", "does not hold the 8 samples"),
        (f"({MAX_SAMPLES},)", "does not hold"),
        (f"({MAX_SAMPLES + 1},)", "more than"),
        (f"({2**62},)", "more than"),
    ],
)
def test_memory_follows_neither_the_header_nor_the_inflated_size(claimed, why, written, tmp_path):
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    zero = bytes(1 << 20)
    body = deflate.compress(npy(header(claimed))) + b"".join(deflate.compress(zero) for _ in range(400))
    body += deflate.flush()
    data = bytearray(packed(npy(header(claimed)), method=zipfile.ZIP_DEFLATED))
    # The small member's stream is replaced by the one that inflates to 400 MB.
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        info = members.infolist()[0]
    start = data.index(b"process_0.npy") + len("process_0.npy")
    grown = data[:start] + body + data[start + info.compress_size :]
    directory = grown.index(b"PK\x01\x02")
    grown[directory + 20 : directory + 24] = len(body).to_bytes(4, "little")
    grown[directory + 24 : directory + 28] = (400 << 20).to_bytes(4, "little")
    end = grown.index(b"PK\x05\x06")
    grown[end + 16 : end + 20] = directory.to_bytes(4, "little")
    digest = written(bytes(grown))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=why):
            read_samples(tmp_path, "s.npz", digest)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["zeros", "negative", "damaged deflate", "header ((((", "encrypted"])
def test_the_page_is_written_without_the_figure_and_names_the_file(kind, records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    latency = records.write_latency(place, bundle.id, 4.0)
    (place / "bad.npz").write_bytes(BAD[kind]())
    digest = hashlib.sha256((place / "bad.npz").read_bytes()).hexdigest()
    (place / "measurements.jsonl").unlink()
    append_measurements(
        place / "measurements.jsonl", [replace(latency, samples="bad.npz", samples_sha256=digest)]
    )  # fmt: skip
    pages = make_pages(collect([tmp_path]))
    assert "Deploy resnet18" in pages.html and 'id="latency-0' not in pages.html
    assert "raw samples" in pages.html and "bad.npz" in pages.html


def test_latencies_of_any_size_are_drawn(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    for precision, samples in (("fp32", np.array([1, 2**63 - 1])), ("int8", np.array([7, 7, 7]))):
        place = tmp_path / "r" / f"openvino-{precision}"
        bundle = records.write_bundle(place, student, precision, 900)
        latency = records.write_latency(place, bundle.id, 4.0)
        (place / "odd.npz").write_bytes(savez(process_0=samples))
        digest = hashlib.sha256((place / "odd.npz").read_bytes()).hexdigest()
        (place / "measurements.jsonl").unlink()
        append_measurements(
            place / "measurements.jsonl", [replace(latency, samples="odd.npz", samples_sha256=digest)]
        )  # fmt: skip
    assert 'id="latency-0' in make_pages(collect([tmp_path])).html
