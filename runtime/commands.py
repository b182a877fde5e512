"""`robx bench`, `robx run` and `robx doctor`."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from robx.console import print_line, print_table, progress_bar, say
from robx.errors import GateFailed, InputError
from robx.images.sources import open_source
from robx.records import Bundle, Latency, Value, to_json
from robx.runtime.bench.ab import Comparison, compare
from robx.runtime.bench.bench import bench as run_bench
from robx.runtime.bench.profiles import PROFILES, BenchOptions
from robx.runtime.doctor import examine
from robx.runtime.infer import find_images, infer, top_labels
from robx.runtime.session import SessionSettings, open_session
from robx.store.files import write_atomically

_BUNDLE = click.Path(path_type=Path)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=_BUNDLE)
@click.option("--device", default="local", show_default=True, help="local, ssh://[user@]host[:port] or adb://serial.")
@click.option(
    "--profile",
    type=click.Choice(list(PROFILES)),
    default="quick",
    show_default=True,
    help="How long; mlperf, ten minutes, also tells what heat does.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of one inference.")
@click.option("--affinity", help="Cores that the model may use, as 0,1 or 4-7.")
@click.option("--processes", type=click.IntRange(1), help="Fresh processes of each bundle; the profile's otherwise.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="More than 1: offline throughput.")
@click.option("--provider", help="The engine's device: cpu, cuda, gpu, npu, ...; never falls back.")
@click.option("--precision-hint", type=click.Choice(["f32", "f16", "bf16"]), default="f32", show_default=True)
@click.option("--data", type=_BUNDLE, help="Images to run; rendered scenes otherwise.")
@click.option("--python", "device_python", help="The device's Python command; python3 otherwise.")
@click.option("--emulated", is_flag=True, help="The processor is emulated: check the answers, refuse the times.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the processes.")
@click.option("--ab", is_flag=True, help="Ratio of each bundle to the first, in alternating blocks, on this machine.")
@click.option("--json", "as_json", is_flag=True, help="The records as JSON lines.")
def bench(
    bundles: tuple[Path, ...],
    device: str,
    profile: str,
    threads: int,
    affinity: str | None,
    processes: int | None,
    batch: int,
    provider: str | None,
    precision_hint: str,
    data: Path | None,
    device_python: str | None,
    emulated: bool,
    seed: int,
    ab: bool,
    as_json: bool,
) -> None:
    """Measure bundles on a device: latency, memory, and that their answers are right.

    \b
    robx bench runs/r18/openvino-int8 runs/r18/onnx-fp32 --profile rapid
    robx bench runs/r18/onnx-int8 --device ssh://pi@raspberrypi --profile standard
    robx bench runs/r18/onnx-fp32 runs/r18/onnx-int8 --ab

    Each record is appended to the bundle's measurements.jsonl, the raw samples beside it; of --ab the samples are kept
    alone. Figures of a run that is not VALID are marked; exit status 3 says that one was INVALID: the answers were
    wrong, or it was too short, or it fell back to the CPU.
    """
    settings = SessionSettings(threads=threads, provider=provider, precision_hint=precision_hint)  # type: ignore[arg-type]
    source = open_source(data) if data is not None else None
    if ab:
        _refuse_with_ab(
            device=device != "local",
            affinity=affinity,
            processes=processes,
            batch=batch > 1,
            python=device_python,
            emulated=emulated,
        )
        found = compare(bundles, settings, seconds=PROFILES[profile].seconds, source=source, seed=seed)
        _print_comparisons(found, as_json=as_json)
        _refuse_invalid(found)
        return
    options = BenchOptions(
        device=device,
        profile=profile,
        settings=settings,
        processes=processes,
        affinity=_cores(affinity),
        batch=batch,
        python=device_python,
        emulated=emulated,
        seed=seed,
    )
    with _ended_by_signals(), progress_bar(quiet=as_json) as progress:
        records = run_bench(bundles, options, source=source, progress=progress)
    if as_json:
        for record in records:
            click.echo(json.dumps(to_json(record)))
    else:
        _print_records(bundles, records)
    _refuse_invalid(records)


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.argument("images", nargs=-1, required=True, type=_BUNDLE)
@click.option("--out", type=_BUNDLE, help="Write the answers to this .npz instead of printing them.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--provider", help="The engine's device: cpu, cuda, gpu, npu, ...")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Labels of an image, with a head.")
def run(bundle: Path, images: tuple[Path, ...], out: Path | None, threads: int, provider: str | None, top: int) -> None:
    """Embed images with a bundle or a student, or label them when the bundle has a head.

    \b
    robx run runs/r18/onnx-int8 cat.jpg dog.png
    robx run runs/r18/onnx-int8 photos/ --out photos.npz

    One JSON line an image, or with --out an .npz of keys (N,) and embeddings (N, D). Images that cannot be decoded are
    named on standard error and skipped.
    """
    with open_session(bundle, SessionSettings(threads=threads, provider=provider), labels=out is None) as session:
        labels = session.bundle.labels if isinstance(session.bundle, Bundle) else None
        answers = infer(session, find_images(images), on_skip=lambda error: say(f"skipped {error}"))
        if out is not None:
            _write_npz(out, list(answers))
            return
        for name, answer in answers:
            if labels is None:
                click.echo(json.dumps({"image": name, "embedding": [round(float(x), 7) for x in answer]}))
            else:
                best = [{"label": label, "probability": p} for label, p in top_labels(answer, labels, count=top)]
                click.echo(json.dumps({"image": name, "labels": best}))


@click.command()
@click.option("--device", default="local", show_default=True, help="local, ssh://[user@]host[:port] or adb://serial.")
@click.option("--python", "device_python", help="The device's Python command; python3 otherwise.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(device: str, device_python: str | None, as_json: bool) -> None:
    """Say what this machine, or a device, can do, what it lacks, and the line that installs it.

    \b
    robx doctor
    robx doctor --device ssh://pi@raspberrypi
    """
    with _ended_by_signals():
        facts, findings = examine(device, python=device_python)
    if as_json:
        click.echo(json.dumps({"facts": facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return
    cpu = facts["cpu"]
    memory = f"{facts['memory_bytes'] / 1e9:.1f} GB" if facts["memory_bytes"] else "memory unknown"
    click.echo(f"{facts['board'] or facts['host']}: {facts['os']}, {facts['arch']}, Python {facts['python']}")
    click.echo(f"{cpu['model'] or 'processor unknown'}, {cpu['usable_cores']} cores, {memory}")
    lacking = facts["watched"]["energy"]
    energy = facts["energy_counter"] or (f"not measured, {lacking}" if lacking else "power rails")
    click.echo(f"accelerator: {facts['accelerator'] or 'none seen'}; energy: {energy}")
    click.echo(_watched(facts["watched"]))
    if facts["emulated"]:
        click.echo(f"emulated ({facts['emulated']}): answers count here, times do not")
    rows = [(f.purpose, f.name, f.version or f"missing: {f.remedy}") for f in findings]
    print_table(("for", "what", "state"), rows)


def _watched(told: Mapping[str, bool]) -> str:
    """What of a machine's moods a bench will see, and what it will not."""
    names = ("clocks", "temperatures", "throttling", "load")
    unseen = [name for name in names if not told[name]]
    seen = f"watched during a bench: {', '.join(name for name in names if told[name]) or 'nothing'}"
    return seen + (f"; not told here: {', '.join(unseen)}" if unseen else "")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: by way of its clean-up, so that nothing stays on the device."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)  # a second one must not end the clean-up
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _refuse_invalid(found: Sequence[Latency | Comparison]) -> None:
    """Exit status 3 where one is INVALID; but that a processor is emulated is what was expected of it."""
    codes = [reason.split(":")[0] for one in found if one.verdict == "INVALID" for reason in one.reasons]
    if set(codes) - {"emulated"}:
        raise GateFailed(f"not every measurement is valid ({', '.join(dict.fromkeys(codes))}): they are written")


def _refuse_with_ab(**given: object) -> None:
    if names := [f"--{name}" for name, value in given.items() if value]:
        raise InputError(f"--ab alternates within one process of this machine: leave out {', '.join(names)}")


def _print_comparisons(found: Sequence[Comparison], *, as_json: bool) -> None:
    for one in found:
        if as_json:
            click.echo(json.dumps({**to_json(one), "claim": one.claim}))
            continue
        low, high = one.ratio.low or 0.0, one.ratio.high or 0.0
        ratio = f"{one.ratio.value:.3f} x the latency of {one.against} [{low:.3f}, {high:.3f}]"
        print_line(f"{one.bundle}: {ratio}, {one.claim}")
        for reason in one.reasons:
            print_line(reason)


def _print_records(folders: Sequence[Path], records: Sequence[Latency]) -> None:
    figures = ("p50 ms", "95 %", "p90 ms", "p90 bound", "drift %", "first ms", "peak MB", "cosine")
    rows = [(folder.name, *_record_row(record)) for folder, record in zip(folders, records, strict=True)]
    invalid = [number for number, record in enumerate(records) if record.verdict != "VALID"]
    print_table(("bundle", "verdict", *figures), rows, right=range(2, 10), dim=invalid)
    for folder, record in zip(folders, records, strict=True):
        for reason in record.reasons:
            print_line(f"{folder.name}: {record.verdict}, {reason}")
        if record.settings["batch"] != 1 and "throughput" in record.values:
            throughput = record.values["throughput"].value
            print_line(f"{folder.name}: {throughput:.0f} images/s in batches of {record.settings['batch']}")
        if "sustained" in record.values:
            print_line(f"{folder.name}: {_heat(record.values)}")
    if not PROFILES[records[0].settings["profile"]["name"]].publishable:
        click.echo("A rapid or quick profile is not for publication: use --profile standard.")


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


def _cores(text: str | None) -> tuple[int, ...] | None:
    """Core numbers from "0,2" or "4-7"."""
    if text is None:
        return None
    cores: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        raise InputError(f"affinity {text!r} is no list of cores: write 0,1 or 4-7") from None
    if not cores or min(cores) < 0 or max(cores) > 4095:
        raise InputError(f"affinity {text!r} is no list of cores: write 0,1 or 4-7")
    return tuple(sorted(cores))


def _write_npz(path: Path, answers: list[tuple[str, np.ndarray]]) -> None:
    if path.suffix != ".npz":
        raise InputError(f"--out {path} is to end in .npz")
    keys, embeddings = np.array([name for name, _ in answers]), np.stack([answer for _, answer in answers])

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, keys=keys, embeddings=embeddings)

    write_atomically(path, write)
    print_line(f"{path}: {len(keys)} images, {embeddings.shape[1]} values each")
