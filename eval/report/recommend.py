"""What to deploy: for each device and latency budget, the fastest model that gives up at most a point of accuracy.

The rule. A *candidate* is a bundle whose latency on the device is VALID and whose accuracy was shown to be within
`margin` points of its own fp32 student's (verdict PASS with a margin no wider than this one, or PASS and the upper end
of the paired drop within it). It *fits* a budget when the upper confidence bound of its p90 does. Of those that fit,
the most accurate sets the level, and the fastest within `margin` points of that level is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from robx.errors import InputError
from robx.eval.report.rows import Row

MARGIN = 1.0  # points of top-1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A requested latency budget (p90, ms), of every device or of those with `device` in their names."""

    ms: float
    device: str = ""

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """From a number of ms, or from ``DEVICE=MS``.

        Raises:
            InputError: it is neither, or not above 0.
        """
        device, _, number = str(text).rpartition("=")
        try:
            ms = float(number)
        except ValueError:
            ms = math.nan
        if not 0 < ms < math.inf:
            raise InputError(f"budget {text} is not a latency in ms: give a number above 0, or DEVICE=MS")
        return cls(ms=ms, device=device.strip())

    def applies_to(self, device: str) -> bool:
        """Whether it is a budget of this device."""
        return self.device.lower() in device.lower()


@dataclass(frozen=True, kw_only=True)
class Step:
    """The recommendation for every budget of at least `start` and less than `end` ms; None: no model fits."""

    start: float
    end: float
    row: Row | None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A model that is not a candidate on a device, and why."""

    row: Row
    why: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommendations on one device.

    `steps` cover every budget from zero up. `provisional` applies the same rule to UNSTABLE latencies too, only where
    there is no VALID candidate: what to look at, not what to deploy.
    """

    device: str
    steps: tuple[Step, ...]
    asked: tuple[tuple[float, Row | None], ...] = ()  # (budget, row) of the requested budgets
    emulated: str = ""  # why the device counts as emulated: its latencies mean nothing
    provisional: tuple[Step, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def best(self) -> Row | None:
        """The recommendation without a latency limit."""
        return self.steps[-1].row if self.steps else None


def advise(
    rows: Sequence[Row], *, protocol: str | None, margin: float = MARGIN, budgets: Sequence[Budget | float] = ()
) -> tuple[Advice, ...]:
    """Recommendations for each device among `rows`, judged by the top-1 of `protocol` (a key of Row.accuracy).

    Emulated devices come last.

    Raises:
        InputError: a budget names no device.
    """
    devices = sorted({row.device for row in rows if row.device})
    wanted = [budget if isinstance(budget, Budget) else Budget(ms=budget) for budget in budgets]
    for budget in wanted:
        if not any(budget.applies_to(device) for device in devices) and (budget.device or devices):
            raise InputError(
                f"budget {budget.device}={budget.ms:g}: no device has {budget.device!r} in its name: "
                f"give a part of one of {'; '.join(devices) or 'none, since no latency was measured'}"
            )
    found = [
        _advise_one(
            device,
            [r for r in rows if r.device == device],
            protocol,
            margin,
            [budget.ms for budget in wanted if budget.applies_to(device)],
        )
        for device in devices
    ]
    return tuple(sorted(found, key=lambda one: bool(one.emulated)))


def why_not(row: Row, margin: float) -> str | None:
    """Why a row is not a candidate, or None when it is; the validity of its latency is checked elsewhere."""
    if row.format == "torch":
        return "the reference, not a bundle"
    if row.gate in ("FAIL", "FORCED"):
        return f"the export gate says {row.gate}: {row.gate_reason}"
    if row.bound is None:
        return "its p90 has no upper bound: measure more queries"
    if row.precision == "fp32":
        if row.judged == "FAIL":
            return f"accuracy FAIL: {row.judged_why}"
        return None if "PASS" in (row.gate, row.judged) else f"export gate {row.gate}: {row.gate_reason}"
    if row.judged != "PASS":
        return f"accuracy {row.judged}: {row.judged_why or 'no paired comparison with its fp32 student'}"
    if row.drop and row.margin is not None and row.margin <= margin:
        return None
    high = row.drop.value.high if row.drop else None
    if high is None:
        return f"its accuracy drop was not measured: run robx eval {row.folder} --fidelity with labelled images"
    return None if high <= margin else f"its accuracy drop may be {high:.2f} points, more than {margin:g}"


def pick(rows: Sequence[Row], *, budget: float, score: Callable[[Row], float], margin: float = MARGIN) -> Row | None:
    """Of the rows whose bound is within `budget` ms: the fastest within `margin` points of the best of them."""
    fits = [row for row in rows if _bound(row) <= budget]
    level = max((score(row) for row in fits), default=0.0)
    near = [row for row in fits if score(row) >= level - margin]
    return min(near, key=lambda row: (_bound(row), -score(row), row.bytes or 0, row.model_id), default=None)


def steps(rows: Sequence[Row], *, score: Callable[[Row], float], margin: float = MARGIN) -> tuple[Step, ...]:
    """`pick` for every budget at once: it can change only where another row begins to fit."""
    if not rows:
        return ()
    starts = [0.0, *sorted({_bound(row) for row in rows})]
    found: list[Step] = []
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        row = pick(rows, budget=start, score=score, margin=margin)
        if found and found[-1].row is row:
            found[-1] = Step(start=found[-1].start, end=end, row=row)
        elif end > start:
            found.append(Step(start=start, end=end, row=row))
    return tuple(found)


def _advise_one(
    device: str, rows: Sequence[Row], protocol: str | None, margin: float, budgets: Sequence[float]
) -> Advice:
    reasons = {row.model_id: why_not(row, margin) for row in rows}
    sound = [row for row in rows if reasons[row.model_id] is None and row.validity != "INVALID"]
    score, comparable = _score(sound, protocol)
    valid = [row for row in comparable if row.validity == "VALID"]
    left_out = [
        LeftOut(row=row, why=why)
        for row in rows
        if row not in valid and row.format != "torch" and (why := reasons[row.model_id] or _latency_why(row))
    ]
    return Advice(
        device=device,
        steps=steps(valid, score=score, margin=margin),
        asked=tuple((b, pick(valid, budget=b, score=score, margin=margin)) for b in budgets),
        provisional=() if valid else steps(comparable, score=score, margin=margin),
        left_out=tuple(left_out),
        emulated=rows[0].emulated if all(row.emulated for row in rows) else "",
    )


def _score(rows: Sequence[Row], protocol: str | None) -> tuple[Callable[[Row], float], list[Row]]:
    """The score of a row's accuracy, and the rows that can be compared by it.

    That is top-1 where it is known. Bundles of one student can be compared without it, by their drops.
    """
    if protocol is not None and any(protocol in row.accuracy for row in rows):
        known = [row for row in rows if protocol in row.accuracy]
        if len(known) == len(rows) or len({row.student for row in rows}) > 1:
            return lambda row: row.accuracy[protocol].value.value, known
    if len({row.student for row in rows}) <= 1:
        return lambda row: -(row.drop.value.value if row.drop else 0.0), list(rows)
    return lambda row: 0.0, []


def _latency_why(row: Row) -> str:
    if row.validity != "VALID":
        return f"latency {row.validity}: {'; '.join(row.reasons) or 'no reason was recorded'}"
    return f"its top-1 is not known, so it cannot be compared with other students: run robx eval {row.folder}"


def _bound(row: Row) -> float:
    return row.bound.value.value if row.bound else math.inf
