"""The report's first lines: for each device what to deploy, how much faster and smaller it is, what it loses, how sure.

Every number is a figure of the tables below, in the same rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from robx.eval.report.recommend import Advice
from robx.eval.report.rows import Row
from robx.eval.report.text import at_most, hundredths, megabytes, percent
from robx.records import Value

_LOST = {"probe_drop": "linear-probe accuracy", "knn_drop": "kNN accuracy"}  # by the last part of a drop's source
_PROTOCOLS = {"knn": "kNN", "linear": "linear"}
_SHORT = ("rapid", "quick")


def summaries(advice: Sequence[Advice], rows: Sequence[Row], protocol: str | None) -> list[tuple[str, str]]:
    """(device, sentences) of each device with a recommendation."""
    return [(one.device, _summary(one, one.best, rows, protocol)) for one in advice if one.best is not None]


def _summary(advice: Advice, best: Row, rows: Sequence[Row], protocol: str | None) -> str:
    base = next((row for row in rows if _is_baseline(row, best)), None)
    sentences = [
        f"On {advice.device}, deploy {best.label}.",
        _gains(best, base),
        _loses(best, protocol),
        _certainty(best),
    ]
    return " ".join(filter(None, sentences))


def _is_baseline(row: Row, best: Row) -> bool:
    """Whether `row` is the fp32 bundle of the same student, format and device."""
    same = (row.student, row.name, row.format, row.device) == (best.student, best.name, best.format, best.device)
    return same and row.precision == "fp32" and best.precision != "fp32"


def _gains(best: Row, base: Row | None) -> str:
    if best.precision == "fp32":
        size = f" ({megabytes(best.bytes)})" if best.bytes else ""
        return f"It is the fp32 model{size}: no smaller precision qualifies here and is faster."
    parts = []
    if best.speedup is not None:
        value = best.speedup.value
        sure = f" ({value.low:.2f} to {value.high:.2f})" if value.low is not None and value.high is not None else ""
        parts.append(f"{value.value:.2f} times as fast as fp32{sure}")
    if base is not None and base.bytes and best.bytes:
        parts.append(f"{base.bytes / best.bytes:.1f} times smaller ({megabytes(best.bytes)})")
    unknown = ""
    if best.speedup_shaky and base is not None:
        unknown = f"How much faster is not known: the latency of its fp32 model is {base.validity}."
    elif not parts:
        unknown = "Its fp32 model was not measured here, so no speed-up is known."
    return " ".join(filter(None, (f"It is {' and '.join(parts)}." if parts else "", unknown)))


def _loses(best: Row, protocol: str | None) -> str:
    accuracy = best.accuracy.get(protocol or "")
    name = _PROTOCOLS.get(protocol or "", protocol)
    level = f" Its {name} top-1 is {percent(accuracy.value.value)} %." if accuracy else ""
    if best.drop is None:
        equal = "Its outputs are the student's." if best.precision == "fp32" and best.gate == "PASS" else ""
        return f"{equal}{level}".strip()
    value, what = best.drop.value, _LOST.get(best.drop.source.rsplit(".", 1)[-1], "accuracy")
    lost = f"loses {hundredths(value.value)} points" if value.value > 0 else "loses no measurable part"
    return f"It {lost} of {what}{_bound(value)}.{level}"


def _bound(value: Value) -> str:
    if value.high is None:
        return ", of which no interval was measured"
    images = f", on {value.n} images" if value.n else ""
    return f" against its fp32 student, and with 95 % confidence at most {hundredths(value.high)} points{images}"


def _certainty(best: Row) -> str:
    if best.bound is None:
        return ""
    calls = f" ({best.bound.value.n} calls)" if best.bound.value.n else ""
    said = f"Nine of ten inferences end within {at_most(best.bound.value.value)} ms, with 99 % confidence{calls}"
    short = f"; the {best.profile} profile is too short for publication" if best.profile in _SHORT else ""
    return f"{said}: {best.validity}{short}."
