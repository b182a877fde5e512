"""Measuring bundles on a device: fresh processes in random order, the answers checked, one Latency record each."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robx import __version__
from robx.errors import DeviceError, InputError
from robx.files import sha256_bytes, sha256_file, write_bytes
from robx.progress import Progress
from robx.records import Bundle, Latency, Preprocessing, Value, append_measurements, load_bundle, to_json, utc_now
from robx.runtime import packing, validity
from robx.runtime.inputs import COUNT, Inputs, load_inputs
from robx.runtime.profiles import Profile, find_profile
from robx.runtime.reference import Reference, check_outputs, find_reference
from robx.runtime.results import ProcessResult, figures, read_result
from robx.runtime.runner import RESULT
from robx.runtime.session import SessionSettings
from robx.runtime.transports import Transport, open_transport
from robx.sources import ImageSource

_LOAD_SECONDS = 300  # for loading and the first inference: an engine may compile its model then
_PATIENCE = 2  # failed processes of one bundle, after which its others are not tried


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how; every field stands in the record."""

    device: str = "local"  # local, ssh://[user@]host[:port] or adb://serial
    profile: str = "quick"  # of runtime/profiles.py
    settings: SessionSettings = field(default_factory=SessionSettings)
    processes: int | None = None  # None: the profile's
    affinity: tuple[int, ...] | None = None  # cores that the measured process may use; None: any
    batch: int = 1  # more than one is offline throughput
    python: str | None = None  # the device's Python command
    emulated: bool = False  # an emulated processor: refuse latency, keep the answers
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        find_profile(self.profile)
        for name, number in (("processes", self.processes), ("batch", self.batch)):
            if number is not None and number < 1:
                raise InputError(f"{name} is {number}: give 1 or more")


@dataclass
class _Run:
    """One bundle on its way through the bench."""

    folder: Path
    bundle: Bundle
    inputs: Inputs
    name: str  # of its folder on the device
    batch: int
    results: list[ProcessResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def bench(
    folders: Sequence[Path],
    options: BenchOptions,
    *,
    source: ImageSource | None = None,
    progress: Progress | None = None,
) -> list[Latency]:
    """Measure each bundle and append its record to its measurements.jsonl, the raw samples beside it.

    Processes of different bundles are interleaved in random order, so that a machine that warms up or is used meanwhile
    meets all of them alike.

    Raises:
        InputError: no bundle, or an option that the bundles do not take.
        ArtifactError: a damaged bundle.
        DeviceError: the device cannot be reached, or no process of any bundle ended well.
    """
    profile = find_profile(options.profile)
    processes = 1 if options.emulated else options.processes or profile.processes
    runs = _prepare(folders, options, source)
    started = utc_now()
    order = [run for run in runs for _ in range(processes)]
    random.Random(options.seed).shuffle(order)
    with open_transport(options.device, python=options.python) as transport:
        for run in runs:
            _push(transport, run, options, profile, processes)
        for done, run in enumerate(order):
            if progress is not None:
                progress(done, len(order), f"measuring {run.folder.name}")
            _measure(transport, run, _time_limit(profile, processes))
        kind = transport.kind
    if progress is not None:
        progress(len(order), len(order), "measured")
    if not any(run.results for run in runs):
        raise DeviceError(f"{runs[0].folder} could not be measured on {options.device}: {runs[0].failures[0]}")
    known: dict[Preprocessing, dict[Path, np.ndarray]] = {}
    found = []
    for run in runs:
        cache = known.setdefault(run.bundle.preprocessing, {})
        reference = find_reference(run.folder, run.bundle, run.inputs.images, cache)
        found.append(_record(run, options, profile, processes, kind, started, reference))
        append_measurements(run.folder / "measurements.jsonl", [found[-1]])
    return found


def _prepare(folders: Sequence[Path], options: BenchOptions, source: ImageSource | None) -> list[_Run]:
    if not folders:
        raise InputError("no bundle was given: robx export makes one")
    inputs: dict[Preprocessing, Inputs] = {}
    runs = []
    for number, folder in enumerate(folders):
        bundle = load_bundle(folder)
        fixed = bundle.inputs[0].shape[0]
        if options.batch > 1 and fixed not in (None, options.batch):
            raise InputError(f"{folder} has a fixed batch of {fixed}: it cannot run batches of {options.batch}")
        batch = fixed or options.batch
        if bundle.preprocessing not in inputs:
            count = -(-COUNT // batch) * batch
            inputs[bundle.preprocessing] = load_inputs(bundle.preprocessing, source, count=count)
        runs.append(_Run(folder, bundle, inputs[bundle.preprocessing], f"b{number}", batch))
    return runs


def _push(transport: Transport, run: _Run, options: BenchOptions, profile: Profile, processes: int) -> None:
    """The runner, the images, the job and the bundle's files, each with the hash that it is to arrive with."""
    with tempfile.TemporaryDirectory(prefix="robx-") as folder:
        here = Path(folder)
        np.save(here / "images.npy", run.inputs.images)
        (here / packing.NAME).write_bytes(packing.pack_runner(run.bundle))
        hashes = {f"bundle/{f.path}": f.sha256 for f in run.bundle.files}
        hashes["images.npy"] = sha256_file(here / "images.npy")
        (here / "job.json").write_text(json.dumps(_job(run, options, profile, processes, hashes)))
        files = {f"bundle/{f.path}": run.folder / f.path for f in run.bundle.files}
        files |= {name: here / name for name in ("images.npy", packing.NAME, "job.json")}
        transport.push(files, run.name)


def _job(run: _Run, options: BenchOptions, profile: Profile, processes: int, hashes: dict[str, str]) -> Any:
    return {
        "engine": run.bundle.runtime,
        "folder": "bundle",
        "manifest": to_json(run.bundle),
        "settings": to_json(options.settings),
        "files": hashes,
        "affinity": list(options.affinity) if options.affinity else None,
        "batch": run.batch,
        "latency": not options.emulated,
        "cool_down_seconds": profile.cool_down_seconds,
        "queries": -(-profile.queries // processes),
        "seconds": profile.seconds / processes,
        "max_seconds": profile.max_seconds / processes,
        "warm_up_seconds": profile.warm_up_seconds,
        "warm_up_limit": profile.warm_up_limit,
        "time_limit": _time_limit(profile, processes),
    }


def _time_limit(profile: Profile, processes: int) -> int:
    """Seconds after which a process is hung."""
    return int(profile.cool_down_seconds + profile.warm_up_limit + profile.max_seconds / processes) + _LOAD_SECONDS


def _measure(transport: Transport, run: _Run, limit: int) -> None:
    """One fresh process; what fails is kept as the bundle's failure, for its other processes may do."""
    refused = any(not result.report["timed"] for result in run.results)
    if refused or len(run.failures) >= _PATIENCE:
        return
    try:
        status, text = transport.run(run.name, [packing.NAME, "job.json"], timeout=limit + 30)
        with tempfile.TemporaryDirectory(prefix="robx-") as folder:
            path = _pull(transport, run, Path(folder), status, text)
            run.results.append(read_result(path, images=len(run.inputs.images)))
    except DeviceError as error:
        run.failures.append(str(error))


def _pull(transport: Transport, run: _Run, into: Path, status: int, text: str) -> Path:
    """The result's file; when there is none, what the runner said last."""
    try:
        return transport.pull(run.name, RESULT, into)
    except DeviceError:
        if status == 0:
            raise
        last = text.splitlines()[-1].strip()[:300] if text else "it said nothing"
        raise DeviceError(f"the runner ended with status {status}: {last}") from None


def _record(
    run: _Run,
    options: BenchOptions,
    profile: Profile,
    processes: int,
    kind: str,
    started: str,
    reference: Reference | None,
) -> Latency:
    reports, refused = [r.report for r in run.results], [r for r in run.results if not r.report["timed"]]
    reasons = [f"failed: {failure}" for failure in dict.fromkeys(run.failures)]
    values: dict[str, Value] = {}
    missing: dict[str, str] = {}
    if refused or not run.results:
        told = refused[0].report["device"].get("emulated") if refused else "no process ended well"
        why = str(told or "the device was said to be emulated")
        missing = dict.fromkeys(("p50", "p90", "p99", "load", "first", "peak_memory", "energy"), why)
        reasons += [f"emulated: {why}"] if refused else []
    else:
        values, missing = figures(run.results, batch=run.batch)
        samples, digests = [r.samples for r in run.results], [r.digest() for r in run.results]
        reasons += validity.judge(reports, samples, digests, profile=profile, processes=processes)
        _preprocessing(run, kind, values, missing)
    for result in run.results:
        cosines, against = check_outputs(result.outputs, result.seen, reference, run.bundle)
        values |= cosines
        reasons += [reason for reason in against if reason not in reasons]
    name, digest = _save_samples(run, started)
    return Latency(
        bundle_id=run.bundle.id,
        device={"kind": kind, "address": options.device, **(dict(reports[0]["device"]) if reports else {})},
        settings=_settings(run, options, profile, processes, reference),
        values=values,
        verdict=validity.verdict(reasons),
        reasons=tuple(reasons),
        samples=name,
        samples_sha256=digest,
        started=started,
        missing=missing,
    )


def _settings(
    run: _Run, options: BenchOptions, profile: Profile, processes: int, reference: Reference | None
) -> dict[str, Any]:
    reports = [r.report for r in run.results]
    return {
        "profile": to_json(profile),
        "scenario": "single_stream" if run.batch == 1 else "offline",
        "batch": run.batch,
        "processes": processes,
        "threads": options.settings.threads,
        "affinity": list(options.affinity) if options.affinity else None,
        "precision_hint": options.settings.precision_hint,
        "includes": "the call of the runtime, with its copies",
        "images": run.inputs.name,
        "reference": reference.name if reference else None,
        "runtime": dict(reports[0]["facts"]) if reports else {},
        "warm_up": [r.get("warm_up") for r in reports],
        "cool_down": [r.get("cool_down") for r in reports],
        "telemetry": [r.digest() for r in run.results],
        "process_p50_ms": [float(np.median(r.samples)) / 1e6 for r in run.results if len(r.samples)],
        "order_seed": options.seed,
        "robx_version": __version__,
        "runner_sha256": packing.runner_sha256(run.bundle),
    }


def _preprocessing(run: _Run, kind: str, values: dict[str, Value], missing: dict[str, str]) -> None:
    """Decoding, resizing and normalising, apart and in the sum that a product's user waits for."""
    if kind != "local":
        why = "images are decoded on this machine, and its times are not the device's"
        missing |= {"preprocess": why, "end_to_end": why}
        return
    times = run.inputs.preprocess_ns
    values["preprocess"] = Value(value=float(np.median(times)) / 1e6, n=len(times), unit="ms")
    if run.batch == 1:
        values["end_to_end"] = Value(value=values["preprocess"].value + values["p50"].value, n=len(times), unit="ms")


def _save_samples(run: _Run, started: str) -> tuple[str | None, str | None]:
    """Raw samples (int64 ns a process) and telemetry, so that every figure can be computed again."""
    timed = [r for r in run.results if len(r.samples)]
    if not timed:
        return None, None
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"process_{i}": r.samples for i, r in enumerate(timed)}
    np.savez_compressed(buffer, telemetry=json.dumps([r.snapshots for r in timed]), **arrays)
    data = buffer.getvalue()
    digest = sha256_bytes(data)
    name = f"samples-{started[:19].replace(':', '')}-{digest[:8]}.npz"
    write_bytes(run.folder / name, data)
    return name, digest
