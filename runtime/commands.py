"""`robx bench`, `robx run`, `robx check`, `robx device` and `robx doctor`."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from robx.console import print_line, print_table, progress_bar, quiet_option, say
from robx.errors import GateFailed, InputError
from robx.golden.compare import Comparison as PortComparison
from robx.golden.mistakes import Mistake
from robx.options import Command, PathType, WholeNumber
from robx.records import Bundle, Latency, Value, load_bundle, to_json, warn_outdated
from robx.runtime.bench.ab import Comparison, compare
from robx.runtime.bench.bench import bench as run_bench
from robx.runtime.bench.native_runner import ABIS, native_folder
from robx.runtime.bench.profiles import PROFILES, BenchSettings, parse_cores
from robx.runtime.bench.runners import RUNNERS
from robx.runtime.bench.validity import codes_of, is_refused
from robx.runtime.check import check as check_port
from robx.runtime.device_build import build as build_runner
from robx.runtime.doctor import examine
from robx.runtime.infer import find_images, infer, top_labels
from robx.runtime.session import SessionSettings, open_session
from robx.store.files import write_atomically
from robx.store.folders import require_writable

_PATH = PathType()
_NEARLY = 0.05  # a port this close to the golden output computes the right thing
_DEVICE_HELP = "Device: local, ssh://[user@]host[:port], adb://serial or adb://host:port."
_RUNNER_HELP = "Program that measures.  [default: python if the device has one, else native]"
_PYTHON_HELP = "Python command on the device.  [default: python3]"
_TOP = 5  # labels per image
_CLASSIFIER = "export it with --head (robx eval --save-head trains one)"
_PROVIDER_HELP = "Hardware backend of the engine: cpu, cuda, gpu, npu, ...; never falls back to another."


@click.command(cls=Command)
@click.argument("bundles", nargs=-1, required=True, type=_PATH)
@click.option("--device", default="local", show_default=True, help=_DEVICE_HELP)
@click.option(
    "--profile",
    type=click.Choice(list(PROFILES)),
    default="quick",
    show_default=True,
    help="Length of the run; mlperf (10 minutes) also shows thermal throttling.",
)
@click.option("--threads", type=WholeNumber(1), default=1, show_default=True, help="Threads per inference.")
@click.option("--affinity", help="CPU cores that the model may use, e.g. 0,1 or 4-7.")
@click.option("--processes", type=WholeNumber(1), help="Fresh processes per bundle.  [default: the profile's]")
@click.option(
    "--batch", type=WholeNumber(1), default=1, show_default=True, help="Batch size; above 1, offline throughput."
)
@click.option("--provider", help=_PROVIDER_HELP)
@click.option(
    "--precision-hint",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f32",
    show_default=True,
    help="Floating-point type to compute in, where the engine has a choice.",
)
@click.option("--data", type=_PATH, help="Images to run.  [default: rendered scenes]")
@click.option("--image-member", metavar="NAME", help="Image of a tar sample that has several, such as rgb.jpg.")
@click.option("--runner", type=click.Choice(list(RUNNERS)), help=_RUNNER_HELP)
@click.option("--python", help=_PYTHON_HELP)
@click.option("--emulated", is_flag=True, help="The processor is emulated: check the outputs, do not time them.")
@click.option(
    "--seed", type=WholeNumber(0), default=0, show_default=True, help="Random seed for the order of the processes."
)
@click.option(
    "--retries",
    type=WholeNumber(0),
    default=2,
    show_default=True,
    help="Measure an UNSTABLE bundle again up to N times, if the reason may pass.",
)
@click.option("--ab", is_flag=True, help="Compare each bundle with the first in alternating blocks on this machine.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON lines.")
def bench(
    *,
    threads: int,
    provider: str | None,
    precision_hint: Any,
    affinity: str | None,
    ab: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency and memory of bundles on a device, and verify their outputs.

    \b
    robx bench runs/r18/openvino-int8 runs/r18/onnx-fp32 --profile rapid
    robx bench runs/r18/onnx-int8 --device ssh://pi@raspberrypi --profile standard
    robx bench runs/r18/onnx-fp32 runs/r18/onnx-int8 --ab

    Each record is appended to the bundle's measurements.jsonl, with the raw samples in a file beside it; --ab saves the
    samples only. Results that are not VALID are marked. Exit status 3 means that one is INVALID: wrong outputs, a run
    that was too short, or a fallback to the CPU.
    """
    session = SessionSettings(threads=threads, provider=provider, precision_hint=precision_hint)
    settings = BenchSettings(session=session, affinity=None if affinity is None else parse_cores(affinity), **options)
    if ab:
        found = compare(settings, say=say)
        _print_comparisons(found, as_json=as_json)
        _refuse_invalid(found)
        return
    with progress_bar(quiet=as_json) as progress:
        records = run_bench(settings, progress=progress, say=say)
    if as_json:
        for record in records:
            click.echo(json.dumps(to_json(record)))
    else:
        _print_records(settings.labels, records)
    _refuse_invalid(records)


@click.command(cls=Command)
@click.argument("bundle", type=_PATH)
@click.argument("images", nargs=-1, required=True, type=_PATH)
@click.option("--image-member", metavar="NAME", help="Image of a tar sample that has several, such as rgb.jpg.")
@click.option("--out", type=_PATH, help="Write the embeddings to this .npz file instead of printing them.")
@click.option("--threads", type=WholeNumber(1), default=1, show_default=True, help="Threads per inference.")
@click.option("--provider", help=_PROVIDER_HELP)
@click.option("--top", type=WholeNumber(1), help="Labels per image, if the bundle has a head.  [default: 5]")
def run(
    bundle: Path, images: tuple[Path, ...], image_member: str | None, out: Path | None, threads: int,
    provider: str | None, top: int | None,
) -> None:  # fmt: skip
    """Embed images with a bundle or a student, or label them if the bundle has a classification head.

    \b
    robx run runs/r18/onnx-int8 cat.jpg dog.png
    robx run runs/r18/onnx-int8 photos/ --out photos.npz

    Prints one JSON line per image; --out writes an .npz with keys (N,) and embeddings (N, D) instead. Images that
    cannot be decoded are skipped and listed on standard error.
    """
    if out is not None and top is not None:
        raise InputError("--out writes the embeddings, and --top is about labels: give one of them")
    if out is not None and out.suffix != ".npz":
        raise InputError(f"--out {out} must end in .npz")
    if out is not None:
        _refuse_foreign(out)
        require_writable(out.parent, remedy="give --out in another folder")
    with open_session(bundle, SessionSettings(threads=threads, provider=provider), labels=out is None) as session:
        warn_outdated(bundle, session.bundle, say)
        labels = session.bundle.labels if isinstance(session.bundle, Bundle) else None
        if labels is None and top is not None:
            raise InputError(f"{bundle} has no classifier, and --top is about its labels: {_CLASSIFIER}, or drop --top")
        found = find_images(images, image_member=image_member, say=say)
        outputs = infer(session, found, on_skip=lambda error: say(f"skipped {error}"))
        if out is not None:
            _write_npz(out, list(outputs))
            return
        for name, output in outputs:
            line: dict[str, Any]
            if labels is None:
                line = {"image": name, "embedding": [round(float(x), 7) for x in output]}
            else:
                best = [
                    {"label": label, "probability": p} for label, p in top_labels(output, labels, count=top or _TOP)
                ]
                line = {"image": name, "labels": best}
            click.echo(json.dumps(line, allow_nan=False))


@click.command(cls=Command)
@click.argument("bundle", type=_PATH)
@click.argument("array", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(bundle: Path, array: Path, as_json: bool) -> None:
    """Check your own program's output for a bundle's golden image, and name the mistake that explains a difference.

    ARRAY is what your program computed for BUNDLE/golden/image.png: the model's output (embedding or logits), or the
    tensor that it gives to the model. It may be .npy, raw float32 (.bin) or text (.txt). No runtime is needed.

    \b
    robx check runs/r18/onnx-int8 my_output.npy
    robx check runs/r18/onnx-int8 my_input.bin

    Exit status 3 means that the array differs from the golden sample.
    """
    found = check_port(bundle, array, say=say)
    said, remedy = _words(found.explanations)
    if as_json:
        fits = [{"mistake": f.mistake.name if f.mistake else None, "distance": _finite(f.distance)} for f in found.fits]
        told = {"what": found.what, "passes": found.passes, "difference": _finite(found.difference)}
        named = {"said": said or None, "remedy": remedy or None, "fits": fits}
        click.echo(json.dumps({**told, **named, "tolerance": found.tolerance, "note": found.note}))
    else:
        if not found.not_finite:
            rows = [(f.mistake.said if f.mistake else "correct", f"{f.distance:.1e}") for f in found.fits[:4]]
            print_table((f"{found.what}, closest answers", "distance"), rows, right=(1,))
        if found.note:
            print_line(found.note)
    if not found.passes:
        raise GateFailed(_difference(array, found))
    if as_json:
        return
    if said:
        print_line(f"{array}: the {found.what} matches the golden sample: {said}, which is harmless")
    elif found.is_exact or found.what == "input":
        print_line(f"{array}: the {found.what} matches the golden sample")
    else:
        print_line(
            f"{array}: the {found.what} matches within the tolerance of {load_bundle(bundle).precision} "
            f"({found.tolerance:g}), but not exactly: {found.difference:.1e} off, as on another processor, after a "
            "slightly different resize, or from a model of another precision"
        )


def _words(mistakes: Sequence[Mistake]) -> tuple[str, str]:
    """(what is wrong, what to do) of mistakes of which one was made; empty where there are none."""
    said = ", or ".join(mistake.said for mistake in mistakes)
    return said, "; or ".join(dict.fromkeys(mistake.remedy for mistake in mistakes))


def _difference(array: Path, found: PortComparison) -> str:
    """A line that names the mistake, or says that none is known."""
    if found.not_finite:
        advice = "try an fp32 bundle, and compare the input tensor with golden/input.npy"
        return (
            f"{array} differs from the golden {found.what}: it is not finite ({found.not_finite} values are NaN or "
            f"infinity): {advice if found.what != 'input' else 'check how the pixels are computed'}"
        )
    share = f" by {found.difference:.1e} of its length" if _finite(found.difference) else ""
    differs = f"{array} differs from the golden {found.what}{share} (tolerance {found.tolerance:.0e})"
    said, remedy = _words(found.explanations)
    if said:
        return f"{differs}: {said}: {remedy}"
    advice = (
        "compare the input tensor with golden/input.npy next" if found.what != "input" else "see the README's steps"
    )
    if found.fits[0].mistake is None and found.difference <= _NEARLY:
        return f"{differs}, though no mistake is closer: write all digits, or look for another precision or decoder"
    nearest, _ = _words(found.closest)
    hint = f" (the closest known one leaves {found.unexplained:.0%} of it: {nearest})" if nearest else ""
    return f"{differs}, and no common mistake of preprocessing explains it{hint}: {advice}"


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


@click.group()
def device() -> None:
    """Prepare devices that have no Python, such as phones.

    \b
    robx device build --abi arm64-v8a --ndk android-ndk-r27c --runtime onnxruntime-android-1.23.0.aar
    """


@device.command(cls=Command)
@click.option("--abi", type=click.Choice(ABIS), required=True, help="Kind of device; arm64-v8a is Android.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=_PATH,
    help="File with the runtime's library for that ABI: .so, .whl or .aar; may be given once per runtime.  "
    "[default: those installed here, if the ABI is this machine's]",
)
@click.option("--ndk", type=_PATH, help="Folder of the Android NDK, for arm64-v8a.  [default: $ANDROID_NDK_HOME]")
def build(*, abi: str, runtimes: tuple[Path, ...], ndk: Path | None) -> None:
    """Build the native runner, which `robx bench` uses on devices without Python.

    \b
    robx device build --abi linux-x86_64
    robx device build --abi linux-arm64 --runtime onnxruntime-1.23.0-cp311-cp311-manylinux_2_28_aarch64.whl
    robx device build --abi arm64-v8a --ndk android-ndk-r27c --runtime onnxruntime-android-1.23.0.aar

    Needs CMake and a C++17 compiler for the ABI. It replaces the runner and libraries built for that ABI before. robx
    downloads no library and contains none; docs/native-runner.md names the downloads.
    """
    built = build_runner(abi, runtimes=runtimes, ndk=ndk, say=say)
    print_line(f"{native_folder(abi)}: the native runner for {abi}")
    for library in built["libraries"]:
        version, size = library["version"] or "version unknown", library["bytes"] / 1e6
        print_line(f"{library['file']}: {library['runtime']} {version}, {library['licence']}, {size:.1f} MB")


@click.command(cls=Command)
@click.option("--device", default="local", show_default=True, help=_DEVICE_HELP)
@click.option("--runner", type=click.Choice(list(RUNNERS)), help=_RUNNER_HELP)
@click.option("--python", help=_PYTHON_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(device: str, runner: str | None, python: str | None, as_json: bool) -> None:
    """Show what this machine or a device can run, what is missing, and how to install it.

    \b
    robx doctor
    robx doctor --device ssh://pi@raspberrypi
    """
    facts, findings = examine(device, runner=runner, python=python)
    if as_json:
        click.echo(json.dumps({"facts": facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return
    cpu = facts["cpu"]
    memory = f"{facts['memory_bytes'] / 1e9:.1f} GB" if facts["memory_bytes"] else "memory unknown"
    click.echo(f"{facts['board'] or facts['host']}: {facts['os']}, {facts['arch']}, {_program(facts)}")
    click.echo(f"{cpu['model'] or 'unknown processor'}, {cpu['usable_cores']} cores, {memory}")
    missing = facts["watched"]["energy"]
    energy = facts["energy_counter"] or (f"not measured, {missing}" if missing else "power rails")
    click.echo(f"accelerator: {facts['accelerator'] or 'none found'}; energy: {energy}")
    click.echo(_watched(facts["watched"]))
    if facts["emulated"]:
        click.echo(f"emulated ({facts['emulated']}): outputs can be verified, latency cannot be measured")
    print_table(
        ("purpose", "package or tool", "state"), [(f.purpose, f.name, f.version or "missing") for f in findings]
    )
    missing = [finding for finding in findings if finding.version is None]
    if missing:
        click.echo("What is missing, and how to get it, if you need it:")
    for finding in missing:
        click.echo(f"  {finding.name}: {finding.remedy}")


def _program(facts: Mapping[str, Any]) -> str:
    """What runs a benchmark on the device."""
    return f"Python {facts['python']}" if facts["python"] else "native runner"


def _watched(watched: Mapping[str, bool]) -> str:
    """Which background conditions that affect the measurement are monitored on the device, and which are not."""
    names = ("clocks", "temperatures", "throttling", "load")
    unseen = [name for name in names if not watched[name]]
    seen = f"monitored during a bench: {', '.join(name for name in names if watched[name]) or 'nothing'}"
    return seen + (f"; not readable on this machine: {', '.join(unseen)}" if unseen else "")


def _refuse_invalid(found: Sequence[Latency | Comparison]) -> None:
    """Exit with status 3 if one is INVALID for a reason other than an emulated processor."""
    if wrong := [one for one in found if is_refused(one.verdict, one.reasons)]:
        codes = {code: None for one in wrong for code in sorted(codes_of(one.reasons))}
        raise GateFailed(f"some measurements are INVALID ({', '.join(codes)}): measure again")


def _print_comparisons(found: Sequence[Comparison], *, as_json: bool) -> None:
    for one in found:
        if as_json:
            click.echo(json.dumps({**to_json(one), "claim": one.claim}))
            continue
        low, high = one.ratio.low or 0.0, one.ratio.high or 0.0
        ratio = f"{one.ratio.value:.3f} x the latency of {one.against} [{low:.3f}, {high:.3f}]"
        if one.verdict != "VALID":  # the figure may be far from the truth
            ratio = f"its latency compared with {one.against} is not reliable"
        print_line(f"{one.bundle}: {ratio}, {one.claim}")
        for reason in one.reasons:
            print_line(reason)


def _print_records(labels: Sequence[str], records: Sequence[Latency]) -> None:
    figures = ("p50 ms", "95 %", "p90 ms", "p90 bound", "drift %", "first ms", "peak MB", "cosine")
    rows = [(label, *_record_row(record)) for label, record in zip(labels, records, strict=True)]
    invalid = [number for number, record in enumerate(records) if record.verdict != "VALID"]
    print_table(("bundle", "verdict", *figures), rows, right=range(2, 10), dim=invalid)
    for label, record in zip(labels, records, strict=True):
        for reason in record.reasons:
            print_line(f"{label}: {record.verdict}, {reason}")
        if record.settings.get("other_cpu"):
            print_line(f"{label}: {record.settings['other_cpu']}")
        if record.settings["batch"] != 1 and "throughput" in record.values:
            throughput = record.values["throughput"].value
            print_line(f"{label}: {throughput:.0f} images/s in batches of {record.settings['batch']}")
        if "sustained" in record.values:
            print_line(f"{label}: {_heat(record.values)}")
        if tries := record.settings["tries"]:
            print_line(f"{label}: measured {len(tries)} times ({', '.join(one['verdict'] for one in tries)})")
    if not PROFILES[records[0].settings["profile"]["name"]].publishable:
        click.echo("Results of the rapid and quick profiles are not for publication: use --profile standard.")


def _record_row(record: Latency) -> tuple[str, ...]:
    v = record.values
    return (
        record.verdict,
        _cell(v.get("p50")),
        f"{_number(v['p50'].low)}-{_number(v['p50'].high)}" if "p50" in v else "",
        _cell(v.get("p90")),
        _number(v["p90"].high) if "p90" in v else "",
        f"{v['drift'].value:+.1f}" if "drift" in v else "",
        _cell(v.get("first")),
        _cell(v.get("peak_memory")),
        f"{v['output_cosine'].value:.4f}" if "output_cosine" in v else "",
    )


def _heat(values: Mapping[str, Value]) -> str:
    burst, late, slower = (values[name].value for name in ("burst", "sustained", "slowdown"))
    return f"p50 {burst:.3g} ms in the first 10 s, {late:.3g} ms in the last 60 s ({slower:+.1f} %)"


def _cell(value: Value | None) -> str:
    return _number(value.value) if value is not None else ""


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _refuse_foreign(path: Path) -> None:
    """Raise InputError if `path` exists and holds other arrays than those of an earlier ``robx run --out``."""
    if not path.exists():
        return
    names: set[str] = set()
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    if names != {"keys.npy", "embeddings.npy"}:
        raise InputError(
            f"{path} exists and was not written by robx run: move it away, or give another name with --out"
        )


def _write_npz(path: Path, outputs: list[tuple[str, np.ndarray]]) -> None:
    keys, embeddings = np.array([name for name, _ in outputs]), np.stack([output for _, output in outputs])

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, keys=keys, embeddings=embeddings)

    write_atomically(path, write)
    print_line(f"{path}: {len(keys)} images, {embeddings.shape[1]} values each")
