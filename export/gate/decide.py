"""What ships: fp32 when it answers like PyTorch, fp16 and int8 when they pass the gate, the best float model otherwise.

int8 asked for    search -> the winner, else fp16 if accurate and not slower, else fp32
fp16 asked for    fp16 if accurate (it is taken for its size), and faster only where --min-speedup is above 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from robx.errors import counted
from robx.export.gate.judge import Judge
from robx.export.gate.search import Outcome, Steps, Trial, attempt, level_of, search
from robx.export.gate.shipped import check_shipped
from robx.export.gate.timing import Timer, with_speed
from robx.export.heal.heal import USUAL_STEPS
from robx.export.int8.candidate import Candidate
from robx.export.int8.ladder import healed_candidates, ladder, machine_of, sensitive_candidates
from robx.formats import FORMATS
from robx.records import Bundle, Healing, Precision, Value, Verdict, load_bundle

FP32, FP16 = Candidate(name="fp32", precision="fp32"), Candidate(name="fp16", precision="fp16")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One export's judge and timer, and how far its search may go."""

    judge: Judge
    timer: Timer
    most: int | None = None  # int8 candidates to try; None: all
    budget: float | None = None  # seconds after which no further candidate is tried
    force: bool = False  # ship the best candidate although it failed
    told: Callable[[Trial], None] = lambda trial: None  # after every candidate that is looked at or judged

    @property
    def asked(self) -> Precision:
        """The precision asked for."""
        return self.judge.builder.request.precision

    @property
    def takes_for_size(self) -> bool:
        """Whether a candidate only has to be accurate: fp16, unless it is asked to be faster."""
        return self.asked == "fp16" and self.judge.limits.min_speedup <= 1


def decide(given: Decision) -> tuple[Bundle, Path]:
    """Search, judge and choose; the record of what ships, and the scratch folder that holds its files."""
    if given.asked == "fp32":
        return _accept(given, FP32, ())
    if given.asked == "fp16" or given.force:
        chosen = FP16 if given.asked == "fp16" else _ladder(given)[0]
        if (why := given.judge.why_not_run(chosen)) is not None:  # not judged here: the record says so
            return _accept(given, chosen, (), note="" if given.asked == "fp16" else f"forced, and not run here: {why}")
    trials: list[Trial] = []
    if given.asked == "int8":
        outcome = _search(given)
        trials += outcome.trials
        if outcome.winner is not None:
            return _accept(given, outcome.winner, trials, note=_how_chosen(outcome))
        if given.force and outcome.best is not None:
            return _force(given, outcome.best, trials)
    cost = _cost_of_healing(given, trials) if given.asked == "int8" else ""
    if "fp16" not in FORMATS[given.judge.builder.request.target.format].precisions:
        return _accept(given, FP32, trials, note=cost)
    half = _look_and_judge(given, FP16)
    given.told(half)
    good = half.ships or (given.takes_for_size and half.accuracy == "PASS")
    trials.append(dataclasses.replace(half, kept=good))
    if good:
        return _accept(given, FP16, trials, note=cost)
    if given.asked == "fp16" and given.force and "cosine_mean" in half.values:
        return _force(given, FP16, trials)
    return _accept(given, FP32, trials, note=cost)


def _search(given: Decision) -> Outcome:
    builder = given.judge.builder

    def more(best: Candidate, tried: Sequence[Candidate]) -> list[Candidate]:
        if given.most is not None or best.quantiser in ("converter", "none"):
            return []
        return sensitive_candidates(best, list(builder.network_of(best).layer_costs()), tried)

    steps = Steps(
        look=lambda candidate: _look(given, candidate),
        judge=given.judge.judge,
        race=given.timer.race,
        more=more,
        told=given.told,
    )
    plain, budget = _ladder(given), given.budget
    if (healing := builder.heal_settings) is None:
        return search(plain, steps, margin=given.judge.limits.max_drop, budget=budget)
    # Plain ones first: healing starts with the first healed one, and never where all plain ones are too slow.
    budget = None if budget is None else budget + 60 * healing.minutes
    return search([*plain, *healed_candidates(plain)], steps, margin=given.judge.limits.max_drop, budget=budget)


def _cost_of_healing(given: Decision, trials: Sequence[Trial]) -> str:
    """What healing would cost here, where int8 lacks accuracy; or why weights that should be healed were not."""
    builder = given.judge.builder
    if builder.heal_settings is not None:
        why_not = "no int8 candidate is fast enough" if not any(t.is_fast for t in trials) else "the budget was spent"
        return "" if any(t.candidate.healed for t in trials) else f"the weights were not healed: {why_not}"
    inaccurate = [t for t in trials if "cosine_mean" in t.values and t.accuracy != "PASS" and not t.is_promising]
    if not inaccurate:
        return ""
    minutes = builder.minutes_to_heal()
    return (
        f"healing its weights for int8 would take about {max(1, round(minutes))} min here ({USUAL_STEPS} steps): --heal"
    )


def _ladder(given: Decision) -> list[Candidate]:
    target = given.judge.builder.request.target
    return ladder(target.format, given.judge.builder.student.facts, machine_of(target.device))[: given.most]


def _look(given: Decision, candidate: Candidate) -> Trial:
    """Build, screen and time a candidate."""
    trial = given.judge.screen(candidate)
    if trial.values["not_finite"].value > 0:
        return dataclasses.replace(trial, speed_reasons=("not timed",))
    return with_speed(trial, given.timer.time(candidate))


def _look_and_judge(given: Decision, candidate: Candidate) -> Trial:
    """Look at a candidate and judge it whatever the look showed: the only one there is."""
    return attempt(candidate, lambda: given.judge.judge(_look(given, candidate), level_of(1)))


def _how_chosen(outcome: Outcome) -> str:
    """How the winner was chosen, as the best of many flatters itself."""
    if len(outcome.trials) == 1:
        return ""
    order = "the only one judged" if outcome.judged == 1 else f"number {outcome.judged} judged"
    return f"chosen from {len(outcome.trials)} by speed and on other images, and {order} on the judging images"


def _force(given: Decision, candidate: Candidate, trials: Sequence[Trial]) -> tuple[Bundle, Path]:
    """A candidate that did not pass, with its figures on the judging images, marked FORCED."""
    kept = []
    for trial in trials:
        chosen = trial.candidate == candidate
        if chosen and not trial.was_judged:
            trial = attempt(candidate, partial(given.judge.judge, trial, level_of(1)))
        kept.append(dataclasses.replace(trial, kept=chosen))
    return _accept(given, candidate, kept, forced=True)


def _accept(
    given: Decision, candidate: Candidate, trials: Sequence[Trial], *, forced: bool = False, note: str = ""
) -> tuple[Bundle, Path]:
    judge, splits = given.judge, given.judge.builder.splits
    folder = judge.builder.make(candidate)
    bundle = load_bundle(folder)
    verdict, reasons = _verdict(trials, forced=forced, for_size=given.takes_for_size)
    reasons += [note, _healing_not_used(judge.builder.healing, candidate)]
    parity: dict[str, Value] = {}
    if candidate.precision != "int8":
        parity, why_not = check_shipped(judge.builder, candidate, judged=candidate.precision == "fp16" and bool(trials))
        reasons.append(f"not run here: {why_not}" if why_not is not None else "")
        if candidate.precision == "fp32":
            verdict = "PASS" if parity and splits is not None else "NOT_JUDGED"
            reasons.append(_parity_reason(parity, real=splits is not None))
    reasons.append(bundle.reason)
    bundle = dataclasses.replace(
        bundle,
        requested=given.asked,
        verdict=verdict,
        reason="; ".join(reason for reason in reasons if reason),
        rungs=tuple(trial.record() for trial in trials),
        parity=parity,
        chosen_on=given.timer.machine if any("speedup_fp32" in trial.values for trial in trials) else {},
        calibration=splits.record(judge.screening if trials else None) if splits is not None else None,
        healing=judge.builder.healing if candidate.healed else None,
    )
    return bundle, folder


def _healing_not_used(healing: Healing | None, shipped: Candidate) -> str:
    """What became of healed weights that the shipped model is not made from; "" where there are none."""
    if healing is None or shipped.healed:
        return ""
    errors = f"int8 error {healing.loss_before:.4f} before, {healing.loss_after:.4f} after"
    if healing.is_in_vain:
        return f"healing was in vain ({errors}): the student's own weights shipped"
    trained = f"{counted(healing.steps, 'step')} of {counted(healing.batch, 'image')}"
    return f"the weights were healed in {trained} ({errors}), and the student's own shipped"


def _verdict(
    trials: Sequence[Trial], *, forced: bool, for_size: bool
) -> tuple[Verdict | Literal["FORCED", "NOT_JUDGED"], list[str]]:
    """The bundle's verdict and reasons, from the trial that was kept."""
    kept = next((trial for trial in trials if trial.kept), None)
    if kept is None:
        return "NOT_JUDGED", ["no candidate passed: fp32 ships instead"] if trials else []
    reason = kept.record().reason
    if forced:
        return "FORCED", [f"FAILED the gate and was forced: {reason}"]
    # Accurate, but with a speed that could not be measured here, or only on a busy machine: not a full PASS.
    proven = "speedup_fp32" in kept.values and (kept.speed == "PASS" or for_size)
    return ("PASS" if proven else "INCONCLUSIVE"), [reason]


def _parity_reason(parity: dict[str, Value], *, real: bool) -> str:
    if not parity:
        return ""
    images = "held-out images" if real else "generated images (give --data to check on real ones)"
    return f"equal to PyTorch within {parity['max_relative'].value:.1e} of the largest value on {images}"
