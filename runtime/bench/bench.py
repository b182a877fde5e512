"""Benchmark bundles on a device: fresh processes in random order, verified outputs, one Latency record per bundle."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import DeviceError, InputError, RobxError
from robx.progress import Progress, silent
from robx.records import (
    Latency,
    Preprocessing,
    append_measurements,
    load_bundle,
    require_measurable,
    to_json,
    utc_now,
    warn_outdated,
)
from robx.runtime.bench import profiles, runner_zip, validity
from robx.runtime.bench.inputs import Inputs, load_inputs, open_images
from robx.runtime.bench.profiles import BenchSettings, find_profile
from robx.runtime.bench.record import Origin, Run, Try, make_record
from robx.runtime.bench.reference import find_reference
from robx.runtime.bench.results import read_result
from robx.runtime.bench.runners import Runner, choose_runner, job_hashes, python_command
from robx.runtime.bench.transports import Transport, open_transport
from robx.runtime.bench.workspace import workspace
from robx.runtime.device.runner import RESULT
from robx.runtime.session import check_bundle
from robx.store.files import sha256_file

_LOAD_SECONDS = 300  # for loading and the first inference, in which an engine may compile its model
_MAX_FAILURES = 2  # failed processes of one bundle, after which its remaining ones are skipped


def bench(
    settings: BenchSettings, *, progress: Progress = silent, say: Callable[[str], None] = lambda _: None
) -> list[Latency]:
    """Measure each bundle; append its record to its measurements.jsonl and write the raw samples beside it.

    Processes of different bundles run in random order, so that slow phases of the machine affect all bundles equally.
    A bundle that is UNSTABLE for a reason that may pass (drift, background load, ...) is measured again, up to
    `settings.retries` times and within profiles.RETRY_SECONDS; the record lists every try. `progress` is called with
    (done, total, note), `say` with a line about a bundle that should not be used any more, or that a setting has no
    effect on.

    Raises:
        InputError: a path is not a bundle, or a setting does not fit one.
        ArtifactError: a bundle is damaged.
        DeviceError: the device cannot be reached, or no process of any bundle succeeded.
    """
    runs = _prepare(settings, say)
    if unused := profiles.unused_threads(settings, [run.bundle for run in runs]):
        say(unused)
    for run in runs:
        warn_outdated(run.folder, run.bundle, say)
    started = utc_now()
    with open_transport(settings.device) as transport:
        runner = choose_runner(transport, wanted=settings.runner, python=settings.python)
        for run in runs:
            _push(transport, run, settings, runner)
        begun = time.monotonic()
        _measure_all(transport, runs, settings, progress, runner)
        each = (time.monotonic() - begun) / len(runs)
        retried, deadline = runs, time.monotonic() + profiles.RETRY_SECONDS
        for _ in range(settings.retries):
            retried = [run for run in retried if validity.is_passing(run.tries[-1].reasons(settings))]
            if not retried or time.monotonic() + each * len(retried) > deadline:
                break
            for run in retried:
                run.tries.append(Try())
            _measure_all(transport, retried, settings, progress, runner)
        kind = transport.kind
    if not any(one.results for run in runs for one in run.tries):
        raise DeviceError(
            f"{runs[0].folder} could not be measured on {settings.device}: {runs[0].tries[0].failures[0]}"
        )
    return _record(runs, settings, Origin(kind=kind, started=started, runner=runner))


def _measure_all(
    transport: Transport, runs: list[Run], settings: BenchSettings, progress: Progress, runner: Runner
) -> None:
    """Run the processes of one try of each bundle, in random order."""
    order = [run for run in runs for _ in range(settings.process_count)]
    random.Random(settings.seed).shuffle(order)
    again = ""
    if len(runs[0].tries) > 1:
        codes = {code for run in runs for code in validity.codes_of(run.tries[-2].reasons(settings))}
        again = f" again ({', '.join(sorted(codes))})"
    for done, run in enumerate(order):
        progress(done, len(order), f"measuring {run.label}{again}")
        _measure(transport, run, _time_limit(settings), runner)
    progress(len(order), len(order), "measured")


def _record(runs: list[Run], settings: BenchSettings, origin: Origin) -> list[Latency]:
    """Write every bundle's record; a folder that cannot be written does not lose the other folders' records."""
    outputs: dict[int, dict[Path, np.ndarray]] = {}  # of the references, by input and folder
    found, unsaved = [], list[RobxError]()
    for run in runs:
        cache = outputs.setdefault(id(run.inputs), {})
        reference = find_reference(run.folder, run.bundle, run.inputs.images, cache)
        try:
            record = make_record(run, settings, origin, reference=reference)
            append_measurements(run.folder / "measurements.jsonl", [record])
            found.append(record)
        except RobxError as error:
            unsaved.append(error)
    if unsaved:
        raise unsaved[0]
    return found


def _prepare(settings: BenchSettings, say: Callable[[str], None]) -> list[Run]:
    python_command(settings.python)  # raises before anything is read
    source = open_images(settings, say)
    inputs: dict[tuple[Preprocessing, int], Inputs] = {}
    runs = []
    for number, (folder, label) in enumerate(zip(settings.folders, settings.labels, strict=True)):
        if (folder / "student.json").is_file():
            raise InputError(f"{folder} is a student: export it with robx export, then bench the bundle")
        bundle = load_bundle(folder)
        check_bundle(folder, bundle)
        require_measurable(folder)
        fixed = bundle.inputs[0].shape[0]
        if settings.batch > 1 and fixed not in (None, settings.batch):
            raise InputError(f"{folder} has a fixed batch of {fixed}: it cannot run batches of {settings.batch}")
        batch = fixed or settings.batch
        key = bundle.preprocessing, batch
        if key not in inputs:
            inputs[key] = load_inputs(bundle.preprocessing, source, batch=batch)
        runs.append(Run(folder, bundle, inputs[key], f"b{number}", batch, label))
    return runs


def _push(transport: Transport, run: Run, settings: BenchSettings, runner: Runner) -> None:
    """Copy the runner, the images, the job and the bundle's files; the job lists the hash of each."""
    with workspace() as here:
        np.save(here / "images.npy", run.inputs.images)
        program = runner.files(run.bundle, here)
        hashes = {f"bundle/{f.path}": f.sha256 for f in run.bundle.deployed}
        hashes["images.npy"] = sha256_file(here / "images.npy")
        hashes |= job_hashes(runner, program)
        (here / "job.json").write_text(json.dumps(_job(run, settings, hashes)))
        files = {f"bundle/{f.path}": run.folder / f.path for f in run.bundle.deployed}
        files |= program | {name: here / name for name in ("images.npy", "job.json")}
        transport.push(files, run.name)


def _job(run: Run, settings: BenchSettings, hashes: dict[str, str]) -> Any:
    profile, processes = find_profile(settings.profile), settings.process_count
    return {
        "engine": runner_zip.engine_name(run.bundle),
        "folder": "bundle",
        "manifest": to_json(run.bundle),
        "settings": to_json(dataclasses.replace(settings.session, batch=run.batch)),
        "files": hashes,
        "affinity": list(settings.affinity) if settings.affinity else None,
        "batch": run.batch,
        "latency": not settings.emulated,
        "cool_down_seconds": profile.cool_down_seconds,
        "queries": -(-profile.queries // processes),
        "seconds": profile.seconds / processes,
        "max_seconds": profile.max_seconds / processes,
        "warm_up_seconds": profile.warm_up_seconds,
        "warm_up_limit": profile.warm_up_limit,
        "time_limit": _time_limit(settings),
    }


def _time_limit(settings: BenchSettings) -> int:
    """Seconds after which a process counts as hung."""
    profile = find_profile(settings.profile)
    return (
        int(profile.cool_down_seconds + profile.warm_up_limit + profile.max_seconds / settings.process_count)
        + _LOAD_SECONDS
    )


def _measure(transport: Transport, run: Run, limit: int, runner: Runner) -> None:
    """Run one fresh process; an error is kept as a failure of the bundle, whose other processes may still succeed."""
    current = run.tries[-1]
    if current.untimed or current.hung or len(current.failures) >= _MAX_FAILURES:
        return
    try:
        status, text = transport.run(run.name, [*runner.command, "job.json"], timeout=limit + 30)
        current.hung = status in (-signal.SIGALRM, 128 + signal.SIGALRM)
        with workspace() as folder:
            path = _pull(transport, run, folder, status, text)
            current.results.append(read_result(path, images=len(run.inputs.images)))
    except DeviceError as error:
        current.failures.append(str(error))


def _pull(transport: Transport, run: Run, into: Path, status: int, text: str) -> Path:
    """Fetch the result file; without one, raise with the last line that the runner printed."""
    try:
        return transport.pull(run.name, RESULT, into)
    except DeviceError:
        if status == 0:
            raise
        last = text.splitlines()[-1].strip()[:300] if text else "it printed nothing"
        raise DeviceError(f"the runner ended {_ending(status)}: {last}") from None


def _ending(status: int) -> str:
    """An exit status in words: 128 + n (shell) and -n (Python) mean signal n."""
    number = -status if status < 0 else status - 128
    meanings = {signal.SIGALRM: "it exceeded its time limit", signal.SIGKILL: "killed, typically for lack of memory"}
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"with status {status}"
    return f"by {name.name} ({meanings[name]})" if name in meanings else f"by {name.name}"
