"""`robx export` and `robx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robx.console import announce, print_line, print_table, progress_bar, quiet_option, say
from robx.errors import InputError
from robx.formats import FORMATS
from robx.options import Command, Number, PathType, WholeNumber

if TYPE_CHECKING:
    from robx.records import Bundle, Rung, Value


@click.command(cls=Command)
@click.argument("run", type=PathType())
@click.option("--format", "fmt", type=click.Choice(list(FORMATS)), required=True, help="Format to export to.")
@click.option("--fp16", is_flag=True, help="Half-precision weights; inputs and outputs stay float32.")
@click.option("--int8", is_flag=True, help="Search for an int8 model that is accurate and not slower.")
@click.option("--data", type=PathType(), help="Images: calibration from train/, judging from test/.")
@click.option("--test", type=PathType(), help="Judging images, where --data has training images only.")
@click.option("--labels", type=PathType(), help="CSV file of path,label, for images without class folders.")
@click.option("--image-member", metavar="NAME", help="Image of a tar sample that has several, such as rgb.jpg.")
@click.option("--out", type=PathType(), help="Bundle folder. [default: RUN/<format>-<precision>]")
@click.option("--head", type=PathType(), help="Linear head to append; adds the output logits.")
@click.option(
    "--max-drop",
    type=Number(0, 100, min_open=True, max_open=True),
    default=1.0,
    show_default=True,
    help="Largest accuracy drop allowed, in points.",
)
@click.option(
    "--min-speedup",
    type=Number(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Smallest speed-up over fp32 and fp16 in the same runtime.",
)
@click.option("--opset", type=WholeNumber(1), default=20, show_default=True, help="ONNX opset.")
@click.option("--batch", default="dynamic", show_default=True, help="Batch size: a number, or dynamic.")
@click.option(
    "--target",
    default="local",
    show_default=True,
    help="Device: local or arm64; for trt also rtx:sm86+sm89 or jetson-orin.",
)
@click.option("--size", help="Input size in pixels: 224, or HEIGHTxWIDTH. [default: as trained]")
@click.option("--uint8-input", is_flag=True, help="Take uint8 pixels; the normalisation becomes part of the model.")
@click.option(
    "--resize-in-graph", is_flag=True, help="With --uint8-input: take images of any size; the model resizes and crops."
)
@click.option(
    "--input-layout",
    type=click.Choice(["nchw", "nhwc"], case_sensitive=False),
    default="nchw",
    show_default=True,
    help="Axes of uint8 pixels: nhwc as cameras give them.",
)
@click.option(
    "--input-channels",
    type=click.Choice(["rgb", "bgr"], case_sensitive=False),
    default="rgb",
    show_default=True,
    help="Order of uint8 channels: bgr as OpenCV gives them.",
)
@click.option("--rungs", type=WholeNumber(1), help="Maximum number of int8 candidates to try.")
@click.option("--budget", type=Number(0, unit="seconds"), help="Seconds after which no further candidate is started.")
@click.option(
    "--calibration-images",
    type=WholeNumber(1),
    default=300,
    show_default=True,
    help="Number of calibration images; below 300 for demonstrations only.",
)
@click.option(
    "--judging-images",
    type=WholeNumber(16),
    default=3000,
    show_default=True,
    help="Maximum number of judging images; more of them can prove a smaller drop.",
)
@click.option(
    "--heal",
    type=Number(0, min_open=True, unit="minutes", hint="put RUN before --heal, or give the minutes"),
    is_flag=False,
    flag_value=10.0,
    metavar="[MINUTES]",
    help="Train weights that tolerate int8, and try them too. [default: 10 minutes]",
)
@click.option("--sensitivity", is_flag=True, help="With --int8: measure the cost of each layer, for robx inspect.")
@click.option("--force", is_flag=True, help="Ship the best int8 or fp16 model even if it failed, marked FORCED.")
@quiet_option
def export(
    run: Path,
    fmt: str,
    fp16: bool,
    int8: bool,
    target: str,
    batch: str,
    opset: int,
    size: str | None,
    uint8_input: bool,
    resize_in_graph: bool,
    input_layout: str,
    input_channels: str,
    max_drop: float,
    min_speedup: float,
    rungs: int | None,
    heal: float | None,
    **settings: Any,
) -> None:
    """Export a student to ONNX, OpenVINO, TensorRT or a mobile format.

    RUN is a folder written by robx distill. An int8 model ships only if it is accurate and not slower, judged on
    held-out images in the runtime that will execute it; otherwise the float model ships and the exit status is 3. An
    fp16 model, which is chosen for its size, has to be accurate, and faster only if --min-speedup is above 1.

    --heal fine-tunes the weights, without labels, until int8 gives the embeddings that fp32 gives. Only int8 is made
    from healed weights, and it is judged against the student as it was. What is trained is kept in RUN: an interrupted
    healing continues, and another format reuses it.

    \b
    robx export runs/r18 --format openvino --int8 --data images/
    robx export runs/r18 --format executorch --int8 --heal 5 --data images/
    robx export runs/r18 --format trt --int8 --target rtx:sm89 --data images/
    """
    if fp16 and int8:
        raise InputError("--fp16 and --int8 are two different exports: give one of them")
    from robx.export import build
    from robx.export.gate.gate import Limits, gate_error
    from robx.export.heal.heal import HealSettings
    from robx.export.request import ExportTarget
    from robx.image_size import parse_size

    wanted = ExportTarget(
        format=fmt,  # type: ignore[arg-type]
        precision="int8" if int8 else "fp16" if fp16 else "fp32",
        device=target,
        batch=_batch(batch),
        opset=opset,
        uint8_input=uint8_input,
        resize_in_graph=resize_in_graph,
        input_layout=input_layout.upper(),  # type: ignore[arg-type]
        input_channels=input_channels.upper(),  # type: ignore[arg-type]
        size=parse_size(size) if size is not None else None,
    )
    limits = Limits(max_drop=max_drop, min_speedup=min_speedup)
    healing = HealSettings(minutes=heal) if heal is not None else None
    chosen = build.ExportSettings(run=run, target=wanted, limits=limits, candidates=rungs, heal=healing, **settings)
    chosen.refuse_ignored()
    with progress_bar() as progress:
        bundle = build.export(
            chosen,
            progress=progress,
            say=say,
            on_candidate=lambda rung: announce(f"{rung.name}: {_news(rung)}"),
        )
    folder = chosen.folder(bundle)
    _show_candidates(bundle)
    _show_result(bundle, folder)
    if (error := gate_error(bundle, folder, most=rungs, budget=chosen.budget)) is not None:
        raise error


@click.command(cls=Command)
@click.argument("bundle", type=PathType())
@click.option("--layers", is_flag=True, help="List every layer, not only the counts.")
def inspect(bundle: Path, layers: bool) -> None:
    """Show the contents of a bundle: layers, precisions, sizes, verdict, and the sensitive layers.

    BUNDLE is a folder written by robx export. Nothing is executed.

    \b
    robx inspect runs/r18/openvino-int8
    robx inspect runs/r18/onnx-int8 --layers
    """
    from robx.export.inspect_bundle import inspect_bundle
    from robx.records import load_bundle, require_bundle, warn_outdated

    require_bundle(bundle)
    record = load_bundle(bundle)
    warn_outdated(bundle, record, say)
    _show_result(record, bundle)
    _show_candidates(record)
    if record.chosen_on:
        print_line(f"Candidates were timed on: {_cpu(record)}")
    found = inspect_bundle(bundle, record)
    files = [(file.path, file.role, _size(file.bytes), file.sha256[:16]) for file in record.files]
    print_table(("file", "role", "size", "SHA-256"), files, title="Files", right=(2,))
    if found.operators:
        counts = [(o.name, str(o.count), str(o.int8 or ""), _size(o.bytes) if o.bytes else "") for o in found.operators]
        print_table(("operator", "count", "in int8", "weights"), counts, title="Operators", right=(1, 2, 3))
    for line in found.unsupported:
        print_line(f"not supported by the target: {line}")
    if layers and found.layers:
        shown = [
            (o.name, o.operator, o.precision, _size(o.bytes), "" if o.cost is None else f"{o.cost:.1e}")
            for o in found.layers
        ]
        headings = ("layer", "operator", "precision", "weights", "cost in int8")
        print_table(headings, shown, title="Layers", right=(3, 4))
    elif layers and found.operators:
        print_line(f"The layers of {record.format} files cannot be listed, only their operators")
    if found.sensitivity:
        _show_sensitivity(found.sensitivity)
    elif record.requested == "int8":
        print_line("Layer sensitivity was not measured, as no candidate needed it: robx export --sensitivity does")
    for note in found.notes:
        print_line(note)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InputError(f"--batch must be a positive number or dynamic, got {text!r}: give one of them")
    return int(text)


def _show_candidates(bundle: Bundle) -> None:
    if not bundle.rungs:
        return
    headings = ("", "candidate", "accuracy", "drop", "centred cosine", "vs fp32", "vs fp16", "speed", "size")
    print_table(headings, [_candidate_row(rung) for rung in bundle.rungs], title="Candidates tried", right=range(2, 9))
    for rung in bundle.rungs:
        if not rung.kept:
            print_line(f"{rung.name}: {rung.reason}", dim=True)


def _news(rung: Rung) -> str:
    """The verdicts of a candidate, or why there are none."""
    return f"accuracy {rung.accuracy_said}, speed {rung.speed}" if rung.values else rung.reason


def _candidate_row(rung: Rung) -> tuple[str, ...]:
    values = rung.values
    return (
        "*" if rung.kept else "",
        rung.name,
        rung.accuracy_said,
        _interval(values["probe_drop"]) if "probe_drop" in values else "",
        f"{values['cosine_mean'].value:.4f}" if "cosine_mean" in values else "",
        _speedup(rung, "speedup_fp32"),
        _speedup(rung, "speedup_fp16"),
        rung.speed if "speedup_fp32" in values else "on device" if values else "",
        _size(int(values["bytes"].value)) if "bytes" in values else "",
    )


def _show_result(bundle: Bundle, folder: Path) -> None:
    size = _size(bundle.bytes)
    made = f"{bundle.format} {bundle.precision}, {size}, for {bundle.runtime} on {bundle.target}"
    print_line(f"{folder}: {made}: {bundle.verdict}")
    if bundle.reason:
        print_line(f"  {bundle.reason}")
    for line in bundle.rewrites:
        print_line(f"  {line}")
    if bundle.healing is not None:
        print_line(f"  {bundle.healing.said}")
    if bundle.in_model is not None:
        print_line(f"  takes {bundle.in_model.channels} pixels 0..255 (uint8) and normalises them itself")


def _show_sensitivity(costs: dict[str, float]) -> None:
    """A bar for each layer, the largest cost first."""
    print_line("Sensitivity: 1 - centred cosine with only that layer in int8; the largest return to float first")
    top = max(max(costs.values()), 1e-12)
    for name, cost in sorted(costs.items(), key=lambda item: -item[1])[:20]:
        print_line(f"  {name:<32} {cost:.1e} {'█' * round(32 * cost / top)}")
    if len(costs) > 20:
        print_line(f"  ... and {len(costs) - 20} less sensitive layers")


def _cpu(bundle: Bundle) -> str:
    """The CPU that the gate timed on, with the instructions on which the speed of int8 depends."""
    model, flags = bundle.chosen_on.get("model") or "a CPU of unknown model", bundle.chosen_on.get("flags")
    listed = ", ".join(map(str, flags)) if isinstance(flags, list) else ""
    return f"{model}, {bundle.chosen_on.get('arch')}" + (f" ({listed})" if listed else "")


def _interval(value: Value) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _speedup(rung: Rung, key: str) -> str:
    if key not in rung.values:
        return ""
    return f"{rung.values[key].value:.2f}x" if rung.has_speed else "not reliable"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
