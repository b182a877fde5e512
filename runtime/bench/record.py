"""What the processes of one bundle reported, made into its Latency record with the raw samples beside it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robx import __version__
from robx.records import Bundle, Latency, Value, to_json
from robx.runtime.bench import latency, runner_zip, validity
from robx.runtime.bench.inputs import Inputs
from robx.runtime.bench.profiles import BenchOptions, Profile, find_profile
from robx.runtime.bench.reference import Reference, check_outputs
from robx.runtime.bench.results import ProcessResult, figures
from robx.store.files import sha256_bytes, write_bytes


@dataclass
class Run:
    """One bundle on its way through the bench."""

    folder: Path
    bundle: Bundle
    inputs: Inputs
    name: str  # of its folder on the device
    batch: int
    results: list[ProcessResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def make_record(
    run: Run,
    options: BenchOptions,
    *,
    processes: int,
    kind: str,
    started: str,
    reference: Reference | None,
) -> Latency:
    """The record of one bundle: its figures, or why they are missing, and every reason against them.

    The raw samples are written into the bundle's folder; the record is not.
    """
    profile = find_profile(options.profile)
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
        values |= latency.sustained(samples)
        reasons += validity.judge(
            reports, samples, digests, profile=profile, processes=processes, threads=options.settings.threads
        )
        _preprocessing(run, kind, values, missing)
    for result in run.results:
        cosines, against = check_outputs(result.outputs, result.seen, reference, run.bundle)
        # The worst of the processes.
        values |= {name: min(value, values.get(name, value), key=lambda v: v.value) for name, value in cosines.items()}
        reasons += [reason for reason in against if reason not in reasons]
    name, digest = _save_samples(run, started)
    return Latency(
        bundle_id=run.bundle.id,
        device={**(reports[0]["device"] if reports else {}), "kind": kind, "address": options.device},
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
    run: Run, options: BenchOptions, profile: Profile, processes: int, reference: Reference | None
) -> dict[str, Any]:
    reports = [r.report for r in run.results]
    return {
        "profile": to_json(profile),
        "scenario": "single_stream" if run.batch == 1 else "offline",
        "batch": run.batch,
        "processes": processes,
        "threads": options.settings.threads,
        "affinity": list(options.affinity) if options.affinity else None,
        "cores": reports[0]["cores"] if reports else None,
        "environment": dict(reports[0]["environment"]) if reports else {},
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
        "runner_sha256": runner_zip.runner_sha256(run.bundle),
    }


def _preprocessing(run: Run, kind: str, values: dict[str, Value], missing: dict[str, str]) -> None:
    """Decoding, resizing and normalising, apart and in the sum that a product's user waits for."""
    if kind != "local":
        why = "images are decoded on this machine, and its times are not the device's"
        missing |= {"preprocess": why, "end_to_end": why}
        return
    times = run.inputs.preprocess_ns
    values["preprocess"] = Value(value=float(np.median(times)) / 1e6, n=len(times), unit="ms")
    if run.batch == 1:
        values["end_to_end"] = Value(value=values["preprocess"].value + values["p50"].value, n=len(times), unit="ms")


def _save_samples(run: Run, started: str) -> tuple[str | None, str | None]:
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
