"""The climb up the ladder: which candidates are tried, and which one ships.

A candidate is looked at first: built, timed, and screened on images that neither calibrate nor judge. Those that look
sound are timed side by side, for figures of different minutes do not compare, and then held to the judging images, one
after the other, the best first, until one passes: so the one that ships is not the one that was lucky on them. Pure but
for what `look`, `race` and `hold` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from robx.errors import MissingExtra, RobxError
from robx.export.gate.gate import SPEED_TOLERANCE
from robx.export.int8.candidate import Candidate
from robx.records import Rung

# Of all candidates of one export together: how rarely an inaccurate one may ship by chance.
LEVEL = 0.05
# A rung this slow will not be saved by giving more of it back to float.
HOPELESS = 0.8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the climb found."""

    rungs: tuple[Rung, ...]
    winner: Candidate | None  # the best that is accurate and not slower
    best: Candidate | None  # the one that came nearest, for --force; None when none could be built
    held: int  # how many were held to the judging images


def level_of(count: int) -> float:
    """The level at which the `count`-th candidate that is held to the judging images has to pass.

    5 % / (count (count + 1)): 2.5 % for the first, which is the 95 % interval on the screen. Over any number of them
    that adds up to less than 5 %: so rarely does an inaccurate candidate ship by chance, however many were tried.
    """
    return LEVEL / (count * (count + 1))


def ships(rung: Rung) -> bool:
    """Accurate on the judging images, and not slower where that can be measured."""
    return rung.was_judged and rung.accuracy == "PASS" and _is_fast(rung)


def climb(
    candidates: Sequence[Candidate],
    look: Callable[[Candidate], Rung],
    hold: Callable[[Candidate, Rung, float], Rung],
    *,
    race: Callable[[Sequence[tuple[Candidate, Rung]]], Sequence[Rung]] | None = None,
    margin: float = 100.0,
    more: Callable[[Candidate, Sequence[Candidate]], Sequence[Candidate]] | None = None,
    on_rung: Callable[[Rung], None] | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Find the best candidate that is accurate and not slower: of the fastest, the closest to fp32.

    Once one looks sound and fast, careful ones after it that leave no less in float wait: they are there for accuracy
    alone, and are tried when it does not pass; then `more`.

    Args:
        candidates: from plain to careful.
        look: builds and times a candidate and screens it; ``values["screened"]`` says on how many images. A RobxError
            (but a missing package) is that rung's failure.
        hold: the same rung, judged on the judging images at a level; a RobxError is its failure too.
        race: the rungs of several sound candidates with their speeds measured in one run; None keeps those of `look`.
        margin: points that may be lost; see `preference`.
        more: further candidates made from the closest one that is not too slow, and all that were tried.
        on_rung: told of every rung as it is looked at and as it is held.
        budget: seconds after which no further candidate is looked at.
        clock: seconds, monotonic.
    """
    deadline = None if budget is None else clock() + budget
    search = _Search(look, hold, on_rung, race=race, margin=margin, deadline=deadline, clock=clock)
    pending = list(candidates)
    while pending:
        pending = search.look_at(pending)
        winner = search.hold_best()
        if winner is not None:
            return Outcome(rungs=search.rungs, winner=winner, best=winner, held=search.held)
        if search.is_late():
            break
        if not pending and more is not None:
            best = search.closest(quick=True)
            pending = list(more(best, [c for c, _ in search.tried])) if best is not None else []
            more = None
    return Outcome(rungs=search.rungs, winner=None, best=search.closest(), held=search.held)


def preference(sound: Sequence[tuple[Candidate, Rung]], *, margin: float = 100.0) -> list[tuple[Candidate, Rung]]:
    """The order in which sound candidates are held: of the fastest, as far as a clock can tell, the closest first.

    Candidates of one form are as fast as their median: what the clock says beyond that is noise. Where no speed was
    measured all are as fast. Of equals the first, which is the plainest. Those that lost more than `margin` points in
    screening come after all others: each one that is held makes the next test stricter.
    """
    left, order = [(_speedup(candidate, sound), candidate, rung) for candidate, rung in sound], []
    while left:
        likely = [each for each in left if _screened_drop(each[2]) <= margin] or left
        fastest = max(speedup for speedup, _, _ in likely)
        as_fast = [each for each in likely if each[0] >= fastest * (1 - SPEED_TOLERANCE)]
        best = max(as_fast, key=lambda each: _closeness(each[2]))
        left.remove(best)
        order.append(best[1:])
    return order


def failed_rung(candidate: Candidate, error: RobxError) -> Rung:
    """The rung of a candidate that could not be built or run."""
    return Rung(
        name=candidate.name,
        settings=candidate.settings(),
        precision=candidate.precision,
        accuracy="FAIL",
        speed="INCONCLUSIVE",
        values={},
        reason=f"could not be made or run: {error}",
    )


@dataclass
class _Search:
    """What a climb has tried, and what it has learnt from it."""

    look: Callable[[Candidate], Rung]
    hold: Callable[[Candidate, Rung, float], Rung]
    on_rung: Callable[[Rung], None] | None
    race: Callable[[Sequence[tuple[Candidate, Rung]]], Sequence[Rung]] | None
    margin: float
    deadline: float | None
    clock: Callable[[], float]
    tried: list[tuple[Candidate, Rung]] = field(default_factory=list)
    slow: set[Candidate] = field(default_factory=set)  # families whose further rungs would be slower still
    held: int = 0

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """In the order tried."""
        return tuple(rung for _, rung in self.tried)

    def is_late(self) -> bool:
        """Whether the budget is spent."""
        return self.deadline is not None and self.clock() > self.deadline

    def look_at(self, pending: Sequence[Candidate]) -> list[Candidate]:
        """Look at all but careful ones that cannot be faster than one that looks sound; those, in order."""
        left_out: list[Candidate] = []
        for candidate in pending:
            if candidate.family in self.slow:
                continue
            if candidate.careful and any(_is_sound(r) and candidate.keeps_no_less_float_than(c) for c, r in self.tried):
                left_out.append(candidate)
                continue
            if self.tried and self.is_late():
                break
            rung = self._try(candidate, partial(self.look, candidate))
            self.tried.append((candidate, rung))
            if _is_hopeless(rung) or (rung.accuracy != "FAIL" and not _is_fast(rung)):
                self.slow.add(candidate.family)  # its careful rungs leave more in float: slower still
        return left_out

    def hold_best(self) -> Candidate | None:
        """Hold the sound candidates to the judging images, the best first, until one passes; that one."""
        sound = [pair for pair in self.tried if _is_sound(pair[1])]
        if self.race is not None and len(sound) > 1:
            raced = dict(zip((candidate for candidate, _ in sound), self.race(sound), strict=True))
            self.tried = [(candidate, raced.get(candidate, rung)) for candidate, rung in self.tried]
            sound = [pair for pair in self.tried if _is_sound(pair[1])]
        for candidate, rung in preference(sound, margin=self.margin):
            self.held += 1
            judged = self._try(candidate, partial(self.hold, candidate, rung, level_of(self.held)))
            judged = replace(judged, kept=ships(judged))
            self.tried = [(c, judged if c is candidate else r) for c, r in self.tried]
            if judged.kept:
                return candidate
        return None

    def closest(self, *, quick: bool = False) -> Candidate | None:
        """The candidate that came closest to fp32; None when none ran. `quick`: of those that are not too slow."""
        ran = [(c, r) for c, r in self.tried if "cosine_mean" in r.values and not (quick and c.family in self.slow)]
        return max(ran, key=lambda pair: _closeness(pair[1]))[0] if ran else None

    def _try(self, candidate: Candidate, attempt: Callable[[], Rung]) -> Rung:
        try:
            rung = attempt()
        except MissingExtra:
            raise
        except RobxError as error:
            rung = failed_rung(candidate, error)
        if self.on_rung:
            self.on_rung(rung)
        return rung


def _is_sound(rung: Rung) -> bool:
    """Looked at and good enough to be held to the judging images."""
    return not rung.was_judged and rung.accuracy != "FAIL" and _is_fast(rung)


def _is_fast(rung: Rung) -> bool:
    return rung.speed == "PASS" or "speedup_fp32" not in rung.values


def _is_hopeless(rung: Rung) -> bool:
    highs = [v.high for name, v in rung.values.items() if name.startswith("speedup_") and v.high is not None]
    return rung.speed == "FAIL" and bool(highs) and min(highs) < HOPELESS


def _speedup(candidate: Candidate, among: Sequence[tuple[Candidate, Rung]]) -> float:
    """Against fp32, the median of its form; 1 where it was not measured."""
    rungs = [rung for other, rung in among if other.form == candidate.form]
    return median(r.values["speedup_fp32"].value if "speedup_fp32" in r.values else 1.0 for r in rungs)


def _screened_drop(rung: Rung) -> float:
    """Points of the frozen probe on the screening images; 0 where they have no labels."""
    return rung.values["probe_drop"].value if "probe_drop" in rung.values else 0.0


def _closeness(rung: Rung) -> float:
    """The mean centred cosine on the screening images, which a rung keeps when it is held."""
    return rung.values.get("screen_cosine", rung.values["cosine_mean"]).value
