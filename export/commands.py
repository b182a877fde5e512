"""`robx export` and `robx inspect`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robx.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from robx.records import Bundle, Value

_FORMATS = ("onnx", "openvino", "trt", "ort", "executorch", "litert", "coreml", "ncnn")
_COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "FORCED": "magenta", "NOT_JUDGED": "yellow"}


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "fmt", type=click.Choice(_FORMATS), required=True, help="What to turn the student into.")
@click.option("--fp16", is_flag=True, help="Half-precision weights; float32 in and out.")
@click.option("--int8", is_flag=True, help="Search for an int8 model that is accurate and not slower.")
@click.option("--data", type=click.Path(path_type=Path), help="Images: calibration from train/, judging from test/.")
@click.option(
    "--test", type=click.Path(path_type=Path), help="The judging images, when --data holds training images only."
)
@click.option("--out", type=click.Path(path_type=Path), help="The bundle's folder. [default: RUN/<format>-<precision>]")
@click.option("--head", type=click.Path(path_type=Path), help="A linear head to append: the output logits is added.")
@click.option("--max-drop", default=1.0, show_default=True, help="Accuracy that int8 may lose, in points.")
@click.option("--min-speedup", default=1.0, show_default=True, help="Against fp32 and fp16 in the same runtime.")
@click.option("--opset", default=20, show_default=True, help="Of ONNX.")
@click.option("--batch", default="dynamic", show_default=True, help="A number, or dynamic.")
@click.option("--target", default="local", show_default=True, help="local, arm64, rtx:sm89, jetson-orin, ...")
@click.option("--uint8-input", is_flag=True, help="Take uint8 pixels; the normalisation becomes a part of the model.")
@click.option("--rungs", type=click.IntRange(1), help="Int8 candidates to try at most.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds after which no further candidate is begun.")
@click.option("--calibration-images", default=300, show_default=True, help="Fewer than 300 only for a demonstration.")
@click.option("--judging-images", default=1000, show_default=True, help="More of them decide smaller drops.")
@click.option("--force", is_flag=True, help="Ship the best int8 even if it failed, marked FORCED.")
def export(
    run: Path,
    fmt: str,
    fp16: bool,
    int8: bool,
    data: Path | None,
    test: Path | None,
    out: Path | None,
    head: Path | None,
    max_drop: float,
    min_speedup: float,
    opset: int,
    batch: str,
    target: str,
    uint8_input: bool,
    rungs: int | None,
    budget: float | None,
    calibration_images: int,
    judging_images: int,
    force: bool,
) -> None:
    """Turn a student into ONNX, OpenVINO, TensorRT or a mobile format.

    RUN is a folder that robx distill wrote. An int8 (or fp16) model ships only if it is accurate and not slower, judged
    on held-out images by the runtime that will run it; otherwise the float model ships, and the exit status is 3.

    \b
    robx export runs/r18 --format openvino --int8 --data images/
    robx export runs/r18 --format trt --int8 --target rtx:sm89 --data images/
    """
    if fp16 and int8:
        raise InputError("--fp16 and --int8 are two exports: give one of them")
    from robx.export.build import Options, build, gate_error
    from robx.export.calibration import open_data
    from robx.export.gate import Limits
    from robx.export.request import ExportTarget

    wanted = ExportTarget(
        format=fmt,  # type: ignore[arg-type]
        precision="int8" if int8 else "fp16" if fp16 else "fp32",
        device=target,
        batch=_batch(batch),
        opset=opset,
        uint8_input=uint8_input,
    )
    options = Options(
        limits=Limits(max_drop=max_drop, min_speedup=min_speedup),
        rungs=rungs,
        budget=budget,
        force=force,
        calibration_images=calibration_images,
        judging_images=judging_images,
    )
    source, judge = open_data(data, test) if data else (None, None)
    with _progress() as (progress, say):
        bundle = build(
            run,
            wanted,
            source=source,
            judge=judge,
            out=out,
            head=head,
            options=options,
            progress=progress,
            on_rung=lambda rung: say(f"{rung.name}: accuracy {rung.accuracy}, speed {rung.speed}"),
        )
    folder = out or run / f"{fmt}-{bundle.precision}"
    _show_rungs(bundle)
    _show_result(bundle, folder)
    if (error := gate_error(bundle, folder)) is not None:
        raise error


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Every layer, not the counts alone.")
def inspect(bundle: Path, layers: bool) -> None:
    """Show what is in a bundle: layers, precisions, sizes, verdict, and which layers are sensitive.

    BUNDLE is a folder that robx export wrote. Nothing is run.
    """
    from rich.table import Table

    from robx.export.inspection import inspect_bundle
    from robx.records import load_bundle

    record = load_bundle(bundle)
    _show_result(record, bundle)
    _show_rungs(record)
    found = inspect_bundle(bundle, record)
    console = _console()
    table = Table(title="Files", title_justify="left")
    for column in ("file", "role", "size", "SHA-256"):
        table.add_column(column)
    for file in record.files:
        table.add_row(file.path, file.role, _size(file.bytes), file.sha256[:16])
    console.print(table)
    if found.operators:
        table = Table(title="Operators", title_justify="left")
        for column in ("operator", "count", "in int8", "weights"):
            table.add_column(column, justify="left" if column == "operator" else "right")
        for row in found.operators:
            table.add_row(row.name, str(row.count), str(row.int8 or ""), _size(row.bytes) if row.bytes else "")
        console.print(table)
    for line in found.foreign:
        console.print(f"[yellow]outside of the target's set:[/] {line}")
    if layers and found.layers:
        table = Table(title="Layers", title_justify="left")
        for column in ("layer", "operator", "precision", "weights", "cost in int8"):
            table.add_column(column)
        for layer in found.layers:
            cost = "" if layer.cost is None else f"{layer.cost:.5f}"
            table.add_row(layer.name, layer.operator, layer.precision, _size(layer.bytes), cost)
        console.print(table)
    if found.sensitivity:
        _show_sensitivity(found.sensitivity)
    for note in found.notes:
        console.print(note)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--batch {text!r} is neither a positive number nor dynamic")
    return int(text)


def _show_rungs(bundle: Bundle) -> None:
    from rich.table import Table

    if not bundle.rungs:
        return
    table = Table(title="Rungs tried", title_justify="left")
    for column in ("", "candidate", "accuracy", "drop", "centred cosine", "vs fp32", "vs fp16", "speed", "size"):
        table.add_column(column, justify="left" if column in ("", "candidate") else "right")
    for rung in bundle.rungs:
        values = rung.values
        drop = values.get("probe_drop")
        cosine = values.get("cosine_mean")
        table.add_row(
            "*" if rung.kept else "",
            rung.name,
            _coloured(rung.accuracy),
            _interval(drop) if drop else "",
            f"{cosine.value:.4f}" if cosine else "",
            _speedup(values.get("speedup_fp32")),
            _speedup(values.get("speedup_fp16")),
            _coloured(rung.speed) if "speedup_fp32" in values else "on device",
            _size(int(values["bytes"].value)) if "bytes" in values else "",
        )
    console = _console()
    console.print(table)
    for rung in bundle.rungs:
        if not rung.kept:
            console.print(f"[dim]{_escape(rung.name)}: {_escape(rung.reason)}[/]", highlight=False)


def _show_result(bundle: Bundle, folder: Path) -> None:
    console = _console()
    size = _size(bundle.bytes)
    colour = _COLOURS[bundle.verdict]
    console.print(
        f"[bold]{_escape(str(folder))}[/]: {bundle.format} {bundle.precision}, {size}, for {bundle.runtime} on "
        f"{bundle.target}: [{colour}]{bundle.verdict}[/]",
        highlight=False,
        soft_wrap=True,
    )
    if bundle.reason:
        console.print(f"  {_escape(bundle.reason)}", highlight=False, soft_wrap=True)


def _show_sensitivity(costs: dict[str, float]) -> None:
    """A bar for each layer, the worst first: 1 - centred cosine of the embedding with that layer alone in int8."""
    console = _console()
    console.print("Sensitivity: 1 - centred cosine with that layer alone in int8")
    top = max(max(costs.values()), 1e-12)
    for name, cost in sorted(costs.items(), key=lambda item: -item[1])[:20]:
        console.print(f"  {_escape(name):<32} {cost:.5f} {'█' * round(32 * cost / top)}", highlight=False)
    if len(costs) > 20:
        console.print(f"  ... and {len(costs) - 20} less sensitive layers")


def _coloured(verdict: str) -> str:
    return f"[{_COLOURS[verdict]}]{verdict}[/]"


def _interval(value: Value) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _speedup(value: Value | None) -> str:
    return "" if value is None else f"{value.value:.2f}x"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


class _progress:
    """Rich progress on a terminal; elsewhere one plain line now and then, on standard error."""

    def __enter__(self) -> tuple[Callable[[int, int, str], None], Callable[[str], None]]:
        self._last, self._note, self._bar = 0.0, "", None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True),
                transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self._update, self._say

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _update(self, done: int, total: int, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=note, completed=done, total=total if total > 1 else None)
        elif note != self._note or time.monotonic() - self._last > 10:
            click.echo(f"{note} {f'{done}/{total}' if done and total > 1 else ''}".rstrip(), err=True)
            self._last = time.monotonic()
        self._note = note

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            click.echo(text, err=True)
