"""The search for the int8 candidate that ships: build, time and screen all; judge the best one; repeat if it fails.

A candidate is first looked at: built, timed, and screened on images that neither calibrate nor judge. The promising
ones are then timed side by side, because speeds measured in different minutes do not compare. Only the best of them is
judged on the judging images; when it fails, the next best, at a stricter level. So what ships is not the candidate that
was lucky on those images. Pure, apart from what `look`, `race` and `judge` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from robx.errors import MissingExtra, NoSpace, RobxError
from robx.export.gate.gate import SPEED_TOLERANCE
from robx.export.int8.candidate import Candidate, NotTried
from robx.records import Rung, Value, Verdict

# The probability that an inaccurate candidate ships by chance, over all candidates of one export.
LEVEL = 0.05
# A candidate slower than this does not become fast enough by keeping more layers in float.
HOPELESS = 0.8
_Z = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate with its verdicts so far, the figures behind them, and the reasons in words."""

    candidate: Candidate
    accuracy: Verdict
    speed: Verdict
    values: dict[str, Value]  # "screened": the number of screening images, until it was judged
    accuracy_reasons: tuple[str, ...]
    speed_reasons: tuple[str, ...] = ()
    is_fast: bool = True  # not slower than asked for, though perhaps UNSTABLE, or not measurable on this machine
    kept: bool = False

    @property
    def was_judged(self) -> bool:
        """Whether its accuracy was measured on the judging images, not on the screening images."""
        return "screened" not in self.values

    @property
    def is_promising(self) -> bool:
        """Good enough so far to be judged."""
        return not self.was_judged and self.accuracy != "FAIL" and self.is_fast

    @property
    def ships(self) -> bool:
        """Accurate on the judging images, and not slower where that can be measured."""
        return self.was_judged and self.accuracy == "PASS" and self.is_fast

    def record(self) -> Rung:
        """As it is written into the manifest."""
        return Rung(
            name=self.candidate.name,
            settings=self.candidate.settings(),
            precision=self.candidate.precision,
            accuracy=self.accuracy,
            speed=self.speed,
            values=self.values,
            reason="; ".join((*self.accuracy_reasons, *self.speed_reasons)),
            kept=self.kept,
        )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a search does with candidates; an error that `look` or `judge` raises is that candidate's failure."""

    look: Callable[[Candidate], Trial]  # build, time and screen it; the values have "screened"
    judge: Callable[[Trial, float], Trial]  # judge it on the judging images, at a level
    race: Callable[[Sequence[Trial]], Sequence[Trial]]  # measure the speeds of several side by side
    more: Callable[[Candidate, Sequence[Candidate]], Sequence[Candidate]]  # from the closest, and all tried
    told: Callable[[Trial], None] = lambda trial: None  # after every look and every judgement


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a search."""

    trials: tuple[Trial, ...]  # in the order tried
    winner: Candidate | None  # the best that is accurate and not slower
    best: Candidate | None  # the one closest to fp32, for --force; None when none could be built
    judged: int  # how many were judged on the judging images


def level_of(count: int) -> float:
    """The significance level for the `count`-th candidate that is judged on the judging images.

    5 % / (count (count + 1)): 2.5 % for the first, which matches the 95 % interval that is shown. The levels add up to
    5 %, so however many are judged, an inaccurate one ships by chance in at most 5 % of exports.
    """
    return LEVEL / (count * (count + 1))


def search(
    candidates: Sequence[Candidate],
    steps: Steps,
    *,
    margin: float = 100.0,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Find the best candidate that is accurate and not slower: among the fastest, the one closest to fp32.

    Careful candidates wait while a plain one that is not slower looks promising: they exist for accuracy alone. They
    are tried when it fails, and after them what ``steps.more`` gives.

    Args:
        candidates: from plain to careful.
        steps: how a candidate is looked at, timed and judged.
        margin: points of accuracy that may be lost; see `preference`.
        budget: seconds after which no further candidate is looked at; None: no limit.
        clock: seconds, monotonic.
    """
    state = _State(steps, margin=margin, deadline=None if budget is None else clock() + budget, clock=clock)
    pending, more = list(candidates), True
    while pending:
        pending = state.look_at(pending)
        winner = state.judge_best()
        if winner is not None:
            return Outcome(trials=tuple(state.trials), winner=winner, best=winner, judged=state.judged)
        if state.is_late():
            break
        if not pending and more:
            best, more = state.closest(fast=True), False
            pending = list(steps.more(best, [t.candidate for t in state.trials])) if best is not None else []
    return Outcome(trials=tuple(state.trials), winner=None, best=state.closest(), judged=state.judged)


def preference(promising: Sequence[Trial], *, margin: float = 100.0) -> list[Trial]:
    """The order in which promising candidates are judged: among the fastest, within timing noise, the closest first.

    Candidates of one form count as equally fast, at their median speed: differences between them are noise. Where no
    speed was measured, or only on a busy machine, all count as equally fast. Ties go to the first, which is the
    plainest. Those that lost more than `margin` points in screening, by more than its standard error, come last: each
    candidate that is judged makes the next test stricter.
    """
    left, order = [(_speedup(trial, promising), trial) for trial in promising], list[Trial]()
    while left:
        likely = [each for each in left if _screened_drop(each[1]) <= margin] or left
        fastest = max(speedup for speedup, _ in likely)
        as_fast = [each for each in likely if each[0] >= fastest * (1 - SPEED_TOLERANCE)]
        best = max(as_fast, key=lambda each: _closeness(each[1]))
        left.remove(best)
        order.append(best[1])
    return order


def failed_trial(candidate: Candidate, error: RobxError) -> Trial:
    """The trial of a candidate that could not be built or run."""
    return Trial(
        candidate=candidate,
        accuracy="FAIL",
        speed="INCONCLUSIVE",
        values={},
        accuracy_reasons=(f"failed: {error}",),
    )


def attempt(candidate: Candidate, step: Callable[[], Trial]) -> Trial:
    """The trial that `step` returns, a failed one when it raises, or one without a verdict when it is not tried.

    Raises:
        MissingExtra, NoSpace: a package is not installed, or the disk is full; that is not the candidate's fault.
    """
    try:
        return step()
    except (MissingExtra, NoSpace):
        raise
    except NotTried as error:
        reasons = (f"not tried: {error}",)
        return Trial(
            candidate=candidate, accuracy="INCONCLUSIVE", speed="INCONCLUSIVE", values={}, accuracy_reasons=reasons
        )
    except RobxError as error:
        return failed_trial(candidate, error)


@dataclass
class _State:
    """What a search has tried, and what it has learnt from it."""

    steps: Steps
    margin: float
    deadline: float | None
    clock: Callable[[], float]
    trials: list[Trial] = field(default_factory=list)
    slow: set[Candidate] = field(default_factory=set)  # families whose other candidates would be slower still
    judged: int = 0

    def is_late(self) -> bool:
        """Whether the time budget is spent."""
        return self.deadline is not None and self.clock() > self.deadline

    def look_at(self, pending: Sequence[Candidate]) -> list[Candidate]:
        """Look at all but careful candidates that cannot be faster than a promising one; return those, in order."""
        waiting: list[Candidate] = []
        for candidate in pending:
            if candidate.family in self.slow:
                continue
            promising = (trial.candidate for trial in self.trials if trial.is_promising)
            if candidate.careful and any(candidate.keeps_no_less_float_than(other) for other in promising):
                waiting.append(candidate)
                continue
            if self.trials and self.is_late():
                break
            trial = attempt(candidate, partial(self.steps.look, candidate))
            self.steps.told(trial)
            self.trials.append(trial)
            if _is_hopeless(trial) or (trial.accuracy != "FAIL" and not trial.is_fast):
                self.slow.add(candidate.family)
        return waiting

    def judge_best(self) -> Candidate | None:
        """Judge the promising candidates, the best first, until one passes; return that one."""
        promising = [trial for trial in self.trials if trial.is_promising]
        if len(promising) > 1:
            for trial in self.steps.race(promising):
                self._replace(trial)
            promising = [trial for trial in self.trials if trial.is_promising]
        for trial in preference(promising, margin=self.margin):
            self.judged += 1
            judged = attempt(trial.candidate, partial(self.steps.judge, trial, level_of(self.judged)))
            self.steps.told(judged)
            self._replace(replace(judged, kept=judged.ships))
            if judged.ships:
                return judged.candidate
        return None

    def closest(self, *, fast: bool = False) -> Candidate | None:
        """The candidate closest to fp32; None when none ran. `fast`: among those that are not too slow."""
        ran = [t for t in self.trials if "cosine_mean" in t.values and not (fast and t.candidate.family in self.slow)]
        return max(ran, key=_closeness).candidate if ran else None

    def _replace(self, trial: Trial) -> None:
        self.trials = [trial if trial.candidate is old.candidate else old for old in self.trials]


def _is_hopeless(trial: Trial) -> bool:
    highs = [v.high for name, v in trial.values.items() if name.startswith("speedup_") and v.high is not None]
    return trial.speed == "FAIL" and bool(highs) and min(highs) < HOPELESS


def _speedup(trial: Trial, among: Sequence[Trial]) -> float:
    """Against fp32, the median over its form; 1 where it was not measured, or not reliably."""
    alike = [other for other in among if other.candidate.form == trial.candidate.form]
    known = [each.values.get("speedup_fp32") if each.speed != "INCONCLUSIVE" else None for each in alike]
    return median(1.0 if speedup is None else speedup.value for speedup in known)


def _screened_drop(trial: Trial) -> float:
    """Points that the frozen probe loses in screening, less a standard error; 0 where the images have no labels."""
    drop = trial.values.get("probe_drop", Value(value=0.0))
    if drop.low is None or drop.high is None:
        return drop.value
    return drop.value - (drop.high - drop.low) / (2 * _Z)


def _closeness(trial: Trial) -> float:
    """The mean centred cosine on the screening images, which a trial keeps when it is judged."""
    return trial.values.get("screen_cosine", trial.values["cosine_mean"]).value
