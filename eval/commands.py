"""`robx eval` and `robx report`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robx.console import print_line, print_table, progress_bar, quiet_option, say
from robx.errors import RobxError
from robx.options import Command, Number, PathType, WholeNumber
from robx.records import Accuracy, Fidelity, Measurement, Value

# ---------------------------------------------------------------------------------------------------------------- eval


@click.command(name="eval", cls=Command)
@click.argument("folders", metavar="RUN|BUNDLE...", nargs=-1, required=True, type=PathType())
@click.option(
    "--data",
    type=PathType(),
    help="Labelled images: a folder with train/ and test/, shards, IDX, CIFAR.",
)
@click.option("--test", type=PathType(), help="Test set, if --data holds training images only.")
@click.option(
    "--labels",
    type=PathType(),
    help="CSV file with a path and a label per line, for --data and --test.",
)
@click.option(
    "--image-member", metavar="SUFFIX", help="Image to read from tar samples that have several, e.g. rgb.jpg."
)
@click.option("--knn", is_flag=True, help="Weighted k-nearest-neighbour accuracy (DINO). The default.")
@click.option(
    "--linear", is_flag=True, help="Linear evaluation, 28 epochs on fresh crops (VISSL); for a bundle as with --cached."
)
@click.option(
    "--lowshot", metavar="SIZES", help="Low-shot accuracy (MSN): images per class and shares, e.g. 1,2,5,1%,10%."
)
@click.option("--lowshot-splits", type=PathType(), help="Folder of the published imagenet_subsets lists.")
@click.option(
    "--transfer",
    "transfers",
    metavar="NAME[=DIR]",
    multiple=True,
    help="Linear evaluation on cifar10, cifar100, inat18, clevr_count, ...; may be repeated.",
)
@click.option("--fidelity", is_flag=True, help="Compare bundles with their fp32 student on the same images.")
@click.option("--reference", type=PathType(), help="Folder of the fp32 student, if it is not the bundle's parent.")
@click.option(
    "--margin",
    type=Number(0, 100, min_open=True, max_open=True),
    default=1.0,
    show_default=True,
    help="Accuracy drop that --fidelity accepts, in points.",
)
@click.option("--cached", is_flag=True, help="Train linear heads on features extracted once: faster, another protocol.")
@click.option(
    "--save-head",
    type=PathType(dir_okay=False),
    help="Train a linear head on the embedding and save it for robx export --head.",
)
@click.option("--device", metavar="NAME", help="Device of the models and of kNN: cpu, cuda, ... Default: the engine's.")
@click.option("--threads", type=WholeNumber(1), help="CPU threads of the model. Default: all processors.")
@click.option("--batch", default=64, show_default=True, type=WholeNumber(1), help="Batch size.")
@click.option("--cache", type=PathType(), help="Folder for extracted features.")
@click.option("--no-cache", is_flag=True, help="Neither read nor write extracted features.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON lines instead of a table.")
def evaluate(
    folders: tuple[Path, ...],
    data: Path | None,
    test: Path | None,
    labels: Path | None,
    image_member: str | None,
    knn: bool,
    linear: bool,
    lowshot: str | None,
    lowshot_splits: Path | None,
    transfers: tuple[str, ...],
    fidelity: bool,
    reference: Path | None,
    margin: float,
    cached: bool,
    save_head: Path | None,
    device: str | None,
    threads: int | None,
    batch: int,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Measure the accuracy of students and bundles.

    Every figure has a 95 % confidence interval. Records are appended to measurements.jsonl in each folder. Test
    images that look like a training image are counted and reported.

    \b
    robx eval runs/r18 --data images/
    robx eval runs/r18 runs/r18/openvino-int8 --data images/ --fidelity
    robx eval runs/r18 --data images/ --linear --lowshot 1,2,5,1%
    robx eval runs/r18 --transfer cifar10=/data/cifar --transfer clevr_count=/data/CLEVR_v1.0
    torchrun --nproc-per-node 8 -m robx.cli eval runs/r18 --data imagenet/ --device cuda
    """
    from robx.eval.evaluate import EvalSettings
    from robx.eval.evaluate import evaluate as run
    from robx.records import to_json

    settings = EvalSettings(
        models=folders, data=data, test=test, labels=labels, image_member=image_member, knn=knn, linear=linear,
        lowshot=lowshot or "", lowshot_splits=lowshot_splits, transfers=transfers, fidelity=fidelity,
        reference=reference, margin=margin, cached=cached, save_head=save_head, device=device, threads=threads,
        batch=batch, cache=cache, no_cache=no_cache,
    )  # fmt: skip
    found: list[Measurement] = []
    with progress_bar(quiet=as_json) as progress:
        try:
            found.extend(run(settings, progress=progress, say=say))
        except RobxError:
            if not as_json:
                _show(found)  # what was measured before the error may have taken hours
            raise
    if as_json:
        for record in found:
            click.echo(json.dumps(to_json(record)))
    else:
        _show(found)


def _show(records: list[Measurement]) -> None:
    accuracies = [record for record in records if isinstance(record, Accuracy)]
    fidelities = [record for record in records if isinstance(record, Fidelity)]
    if accuracies:
        headings = ("model", "protocol", "top-1 %", "top-5 %", "images")
        print_table(headings, [_accuracy_row(r) for r in accuracies], title="Accuracy (95 % interval)", right=(2, 3, 4))
    if fidelities:
        headings = ("bundle", "verdict", "centred cosine", "probe drop", "kNN drop")
        print_table(
            headings, [_fidelity_row(r) for r in fidelities], title="Compared with fp32 (paired)", right=(2, 3, 4)
        )
        for item in fidelities:
            for reason in item.reasons:
                print_line(f"{item.bundle_id}: {reason}")


def _accuracy_row(record: Accuracy) -> tuple[str, ...]:
    top1, top5 = record.values["top1"], record.values.get("top5")
    images = record.data.images if top1.n is None else top1.n
    return record.model_name, record.protocol, _cell(top1), _cell(top5) if top5 else "", str(images)


def _fidelity_row(record: Fidelity) -> tuple[str, ...]:
    drops = [_cell(record.values[key]) if key in record.values else "" for key in ("probe_drop", "knn_drop")]
    return record.bundle_id, record.verdict, f"{record.values['cosine_mean'].value:.4f}", *drops


def _cell(value: Value) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


# -------------------------------------------------------------------------------------------------------------- report


@click.command(cls=Command)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=PathType())
@click.option(
    "-o",
    "--out",
    default="report.html",
    show_default=True,
    type=PathType(dir_okay=False),
    help="The page to write.",
)
@click.option(
    "--margin",
    default=1.0,
    show_default=True,
    type=Number(0),
    help="Accuracy drop that a recommendation accepts, in points.",
)
@click.option(
    "--budget",
    "budgets",
    metavar="[DEVICE=]MS",
    multiple=True,
    help="Latency budget (p90, ms), of every device or of those with DEVICE in their names; may be repeated.",
)
def report(folders: tuple[Path, ...], out: Path, margin: float, budgets: tuple[str, ...]) -> None:
    """Write one page that says what to deploy, and why.

    DIR is a run, a bundle, or a folder that contains some. The page works offline; the same figures are
    written beside it as Markdown and JSON.

    \b
    robx report runs/r18 -o report.html
    robx report runs/ --budget 10 --budget 33
    robx report runs/ --budget "raspberry=50" --budget "pixel=20"
    """
    from robx.eval.report.render import render

    pages = render(folders, out=out, margin=margin, budgets=budgets, say=say)
    print_line(f"{pages.title}: {out}")
