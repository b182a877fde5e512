"""Measuring bundles on a device: fresh processes in random order, the answers checked, one Latency record each."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import DeviceError, InputError, RobxError
from robx.images.sources import ImageSource
from robx.progress import Progress
from robx.records import Latency, Preprocessing, append_measurements, load_bundle, to_json, utc_now
from robx.runtime.bench import runner_zip
from robx.runtime.bench.inputs import COUNT, Inputs, load_inputs
from robx.runtime.bench.profiles import BenchOptions, Profile, find_profile
from robx.runtime.bench.record import Run, make_record
from robx.runtime.bench.reference import find_reference
from robx.runtime.bench.results import read_result
from robx.runtime.bench.transports import Transport, open_transport
from robx.runtime.device.runner import RESULT
from robx.runtime.session import check_onnx
from robx.store.files import sha256_file

_LOAD_SECONDS = 300  # for loading and the first inference: an engine may compile its model then
_PATIENCE = 2  # failed processes of one bundle, after which its others are not tried


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
    found, unsaved = [], list[RobxError]()
    for run in runs:
        cache = known.setdefault(run.bundle.preprocessing, {})
        reference = find_reference(run.folder, run.bundle, run.inputs.images, cache)
        try:
            record = make_record(run, options, processes=processes, kind=kind, started=started, reference=reference)
            append_measurements(run.folder / "measurements.jsonl", [record])
            found.append(record)
        except RobxError as error:  # one folder that cannot be written loses no other's record
            unsaved.append(error)
    if unsaved:
        raise unsaved[0]
    return found


def _prepare(folders: Sequence[Path], options: BenchOptions, source: ImageSource | None) -> list[Run]:
    if not folders:
        raise InputError("no bundle was given: robx export makes one")
    inputs: dict[Preprocessing, Inputs] = {}
    runs = []
    for number, folder in enumerate(folders):
        if (folder / "student.json").is_file():
            raise InputError(f"{folder} is a student: export it with robx export, and give the bundle")
        bundle = load_bundle(folder)
        check_onnx(folder, bundle)
        fixed = bundle.inputs[0].shape[0]
        if options.batch > 1 and fixed not in (None, options.batch):
            raise InputError(f"{folder} has a fixed batch of {fixed}: it cannot run batches of {options.batch}")
        batch = fixed or options.batch
        if bundle.preprocessing not in inputs:
            count = -(-COUNT // batch) * batch
            inputs[bundle.preprocessing] = load_inputs(bundle.preprocessing, source, count=count)
        runs.append(Run(folder, bundle, inputs[bundle.preprocessing], f"b{number}", batch))
    return runs


def _push(transport: Transport, run: Run, options: BenchOptions, profile: Profile, processes: int) -> None:
    """The runner, the images, the job and the bundle's files, each with the hash that it is to arrive with."""
    with tempfile.TemporaryDirectory(prefix="robx-") as folder:
        here = Path(folder)
        np.save(here / "images.npy", run.inputs.images)
        (here / runner_zip.NAME).write_bytes(runner_zip.pack_runner(run.bundle))
        hashes = {f"bundle/{f.path}": f.sha256 for f in run.bundle.files}
        hashes["images.npy"] = sha256_file(here / "images.npy")
        (here / "job.json").write_text(json.dumps(_job(run, options, profile, processes, hashes)))
        files = {f"bundle/{f.path}": run.folder / f.path for f in run.bundle.files}
        files |= {name: here / name for name in ("images.npy", runner_zip.NAME, "job.json")}
        transport.push(files, run.name)


def _job(run: Run, options: BenchOptions, profile: Profile, processes: int, hashes: dict[str, str]) -> Any:
    return {
        "engine": run.bundle.runtime,
        "folder": "bundle",
        "manifest": to_json(run.bundle),
        "settings": to_json(dataclasses.replace(options.settings, batch=run.batch)),
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


def _measure(transport: Transport, run: Run, limit: int) -> None:
    """One fresh process; what fails is kept as the bundle's failure, for its other processes may do."""
    refused = any(not result.report["timed"] for result in run.results)
    if refused or len(run.failures) >= _PATIENCE:
        return
    try:
        status, text = transport.run(run.name, [runner_zip.NAME, "job.json"], timeout=limit + 30)
        with tempfile.TemporaryDirectory(prefix="robx-") as folder:
            path = _pull(transport, run, Path(folder), status, text)
            run.results.append(read_result(path, images=len(run.inputs.images)))
    except DeviceError as error:
        run.failures.append(str(error))


def _pull(transport: Transport, run: Run, into: Path, status: int, text: str) -> Path:
    """The result's file; when there is none, what the runner said last."""
    try:
        return transport.pull(run.name, RESULT, into)
    except DeviceError:
        if status == 0:
            raise
        last = text.splitlines()[-1].strip()[:300] if text else "it said nothing"
        raise DeviceError(f"the runner ended {_ending(status)}: {last}") from None


def _ending(status: int) -> str:
    """An exit status in words: a shell's 128 + n, and Python's -n, are the signal n."""
    number = -status if status < 0 else status - 128
    told = {signal.SIGALRM: "hung until its time was over", signal.SIGKILL: "killed, as a device out of memory does"}
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"with status {status}"
    return f"by {name.name} ({told[name]})" if name in told else f"by {name.name}"
