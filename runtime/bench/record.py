"""Turn the results of one bundle's processes into its Latency record, with the raw samples beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robx import __version__
from robx.records import Bundle, Latency, Validity, Value, to_json
from robx.runtime.bench import latency, validity
from robx.runtime.bench.inputs import Inputs
from robx.runtime.bench.profiles import BenchSettings, find_profile
from robx.runtime.bench.reference import Reference, check_outputs
from robx.runtime.bench.results import ProcessResult, figures
from robx.runtime.bench.runners import Runner
from robx.store.files import sha256_bytes, write_bytes

# Of /proc/cpuinfo, as runtime/device/describe.py reports them.
INT8_FLAGS = frozenset({"avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
_BY_VALIDITY: tuple[Validity, ...] = ("VALID", "UNSTABLE", "INVALID")
_TIMED_VALUES = ("p50", "p90", "p99", "load", "first", "peak_memory", "energy")


@dataclass
class Try:
    """One measurement of a bundle: the results of its processes."""

    results: list[ProcessResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    hung: bool = False  # a process exceeded its time limit

    def reasons(self, settings: BenchSettings) -> list[str]:
        """Every reason to doubt the figures, but for the outputs."""
        found = [f"failed: {failure}" for failure in dict.fromkeys(self.failures)]
        if not self.results or self.untimed:
            return [*found, f"emulated: {self.why_untimed}"] if self.untimed else found
        reports, digests = [r.report for r in self.results], [r.digest() for r in self.results]
        return found + validity.judge(
            reports,
            [r.samples for r in self.results],
            digests,
            profile=find_profile(settings.profile),
            processes=settings.process_count,
            threads=settings.session.threads,
        )

    @property
    def untimed(self) -> list[ProcessResult]:
        """The processes that refused to measure time."""
        return [r for r in self.results if not r.report["timed"]]

    @property
    def why_untimed(self) -> str:
        """Why there are no times."""
        if not self.untimed:
            return "no process succeeded"
        return str(self.untimed[0].report["device"].get("emulated") or "the device was declared to be emulated")


@dataclass
class Run:
    """One bundle being measured."""

    folder: Path
    bundle: Bundle
    inputs: Inputs
    name: str  # of the bundle's folder on the device
    batch: int
    label: str  # a short name for messages
    tries: list[Try] = field(default_factory=lambda: [Try()])  # in order; the last one is being measured

    def best(self, settings: BenchSettings) -> Try:
        """The try that goes into the record: the most valid one, then the one with the fewest reasons against it.

        Its latency plays no part, so the choice does not favour fast tries.
        """

        def doubt(one: Try) -> tuple[int, int]:
            reasons = one.reasons(settings)
            return _BY_VALIDITY.index(validity.verdict(reasons)), len(reasons)

        return min(self.tries, key=doubt)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a benchmark ran, and which program measured."""

    kind: str  # of the transport
    started: str
    runner: Runner


def make_record(run: Run, settings: BenchSettings, origin: Origin, *, reference: Reference | None) -> Latency:
    """The record of one bundle: its figures, why any are missing, and every reason to doubt them.

    Writes the raw samples into the bundle's folder, but not the record.
    """
    chosen = run.best(settings)
    results, reasons = chosen.results, chosen.reasons(settings)
    values: dict[str, Value] = {}
    missing: dict[str, str] = {}
    if chosen.untimed or not results:
        missing = dict.fromkeys(_TIMED_VALUES, chosen.why_untimed)
    else:
        values, missing = figures(results, batch=run.batch)
        values |= latency.sustained([r.samples for r in results])
        _preprocessing(run, origin.kind, values, missing)
    missing |= untimed_parts(run.bundle)
    for result in results:
        cosines, against = check_outputs(result.outputs, result.seen, reference, run.bundle)
        # The lowest of all processes.
        values |= {name: min(value, values.get(name, value), key=lambda v: v.value) for name, value in cosines.items()}
        reasons += [reason for reason in against if reason not in reasons]
    name, digest = _save_samples(run.folder, results, origin.started)
    return Latency(
        bundle_id=run.bundle.id,
        device={**(results[0].report["device"] if results else {}), "kind": origin.kind, "address": settings.device},
        settings=_settings(run, settings, chosen, reference) | origin.runner.facts(run.bundle),
        values=values,
        verdict=validity.verdict(reasons),
        reasons=tuple(reasons),
        samples=name,
        samples_sha256=digest,
        started=origin.started,
        missing=missing,
    )


def other_cpu(bundle: Bundle, device: Mapping[str, Any]) -> str | None:
    """One line if an int8 bundle was chosen by its speed on another kind of CPU than the `device`, as described.

    Kinds differ in the instructions that multiply 8-bit integers; which int8 candidate is fastest depends on them.
    """
    cpu = device.get("cpu")
    measured = _cpu_kind(device.get("arch"), cpu.get("flags") if isinstance(cpu, dict) else None)
    chosen = _cpu_kind(bundle.chosen_on.get("arch"), bundle.chosen_on.get("flags"))
    if bundle.precision != "int8" or chosen is None or measured is None or chosen == measured:
        return None
    return f"chosen by its speed on {chosen}, but measured on {measured}: export it on such a CPU for the fastest int8"


def _cpu_kind(arch: Any, flags: Any) -> str | None:
    """The architecture and its int8 instructions; None if the machine did not report them."""
    if not isinstance(arch, str) or not isinstance(flags, list):
        return None
    return f"{arch} with {', '.join(sorted(INT8_FLAGS.intersection(map(str, flags)))) or 'no int8 instructions'}"


def _settings(run: Run, settings: BenchSettings, chosen: Try, reference: Reference | None) -> dict[str, Any]:
    reports = [r.report for r in chosen.results]
    return {
        "profile": to_json(find_profile(settings.profile)),
        "scenario": "single_stream" if run.batch == 1 else "offline",
        "batch": run.batch,
        "processes": settings.process_count,
        "threads": settings.session.threads,
        "affinity": list(settings.affinity) if settings.affinity else None,
        "cores": reports[0]["cores"] if reports else None,
        "environment": dict(reports[0]["environment"]) if reports else {},
        "precision_hint": settings.session.precision_hint,
        "includes": "the runtime call, copies included",
        "images": run.inputs.name,
        "reference": reference.name if reference else None,
        "other_cpu": other_cpu(run.bundle, reports[0]["device"]) if reports else None,
        "runtime": dict(reports[0]["facts"]) if reports else {},
        "warm_up": [r.get("warm_up") for r in reports],
        "cool_down": [r.get("cool_down") for r in reports],
        "battery": [r["device"].get("battery") for r in reports],
        "telemetry": [r.digest() for r in chosen.results],
        "process_p50_ms": _p50s(chosen),
        "tries": [_summary(one, settings, chosen) for one in run.tries] if len(run.tries) > 1 else [],
        "order_seed": settings.seed,
        "robx_version": __version__,
    }


def _summary(one: Try, settings: BenchSettings, chosen: Try) -> dict[str, Any]:
    """One of several tries, as the record lists them."""
    reasons = one.reasons(settings)
    return {
        "recorded": one is chosen,
        "verdict": validity.verdict(reasons),
        "reasons": reasons,
        "process_p50_ms": _p50s(one),
    }


def _p50s(one: Try) -> list[float]:
    return [float(np.median(r.samples)) / 1e6 for r in one.results if len(r.samples)]


def untimed_parts(bundle: Bundle) -> dict[str, str]:
    """What a model does and a benchmark leaves out, with the reason; empty for most bundles."""
    if bundle.in_model is None or not bundle.in_model.resize:
        return {}
    size = "x".join(map(str, bundle.preprocessing.shape[::-1]))
    return {"resize": f"the model resizes images itself, and those of the benchmark have its size already ({size} px)"}


def _preprocessing(run: Run, kind: str, values: dict[str, Value], missing: dict[str, str]) -> None:
    """Add preprocessing time (decode, resize, normalise), alone and summed with inference."""
    if kind != "local":
        why = "images are decoded on the host, so its times do not apply to the device"
        missing |= {"preprocess": why, "end_to_end": why}
        return
    times = run.inputs.preprocess_ns
    values["preprocess"] = Value(value=float(np.median(times)) / 1e6, n=len(times), unit="ms")
    if run.batch == 1:
        values["end_to_end"] = Value(value=values["preprocess"].value + values["p50"].value, n=len(times), unit="ms")


def _save_samples(folder: Path, results: Sequence[ProcessResult], started: str) -> tuple[str | None, str | None]:
    """Save raw samples (int64 ns per process) and telemetry, so that every figure can be recomputed."""
    timed = [r for r in results if len(r.samples)]
    if not timed:
        return None, None
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"process_{i}": r.samples for i, r in enumerate(timed)}
    np.savez_compressed(buffer, telemetry=json.dumps([r.snapshots for r in timed]), **arrays)
    data = buffer.getvalue()
    digest = sha256_bytes(data)
    name = f"samples-{started[:19].replace(':', '')}-{digest[:8]}.npz"
    write_bytes(folder / name, data)
    return name, digest
