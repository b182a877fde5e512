"""`robx report`: records in, one page out that says what to deploy, with Markdown and JSON beside it.

It measures nothing and opens no model. `collect` reads what robx wrote; `make_pages` is pure and returns the same bytes
for the same records. The first screen recommends (recommend.py), the rest lets a reader check it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from robx.errors import InputError
from robx.eval.report import accuracy_tables as accuracy
from robx.eval.report import provenance as provenance
from robx.eval.report import tables as tables
from robx.eval.report.collect import ReportData, collect
from robx.eval.report.devices import device_table, emulated_table
from robx.eval.report.recommend import MARGIN, Advice, Budget, Step, advise
from robx.eval.report.rows import Row, build_rows, headline_data, images_of, precision_pairs
from robx.eval.report.schema import DeviceAdvice, Report, Span
from robx.eval.report.summary import summaries
from robx.eval.report.text import MS_AT_MOST, PERCENT, POINTS, SIZE, TIMES, at_most, clean, figure
from robx.records import Latency, Value, to_json
from robx.store.files import write_text
from robx.store.folders import require_writable


@contextlib.contextmanager
def _no_matplotlib_cache() -> Iterator[None]:
    """Let the first import of matplotlib write its font cache to a temporary folder and not into the user's home."""
    if "matplotlib" in sys.modules or os.environ.get("MPLCONFIGDIR"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="robx-matplotlib-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


with _no_matplotlib_cache():
    from robx.eval.report.figures import curve_figures, latency_figures, pair_figure, pareto_figure

_PROTOCOLS = {"knn": "kNN", "linear": "Linear"}


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The report in three forms with the same figures."""

    title: str  # the decision in a line
    html: str = field(repr=False)
    markdown: str = field(repr=False)
    json: str = field(repr=False)


def render(
    folders: Sequence[Path],
    *,
    out: Path,
    margin: float = MARGIN,
    budgets: Sequence[float | str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Pages:
    """Write the report on everything below `folders` to `out`, and the same figures beside it as .md and .json.

    Args:
        folders: runs, bundles, or folders that contain some.
        out: the page, a name that ends in .html.
        margin: the accepted drop of top-1 in points, against the fp32 student and the best model that fits.
        budgets: latency budgets to list by name: a number of ms for every device, or "DEVICE=MS" for those with DEVICE
            in their names. The page covers every other budget as well.
        say: called with one line for each damaged file.

    Raises:
        InputError: no such folder, no run or bundle in it, a name that is not an HTML file's, a file that is not a
            report of robx in its place, or a margin or budget out of range.
    """
    wanted = check_report(out, margin=margin, budgets=budgets)
    data = collect(folders)
    if not (data.runs or data.bundles):
        first = f" ({data.problems[0].where}: {data.problems[0].what})" if data.problems else ""
        raise InputError(
            f"{', '.join(map(str, folders))} has no run or bundle that can be read{first}: "
            "give a folder that robx distill or robx export wrote"
        )
    pages = make_pages(data, margin=margin, budgets=wanted)
    files = dict(zip(_pages_at(out), (pages.json, pages.markdown, pages.html), strict=True))
    for problem in data.problems:
        say(f"warning: {problem.where}: {problem.what}")
    for path, text in files.items():
        write_text(path, text)
    return pages


def check_report(out: Path, *, margin: float = MARGIN, budgets: Sequence[float | str] = ()) -> list[Budget]:
    """The budgets, parsed, before anything is read or measured; see `render`.

    Raises:
        InputError: a name that is not an HTML file's, a folder that cannot be written, a file that is not a report of
            robx in a page's place, or a margin or budget out of range.
        NoSpace: the disk is full.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out} is not the name of an HTML file: give one that ends in .html")
    if not 0 <= margin < math.inf:
        raise InputError(f"margin {margin:g} is not a number of points: give 0 or more")
    for path in _pages_at(out):
        _refuse_foreign(path)
    require_writable(out.parent, remedy="give --out in another folder")
    return [Budget.parse(budget) for budget in budgets]


def _pages_at(out: Path) -> tuple[Path, Path, Path]:
    """The JSON, the Markdown and the page itself, in the order in which they are written."""
    return out.with_suffix(".json"), out.with_suffix(".md"), out


# The start of each page, and of those that earlier versions wrote.
_OWN_START = {
    ".json": re.compile(rb'\{\s*"schema": \d+,\s*"title": .*?"margin": .*?"accuracy": ', re.DOTALL),
    ".md": re.compile(
        rb"# [^\n]*\n+(On [^\n]*\n+)*(Measured [^\n]*\n+)?For each device and latency budget: the fastest model"
    ),
}
_OWN_PAGE = re.compile(rb"<!doctype html>.*?<title>[^<]* robx report</title>", re.DOTALL | re.IGNORECASE)
_START_BYTES = 64 * 1024


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that `render` did not write.

    Raises:
        InputError: `path` exists and does not start like the report's page of its kind.
    """
    if not os.path.lexists(path):
        return
    if path.is_file():
        try:
            with path.open("rb") as file:
                start = file.read(_START_BYTES)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): give another name with --out") from error
        if _OWN_START.get(path.suffix, _OWN_PAGE).match(start):
            return
    raise InputError(f"{path} exists and is not a robx report: move it, or give another name with --out")


def make_pages(data: ReportData, *, margin: float = MARGIN, budgets: Sequence[Budget] = ()) -> Pages:
    """The page, the Markdown and the JSON of `data`; see `render`."""
    rows = build_rows(data)
    headline = headline_data(data)
    protocol = headline[0] if headline else None
    advice = advise(rows, protocol=protocol, margin=margin, budgets=budgets)
    view = _view(data, rows, advice, protocol, margin)
    return Pages(
        title=clean(view["title"]),
        html=_templates(html=True).get_template("report.html.j2").render(view),
        markdown=_templates(html=False).get_template("report.md.j2").render(view),
        json=_machine_form(data, rows, advice, view),
    )


def _view(
    data: ReportData, rows: Sequence[Row], advice: Sequence[Advice], protocol: str | None, margin: float
) -> dict[str, Any]:
    """What the templates show: text, figures and tables, but no records."""
    pairs = precision_pairs(rows)
    measured = [row for row in rows if row.device and not row.emulated]
    real = [one for one in advice if not one.emulated]
    axis = _axis(data)
    return {
        "title": _title(advice, rows),
        "summaries": summaries(real, rows, protocol),
        "margin": f"{margin:g}",
        "axis": axis,
        "device_table": device_table(data, rows, advice, protocol),
        "devices": [_device(i, one, rows, protocol, margin, axis) for i, one in enumerate(real)],
        "emulated": [
            {"name": one.device, "why": one.emulated, "table": emulated_table(rows, one.device)}
            for one in advice
            if one.emulated
        ],
        "unmeasured": _unmeasured(rows),
        "warnings": provenance.licence_warnings(data),
        "data_notes": provenance.data_notes(data),
        "latency_table": tables.latency_table(measured) if measured else None,
        "latency_figures": latency_figures(measured, data.samples),
        "pair_table": tables.pair_table(pairs) if pairs else None,
        "pair_figure": pair_figure(pairs, margin=margin),
        "candidates": [tables.candidate_table(p, data.labels[p.bundle.id]) for p in data.bundles if p.bundle.rungs],
        "curves": curve_figures(data),
        "protocol_table": accuracy.protocol_table(data),
        "fidelity_table": accuracy.fidelity_table(data),
        "figure_table": accuracy.figure_table(data),
        "provenance": provenance.provenance(data),
        "doubts": provenance.doubts(data, rows, real),
        "source_table": provenance.source_table(data) if data.measurements else None,
        "span": _span(data),
        "robx": ", ".join(sorted({b.bundle.robx_version for b in data.bundles if b.bundle.robx_version})),
    }


def _span(data: ReportData) -> tuple[str, str] | None:
    """When the first and the last measurement started."""
    times = sorted(m.record.started for m in data.measurements)
    return (times[0], times[-1]) if times else None


def _title(everywhere: Sequence[Advice], rows: Sequence[Row]) -> str:
    """The decision in a line; an emulated device is not counted."""
    advice = [one for one in everywhere if not one.emulated]
    best = {one.best.label for one in advice if one.best}
    if not advice:
        why = "only emulated devices were measured" if everywhere else "no latency was measured"
        return f"Nothing to recommend: {why}"
    if not any(row.validity == "VALID" for row in rows):
        return "Nothing to recommend yet: no latency is VALID"
    if not best:
        return "Nothing to recommend: no model qualifies"
    if len(best) == 1 and all(one.best for one in advice):
        return f"Deploy {best.pop()}"
    decided = sum(one.best is not None for one in advice)
    return f"What to deploy on {decided} of {len(advice)} devices"


def _axis(data: ReportData) -> str:
    """What accuracy is called in the first screen's figure."""
    headline = headline_data(data)
    if not headline:
        return "negated drop (points)"
    info = next(r.data for _, r in data.accuracies if (r.protocol, *images_of(r)) == headline)
    return f"{_PROTOCOLS.get(headline[0], headline[0])} top-1 on {info.name} (%)"


def _device(
    index: int, advice: Advice, rows: Sequence[Row], protocol: str | None, margin: float, axis: str
) -> dict[str, Any]:
    """The section of one device on the first screen."""
    here = [row for row in rows if row.device == advice.device]
    students = {row.student for row in here}
    references = [row for row in rows if row.format == "torch" and not row.device and row.student in students]
    best, nothing = advice.best, "no model fits" if advice.steps else "no recommendation"
    return {
        "id": f"device-{index}",
        "name": advice.device,
        "best": _pick(best, protocol) if best else None,
        "why_none": None if best else _why_none(advice, here),
        "again": _again(here),
        "steps": [_step(step) for step in advice.steps],
        "asked": [{"budget": f"{b:g} ms", "pick": row.label if row else nothing} for b, row in advice.asked],
        "provisional": [_step(step) for step in advice.provisional if step.row],
        "pareto": pareto_figure(
            f"pareto-{index}", here, protocol=protocol, margin=margin, axis=axis, picked=best, device=advice.device
        ),
        "table": tables.model_table([*references, *here], caption=f"All models on {advice.device}", picked=best),
    }


def _pick(row: Row, protocol: str | None) -> dict[str, Any]:
    """The recommended model and the figures that speak for it: (value, form, what it is, source)."""
    facts: list[tuple[Value, Any, str, str]] = []
    if found := row.accuracy.get(protocol or ""):
        what = f"{_PROTOCOLS.get(protocol or '', protocol)} top-1"
        facts.append((found.value, PERCENT, what, found.source))
    if row.drop:
        facts.append((row.drop.value, POINTS, "drop vs fp32", row.drop.source))
    if row.bound:
        facts.append((row.bound.value, MS_AT_MOST, "p90, upper bound", row.bound.source))
    if row.speedup:
        facts.append((row.speedup.value, TIMES, "speed-up vs fp32", row.speedup.source))
    if row.bytes:
        facts.append((Value(value=row.bytes), SIZE, "model size", row.folder))
    return {"name": row.name, "what": row.kind, "folder": row.folder, "facts": facts}


def _step(step: Step) -> dict[str, str]:
    start, end = at_most(step.start), at_most(step.end)
    span = f"{start} ms or more" if math.isinf(step.end) else f"{start} to {end} ms"
    if step.start == 0:
        span = f"less than {end} ms"
    pick = step.row.label if step.row else "no model fits"
    return {"span": span, "pick": pick, "mark": step.row.precision if step.row else ""}


def _why_none(advice: Advice, here: Sequence[Row]) -> str:
    if any(row.validity == "VALID" for row in here):
        return (
            "No model on this device has both a VALID latency and an accuracy that was shown to be within the margin: "
            f"{len(advice.left_out)} were excluded."
        )
    likely = advice.provisional[-1].row if advice.provisional else None
    if likely is None or likely.bound is None:
        return "No latency on this device is VALID, and no model would qualify if one were."
    return (
        "No latency on this device is VALID. If the UNSTABLE measurements hold, "
        f"{likely.label} would be recommended (p90 at most {at_most(likely.bound.value.value)} ms)."
    )


def _again(here: Sequence[Row]) -> str:
    """The command that measures the device's bundles again; empty where a latency is VALID."""
    folders = list(dict.fromkeys(row.folder for row in here if row.format != "torch"))
    if any(row.validity == "VALID" for row in here):
        return ""
    return shlex.join(["robx", "bench", *folders, "--profile", "standard"])


def _unmeasured(rows: Sequence[Row]) -> tables.Table | None:
    """Bundles without a latency, and students of which no bundle has one."""
    devices = {row.student for row in rows if row.device}
    left = [row for row in rows if not row.device and (row.format != "torch" or row.student not in devices)]
    return tables.model_table(left, caption="Known figures", picked=None) if left else None


def _machine_form(data: ReportData, rows: Sequence[Row], advice: Sequence[Advice], view: dict[str, Any]) -> str:
    """The recommendations, every figure with the file, line and field that it was read from, and the records."""
    form: Report = {
        "schema": 1,
        "title": view["title"],
        "margin": view["margin"],
        "accuracy": view["axis"],
        "summaries": [{"device": device, "text": text} for device, text in view["summaries"]],
        "devices": [_advice_json(one) for one in advice],
        "rows": to_json(list(rows)),
        "doubts": [(doubt.kind, doubt.what, doubt.why) for doubt in view["doubts"]],
        "warnings": view["warnings"],
        "data": view["data_notes"],
        "students": [{"folder": run.folder, "student": to_json(run.student)} for run in data.runs],
        "curves": [{"folder": run.folder, "lines": list(run.curves)} for run in data.runs],
        "bundles": [{"folder": p.folder, "id": p.bundle.id, "bundle": to_json(p.bundle)} for p in data.bundles],
        "measurements": [
            {"file": m.file, "line": m.line, "measurement": to_json(m.record), "raw": _raw(m.record, data)}
            for m in data.measurements
        ],
    }
    return json.dumps(form, indent=1, allow_nan=False) + "\n"


def _raw(record: Any, data: ReportData) -> int | None:
    """How many raw samples of a latency were found and match its hash."""
    if not isinstance(record, Latency) or record.samples_sha256 not in data.samples:
        return None
    return sum(len(process) for process in data.samples[record.samples_sha256])


def _advice_json(advice: Advice) -> DeviceAdvice:
    def key(row: Row | None) -> str | None:
        return row.model_id if row else None

    def spans(steps: Sequence[Step]) -> list[Span]:
        return [
            {"from_ms": s.start, "below_ms": None if math.isinf(s.end) else s.end, "model_id": key(s.row)}
            for s in steps
        ]

    return {
        "device": advice.device,
        "emulated": advice.emulated,
        "recommended": key(advice.best),
        "budgets": spans(advice.steps),
        "asked": [{"budget_ms": b, "model_id": key(row)} for b, row in advice.asked],
        "provisional": spans(advice.provisional),
        "left_out": [{"model_id": out.row.model_id, "why": out.why} for out in advice.left_out],
    }


@cache
def _templates(*, html: bool) -> jinja2.Environment:
    """Jinja with every string cleaned and, for HTML, escaped; only the figures drawn here are markup."""

    def finish(value: object) -> object:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robx.eval.report", "."),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        finalize=finish,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    environment.filters["figure"] = figure
    return environment


def _markdown(text: object) -> str:
    """`text` as plain text in a Markdown table: on one line, with its markup escaped."""
    line = " ".join(clean(str(text)).split())
    for mark in "\\`*_[]|#~$!":
        line = line.replace(mark, f"\\{mark}")
    return str(escape(line)).replace("&#39;", "'").replace("&#34;", '"')
