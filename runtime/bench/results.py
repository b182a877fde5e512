"""Read the runner's result file, which is not trusted, and compute a record's figures from it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import DeviceError, first_line
from robx.records import Value
from robx.runtime.bench import latency, result_schema, telemetry

_MAX_PART_BYTES = 512 * 1024 * 1024
_MAX_JSON_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ProcessResult:
    """One process's report."""

    report: Mapping[str, Any]  # result.json
    samples: np.ndarray  # int64 ns (n,); empty if nothing was timed
    outputs: np.ndarray  # float32 (N, D)
    seen: np.ndarray  # bool (N,): images that the timed run reached
    snapshots: list[dict[str, Any]]  # of the timed window

    def digest(self) -> dict[str, Any]:
        """Summary of the telemetry."""
        return telemetry.digest(self.snapshots, cores=int(self.report["device"]["cpu"]["cores"] or 1))


def read_result(path: Path, *, images: int) -> ProcessResult:
    """Read a result.zip.

    Raises:
        DeviceError: the runner reported an error, or the file is damaged or was not written by a runner.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            report = _report(archive)
            timed = bool(report["timed"])
            outputs, seen = _outputs(archive, images)
            samples = _array(archive, "samples.npy") if timed else np.empty(0, dtype=np.int64)
            # It is missing if the telemetry process could not be started; validity reports that.
            watched = "telemetry.jsonl" in archive.namelist()
            text = _part(archive, "telemetry.jsonl", _MAX_JSON_BYTES * 16).decode(errors="replace") if watched else ""
    except DeviceError:
        raise
    except Exception as error:  # the parsers of zipfile, zlib and numpy raise many types
        what = first_line(error, limit=120)
        raise DeviceError(f"the device sent a damaged result ({what}): run the bench again") from error
    if timed and (samples.dtype != np.int64 or samples.ndim != 1 or not len(samples) or samples.min() <= 0):
        raise DeviceError("the device sent samples that are not durations: run the bench again")
    snapshots = telemetry.within(telemetry.parse(text), report["window"]) if timed else []
    return ProcessResult(report, samples, outputs, seen, snapshots)


def figures(results: Sequence[ProcessResult], *, batch: int) -> tuple[dict[str, Value], dict[str, str]]:
    """The values of a Latency record, and the reasons for missing ones."""
    values = latency.summarise([r.samples for r in results], images_per_query=batch)
    missing = {
        name: f"{len(np.concatenate([r.samples for r in results]))} queries; at least {least} are needed"
        for name, least in (("p90", 64), ("p99", 662))
        if name not in values
    }
    values["load"] = _over([r.report["load_ns"] / 1e6 for r in results], "ms")
    values["first"] = _over([r.report["first_ns"] / 1e6 for r in results], "ms")
    memory = [(r.report["memory_before"], r.report["memory"]) for r in results]
    if all(before and after for before, after in memory):
        values["peak_memory"] = _over([after["peak"] / 1e6 for _, after in memory], "MB")
        values["model_memory"] = _over([(after["peak"] - before["now"]) / 1e6 for before, after in memory], "MB")
    else:
        missing["peak_memory"] = "the kernel does not report it (no VmHWM)"
    _energy(results, batch, values, missing)
    if all(r.report["gpu"] for r in results):
        _gpu(results, batch, values, missing)
    return values, missing


def _energy(results: Sequence[ProcessResult], batch: int, values: dict[str, Value], missing: dict[str, str]) -> None:
    """Joules per image over the timed windows, gross: includes the device's idle power."""
    images = sum(len(r.samples) for r in results) * batch
    seconds = sum(r.report["window"][1] - r.report["window"][0] for r in results)
    if seconds < 10:
        missing["energy"] = f"the timed windows last {seconds:.0f} s; at least 10 s are needed"
        return
    counted = [telemetry.joules(r.report["energy"]) for r in results]
    watts = [(r.digest().get("watts"), r.report["window"][1] - r.report["window"][0]) for r in results]
    if all(used is not None for used, _ in counted):
        total = sum(used for used, _ in counted if used is not None)
    elif all(power is not None for power, _ in watts):
        total = sum(power * duration for power, duration in watts if power is not None)
    else:
        missing["energy"] = next(reason for used, reason in counted if used is None)
        return
    values["energy"] = Value(value=total / images, n=images, unit="J")


def _gpu(results: Sequence[ProcessResult], batch: int, values: dict[str, Value], missing: dict[str, str]) -> None:
    """From the GPU's driver: bytes in use by the process after its last query, and gross joules per image."""
    after = [r.report["gpu"]["after"] for r in results]
    if all(reading["memory"] is not None for reading in after):
        values["gpu_memory"] = _over([reading["memory"] / 1e6 for reading in after], "MB")
    else:
        missing["gpu_memory"] = next((r["reason"] for r in after if r["reason"]), "the driver does not report it")
    counted = [telemetry.joules(r.report["gpu"]) for r in results]
    if all(used is not None for used, _ in counted):
        images = sum(len(r.samples) for r in results) * batch
        values["gpu_energy"] = Value(value=sum(used or 0.0 for used, _ in counted) / images, n=images, unit="J")
    else:
        missing["gpu_energy"] = next(reason for used, reason in counted if used is None)


def _over(numbers: Sequence[float], unit: str) -> Value:
    """Median, minimum and maximum over the processes."""
    return Value(value=float(np.median(numbers)), low=min(numbers), high=max(numbers), n=len(numbers), unit=unit)


def _report(archive: zipfile.ZipFile) -> dict[str, Any]:
    report = result_schema.parse(_part(archive, "result.json", _MAX_JSON_BYTES))
    if not isinstance(report, dict) or report.get("schema") != 1:
        raise DeviceError("the device sent a result with another schema: update robx and run the bench again")
    if "error" in report:
        raise DeviceError(str(report["error"])[:500])
    kind = result_schema.TimedReport if report.get("timed") else result_schema.Report
    result_schema.check(report, kind, "result")
    if report["timed"] and len(report["window"]) != 2:
        raise DeviceError("the device sent a window without start and end: run the bench again")
    return report


def _outputs(archive: zipfile.ZipFile, images: int) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(_part(archive, "outputs.npz", _MAX_PART_BYTES))) as inner:
        outputs, seen = _array(inner, "outputs.npy"), _array(inner, "seen.npy")
    if outputs.dtype != np.float32 or outputs.ndim != 2 or seen.shape != (images,) or len(outputs) != images:
        raise DeviceError(f"the device returned {outputs.dtype} {outputs.shape} for {images} images: expected (N, D)")
    return outputs, seen.astype(bool)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    data = _part(archive, name, _MAX_PART_BYTES)
    array = np.load(io.BytesIO(data), allow_pickle=False, max_header_size=1000)
    if not isinstance(array, np.ndarray):
        raise DeviceError(f"the device sent a {name} that is not an array: run the bench again")
    return array


def _part(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's bytes, at most `limit`; zipfile enforces the size that the member declares."""
    if archive.getinfo(name).file_size > limit:
        raise DeviceError(f"the device sent {name} with more than {limit} bytes, which no runner writes")
    return archive.read(name)
