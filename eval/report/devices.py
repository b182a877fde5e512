"""The devices of a report side by side, and those that were only emulated: outputs count there, times do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from robx.eval.report.collect import ReportData, text_of
from robx.eval.report.recommend import Advice
from robx.eval.report.rows import Row
from robx.eval.report.tables import Cell, Table, figure_cell
from robx.eval.report.text import DASH, FOUR_DECIMALS, MS, MS_AT_MOST, PERCENT, SIGNED_PERCENT, number
from robx.records import Json, Latency

_HEATED = ("platform_throttle", "freq_drop", "not_cooled")  # codes of reasons that heat causes
_LONG = "robx bench --profile mlperf measures it"


def device_table(data: ReportData, rows: Sequence[Row], advice: Sequence[Advice], protocol: str | None) -> Table | None:
    """One row per device and requested budget: what to deploy, and how the device was while it was measured.

    None where a single device was measured.
    """
    if len(advice) < 2:
        return None
    heads = (
        *("Device", "Budget", "Deploy", "p90 bound", "Top-1"),
        *("Burst p50", "Sustained p50", "Slow-down", "Heat", "Power"),
    )
    body = [line for one in advice for line in _lines(one, data, rows, protocol)]
    # A column of dashes says nothing.
    used = [i for i in range(len(heads)) if any(line[i].what != DASH for line in body)]
    return Table(
        caption="What to deploy on each, and its state while it was measured",
        heads=tuple(heads[i] for i in used),
        rows=tuple(tuple(line[i] for i in used) for line in body),
        numeric=frozenset({"Budget", *heads[3:8]}),
    )


def emulated_table(rows: Sequence[Row], device: str) -> Table:
    """The outputs of the bundles on an emulated device."""
    here = [row for row in rows if row.device == device and row.format != "torch"]
    return Table(
        caption=f"Outputs on {device}",
        heads=("Model", "Lowest cosine", "Mean cosine", "Outputs"),
        rows=tuple(
            (
                Cell(row.name, row.kind, row.folder, row.precision),
                figure_cell(row.latency.get("output_cosine_min"), FOUR_DECIMALS),
                figure_cell(row.latency.get("output_cosine"), FOUR_DECIMALS),
                _outputs(row),
            )
            for row in here
        ),
        numeric=frozenset({"Lowest cosine", "Mean cosine"}),
    )


def _lines(advice: Advice, data: ReportData, rows: Sequence[Row], protocol: str | None) -> Iterator[tuple[Cell, ...]]:
    """The lines of one device: one per requested budget, or one without a limit."""
    here = [row for row in rows if row.device == advice.device]
    picks = ((None, None),) if advice.emulated else advice.asked or ((None, advice.best),)
    for budget, row in picks:
        record = _record(data, row or here[0])
        condition = (_temperature(record), _power(record)) if record else (Cell(DASH), Cell(DASH))
        limit = Cell(DASH, mark="missing") if budget is None else Cell(f"{budget:g} ms")
        device = Cell(advice.device, _reached(record))
        yield (device, limit, _deploy(advice, row), *_figures(row, protocol), *condition)


def _deploy(advice: Advice, row: Row | None) -> Cell:
    if advice.emulated:
        return Cell("not timed", f"emulated: {advice.emulated}", mark="missing")
    if row is not None:
        return Cell(row.label, row.profile and f"{row.profile} profile", row.folder, row.precision)
    return Cell("no model fits" if advice.best else "no recommendation yet", mark="missing")


def _figures(row: Row | None, protocol: str | None) -> tuple[Cell, ...]:
    if row is None:
        return (Cell(DASH, mark="missing"),) * 5
    long = "sustained" in row.latency
    return (
        figure_cell(row.bound, MS_AT_MOST),
        figure_cell(row.accuracy.get(protocol or ""), PERCENT),
        figure_cell(row.latency.get("burst"), MS),
        figure_cell(row.latency.get("sustained"), MS) if long else Cell(DASH, _LONG, mark="missing"),
        figure_cell(row.latency.get("slowdown"), SIGNED_PERCENT),
    )


def _record(data: ReportData, row: Row) -> Latency | None:
    """The record that the row's latency was read from."""
    found = (record for _, record in reversed(data.latencies) if record.bundle_id == row.model_id)
    return next((record for record in found if data.device_of(record) == row.device), None)


def _reached(record: Latency | None) -> str:
    """``arm64 phone over adb, Android 15, native runner``."""
    if record is None:
        return ""
    kind = {"ssh": "over SSH", "adb": "over adb"}.get(text_of(record.device.get("kind")), "local")
    runner = "native runner" if record.settings.get("runner") == "native" else ""
    return ", ".join(filter(None, (text_of(record.device.get("arch")), text_of(record.device.get("os")), kind, runner)))


def _temperature(record: Latency) -> Cell:
    """From the start to the hottest moment, and whether heat slowed the device down."""
    digests = record.settings.get("telemetry")
    digests = [one for one in digests if isinstance(one, dict)] if isinstance(digests, list) else []
    first = next(_numbers(digests, "celsius_first"), None)
    most = max(_numbers(digests, "celsius_max"), default=None)
    heated = [reason for reason in record.reasons if reason.split(":", 1)[0] in _HEATED]
    note = "; ".join(heated)
    if first is None or most is None:
        return Cell(DASH, note, mark="" if note else "missing")
    return Cell(f"{number(first)} to {number(most)} °C", note, mark="shaky" if note else "")


def _power(record: Latency) -> Cell:
    """What fed the device, and its battery at the start and at the end."""
    source = text_of(record.device.get("power_source"))
    listed = record.settings.get("battery")
    states = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    states = states or [one for one in (record.device.get("battery"),) if isinstance(one, dict)]
    percents = [f"{percent:g}" for percent in _numbers(states, "percent")]
    celsius = max(_numbers(states, "celsius"), default=None)
    parts = []
    if percents:
        parts.append(f"battery {' to '.join(dict.fromkeys((percents[0], percents[-1])))} %")
    if states and isinstance(charging := states[0].get("charging"), bool):
        parts.append("charging" if charging else "not charging")
    if celsius is not None:
        parts.append(f"{number(celsius)} °C")
    if source in ("", "unknown") and not parts:
        return Cell(DASH, mark="missing")
    return Cell(source if source not in ("", "unknown") else "battery", ", ".join(parts))


def _outputs(row: Row) -> Cell:
    wrong = next((reason for reason in row.reasons if reason.startswith("output_mismatch")), None)
    if wrong:
        return Cell("differ", wrong.partition(": ")[2], mark="fail")
    if "output_cosine_min" not in row.latency:
        return Cell("not verified", "; ".join(row.reasons), mark="missing")
    return Cell("agree with the reference", mark="pass")


def _numbers(objects: Sequence[Mapping[str, Json]], key: str) -> Iterator[float]:
    for one in objects:
        value = one.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield float(value)
