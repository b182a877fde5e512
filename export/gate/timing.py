"""How fast a candidate is, against plain fp32 and fp16 in the same runtime, on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from robx.errors import ArtifactError, DeviceError, InputError
from robx.export.gate.gate import Judgement, Limits, judge_speed
from robx.export.gate.search import Trial
from robx.export.gate.sessions import open_candidate
from robx.export.int8.candidate import Candidate
from robx.export.make import CandidateBuilder
from robx.records import Json

if TYPE_CHECKING:
    from robx.runtime.bench.interleave import Interleaved
    from robx.runtime.session import Session

_IMAGES = 16
_BATCH = 1  # as in `robx bench`: OpenVINO is faster with the batch size that it compiled for
BLOCK_SECONDS = 0.05
_BLOCKS = 10


class Timer:
    """Times the candidates of one export against its float baselines, whose sessions it keeps open."""

    def __init__(self, builder: CandidateBuilder, limits: Limits) -> None:
        self.builder, self.limits = builder, limits
        self._baselines: dict[str, Session] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._baselines.values():
            session.close()

    @cached_property
    def machine(self) -> dict[str, Json]:
        """This machine's CPU, on whose instructions the speed of int8 depends: arch, model, flags."""
        from robx.runtime.device.describe import describe

        told = describe()
        return {"arch": told["arch"], "model": told["cpu"]["model"], "flags": told["cpu"]["flags"]}

    def time(self, candidate: Candidate) -> Judgement:
        """The candidate's speed; where a first measurement is inconclusive or disturbed, a longer one joins it.

        Raises:
            RobxError: it cannot be built or run here.
        """
        if not self.builder.request.target.is_local:
            return not_timed()
        session = open_candidate(self.builder.make(candidate), batch=_BATCH)
        if isinstance(session, str):
            return not_timed()
        with session:
            sessions = {"candidate": session, **self._open_baselines(candidate)}
            self.builder.progress(0, 1, f"timing {candidate.name}")
            timed = self._interleave(sessions, times=1)
            judged = judge_speed(timed.blocks, self.limits, disturbances=timed.reasons())
            if judged.verdict == "INCONCLUSIVE" and len(sessions) > 1:
                more = self._interleave(sessions, times=3)
                quiet = [each for each in (timed, more) if not each.reasons()] or [timed, more]
                judged = judge_speed(
                    {name: [block for each in quiet for block in each.blocks[name]] for name in sessions},
                    self.limits,
                    disturbances=[reason for each in quiet for reason in each.reasons()],
                )
        return judged

    def race(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials with their speeds measured again, all candidates and baselines taking turns in one run."""
        if not self.builder.request.target.is_local:
            return list(trials)
        self.builder.progress(0, 1, f"timing {len(trials)} candidates side by side")
        baselines = self._open_baselines(trials[0].candidate)
        with contextlib.ExitStack() as stack:
            sessions = {}
            for trial in trials:
                session = open_candidate(self.builder.make(trial.candidate), batch=_BATCH)
                if isinstance(session, str):  # nothing in this runtime was timed before either
                    return list(trials)
                sessions[trial.candidate.name] = stack.enter_context(session)
            timed = self._interleave({**sessions, **baselines}, times=2)
            if timed.reasons():
                timed = self._interleave({**sessions, **baselines}, times=2)
        return [self._with_speed(trial, timed, baselines) for trial in trials]

    def _with_speed(self, trial: Trial, timed: Interleaved, baselines: Collection[str]) -> Trial:
        name = trial.candidate.name
        blocks = {"candidate": timed.blocks[name]} | {other: timed.blocks[other] for other in baselines}
        return with_speed(trial, judge_speed(blocks, self.limits, disturbances=timed.reasons(name, *baselines)))

    def _interleave(self, sessions: Mapping[str, Session], *, times: int) -> Interleaved:
        from robx.runtime.bench.interleave import interleave

        images = self.builder.images.judging.normalised(self.builder.request.host_preprocessing, slice(_IMAGES))
        return interleave(sessions, images, blocks=times * _BLOCKS, seconds=BLOCK_SECONDS, seed=times)

    def _open_baselines(self, candidate: Candidate) -> dict[str, Session]:
        """The float models to compare with, apart from the candidate itself; without those that cannot be made here."""
        names = [name for name in ("fp32", "fp16") if name != candidate.precision]
        for name in names:
            if name not in self._baselines and (session := self._open_baseline(name)) is not None:
                self._baselines[name] = session
        return {name: self._baselines[name] for name in names if name in self._baselines}

    def _open_baseline(self, name: str) -> Session | None:
        plain = Candidate(name=name, precision="fp32" if name == "fp32" else "fp16")
        try:
            session = open_candidate(self.builder.make(plain), batch=_BATCH)
        except (InputError, ArtifactError, DeviceError):
            return None
        return None if isinstance(session, str) else session


def not_timed() -> Judgement:
    """The verdict on speed where this machine is not the target."""
    reasons = ("speed not measured on this machine; measure it on the device with robx bench",)
    return Judgement(verdict="INCONCLUSIVE", values={}, reasons=reasons)


def with_speed(trial: Trial, judged: Judgement) -> Trial:
    """The trial with another judgement of its speed."""
    return dataclasses.replace(
        trial,
        speed=judged.verdict,
        values=trial.values | judged.values,
        speed_reasons=judged.reasons,
        is_fast=judged.is_fast,
    )
