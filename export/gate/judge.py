"""How a candidate is judged: its answers on held-out images, and its speed, beside the student and the float models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robx.embeddings import cosine, refuse_constant
from robx.errors import ArtifactError, DeviceError, InputError, MissingExtra, RobxError
from robx.export.formats import to_onnx
from robx.export.gate import gate
from robx.export.gate.search import failed_rung, level_of
from robx.export.image_splits import MIN_JUDGING, Images, normalise
from robx.export.int8.candidate import Candidate
from robx.export.make import Workshop
from robx.export.onnx_run import run_model
from robx.images.sources import class_numbers, renumbered
from robx.records import Precision, Rung, Value, Verdict
from robx.trunk import embed

# One in four sound candidates may be screened out; to let all through would spend the judging images on hopeless ones.
SCREEN_LEVEL = 0.25
_BATCH = 32
_TIMED_IMAGES = 16
_TIMED_BATCH = 1  # as `robx bench` opens a model: OpenVINO runs what it planned for one image faster
Blocks = Mapping[str, list[np.ndarray]]  # name -> latencies in ns, a block each
_KEPT = ("latency", "bytes", "screen_cosine")  # of a look, beside the speed-ups


class Judge:
    """The references that the candidates of one workshop are held against, computed once, and the verdicts."""

    def __init__(self, workshop: Workshop, limits: gate.Limits) -> None:
        self.workshop, self.limits = workshop, limits
        self._sessions: dict[str, Any] = {}
        self._said: dict[str, str] = {}  # candidate name -> what its timing showed

    def first_images(self, count: int) -> np.ndarray:
        """The first `count` judging images, float32 (count, 3, H, W), as a Session takes them."""
        return self.workshop.images.judging.normalised(self.workshop.request.student.preprocessing, slice(count))

    @cached_property
    def reference(self) -> np.ndarray:
        """The fp32 student's embeddings of the judging images."""
        found = self.workshop.embeddings(self.workshop.images.judging, "the student's own embeddings")
        refuse_constant(found, self.workshop.request.student.timm_name)
        return found

    @cached_property
    def bank(self) -> object | None:
        """The fp32 student's labelled training features and the probe trained on them; None without labels."""
        bank = self.workshop.images.bank
        if bank.classes is None or len(bank.classes) < 2 or (bank.labels >= 0).sum() < 2:
            return None
        if not (self._labels_of(self.workshop.images.judging) >= 0).any():
            return None
        features = self.workshop.embeddings(bank, "the bank's embeddings")
        return gate.make_bank(features, bank.labels, classes=len(bank.classes))

    @cached_property
    def screening(self) -> Images:
        """The images that say which candidate is held to the judging images.

        The calibration images for want of enough, or of labels where there is a probe: they flatter every candidate
        alike, which is good enough for a choice.
        """
        images = self.workshop.images
        labelled = self.bank is None or (images.screening.labels >= 0).any()
        return images.screening if labelled and len(images.screening) >= MIN_JUDGING else images.calibration

    def look(self, candidate: Candidate) -> Rung:
        """Build a candidate, time it against fp32 and fp16, and screen it; its answers for the judging images wait.

        Raises:
            RobxError: it cannot be built, or its runtime fails on it.
        """
        folder = self.workshop.make(candidate)
        expected = self.workshop.embeddings(self.screening, "the student's own embeddings")
        with self._opened(candidate) as session:
            answers, judge = self._answers(candidate, session, self.screening)
            accuracy, values, reason = self._compare(candidate, expected, answers, self.screening, level=SCREEN_LEVEL)
            speed: Verdict = "INCONCLUSIVE"
            said = "speed is measured on the device: robx bench"
            if session is not None and self.workshop.request.target.is_local:
                speed, figures, said = self._time(candidate, folder)
                values |= figures
        values["screened"] = Value(value=float(len(self.screening)))
        values["screen_cosine"] = values["cosine_mean"]
        values["bytes"] = Value(value=float(_model_bytes(folder)), unit="B")
        self._said[candidate.name] = said
        return Rung(
            name=candidate.name,
            settings=candidate.settings(),
            precision=candidate.precision,
            # A PASS is one on the judging images.
            accuracy="FAIL" if accuracy == "FAIL" else "INCONCLUSIVE",
            speed=speed,
            values=values,
            reason=f"screened on {len(self.screening)} training images alone: {reason} (by {judge}); {said}",
        )

    def hold(self, candidate: Candidate, rung: Rung, level: float) -> Rung:
        """The rung with its accuracy on the judging images, tested at `level`.

        Raises:
            RobxError: its runtime fails on them.
        """
        images = self.workshop.images.judging
        with self._opened(candidate) as session:
            answers, judge = self._answers(candidate, session, images)
        accuracy, values, reason = self._compare(candidate, self.reference, answers, images, level=level)
        kept = {k: v for k, v in rung.values.items() if k.startswith("speedup_") or k in _KEPT}
        reason = f"{reason} (judged by {judge}); {self._said.get(candidate.name, '')}"
        return dataclasses.replace(rung, accuracy=accuracy, values=values | kept, reason=reason)

    def race(self, sound: Sequence[tuple[Candidate, Rung]]) -> list[Rung]:
        """The rungs with their speeds measured anew, in one run in which all candidates and the floats take turns."""
        rungs = [rung for _, rung in sound]
        if not self.workshop.request.target.is_local:
            return rungs
        self.workshop.progress(0, 1, f"timing {len(sound)} candidates side by side")
        baselines = self._baselines(sound[0][0])
        with contextlib.ExitStack() as stack:
            sessions = {}
            for candidate, _ in sound:
                session = gate.open_judge(self.workshop.make(candidate), batch=_TIMED_BATCH)
                if isinstance(session, str):  # nothing of it could be timed before either
                    return rungs
                sessions[candidate.name] = stack.enter_context(session)
            blocks = gate.time_interleaved({**sessions, **baselines}, self.first_images(_TIMED_IMAGES), times=2)
        return [self._with_speed(candidate, rung, blocks, baselines) for candidate, rung in sound]

    def _with_speed(self, candidate: Candidate, rung: Rung, blocks: Blocks, baselines: Collection[str]) -> Rung:
        mine = {"candidate": blocks[candidate.name]} | {name: blocks[name] for name in baselines}
        speed, figures, said = gate.judge_speed(mine, self.limits)
        before, self._said[candidate.name] = self._said[candidate.name], said
        reason = rung.reason.removesuffix(before) + said
        return dataclasses.replace(rung, speed=speed, values=rung.values | figures, reason=reason)

    def judge(self, candidate: Candidate) -> Rung:
        """Look at a candidate and hold it to the judging images whatever came out: it is the only one there is.

        A RobxError (but a missing package) is the rung's failure.
        """
        try:
            return self.hold(candidate, self.look(candidate), level_of(1))
        except MissingExtra:
            raise
        except RobxError as error:
            return failed_rung(candidate, error)

    def unseen(self, candidate: Candidate) -> str | None:
        """Why neither this machine nor a graph can say what the candidate answers, as with Core ML; None where one can.

        Raises:
            MissingExtra: what builds it is not installed.
        """
        if self.workshop.request.target.format in ("onnx", "ort", "trt"):
            return None
        try:
            session = gate.open_judge(self.workshop.make(candidate))
        except MissingExtra:
            raise
        except RobxError:  # it cannot be built or opened: its rung says why
            return None
        if isinstance(session, str):
            return session
        session.close()
        return None

    def parity(self, candidate: Candidate, *, judged: bool = False) -> tuple[dict[str, Value], str | None]:
        """The built candidate against PyTorch on real images, in its shipped shape mode; or why it cannot be run here.

        Where the gate has `judged` it already, how far it is from PyTorch is noted and not judged once more.

        Raises:
            ArtifactError: it answers otherwise than PyTorch, or otherwise alone than in a batch.
        """
        request = self.workshop.request
        real = self.workshop.splits is not None
        preprocessing = request.student.preprocessing
        images = self.first_images(16) if real else normalise(_smooth_pixels(8, request.image_size), preprocessing)
        expected = embed(self.workshop.model.trunk, torch.from_numpy(images)).numpy()
        refuse_constant(expected, request.student.timm_name)
        what = f"the {request.target.format} model in {candidate.precision}"
        compare = partial(to_onnx.parity, expected, precision=candidate.precision, what=what, refuse=not judged)
        session = gate.open_judge(self.workshop.make(candidate))
        if isinstance(session, str):
            if request.target.format != "trt":
                return {}, session
            answer = run_model(self.workshop.graph_of(candidate), images)  # its pixels are never uint8
            return compare(answer), session
        with session:
            together = session.run(images)
            alone = np.concatenate([session.run(images[i : i + 1]) for i in range(len(images))])
        return compare(together) | check_batches(together, alone, what=what), None

    def close(self) -> None:
        """Close the baselines' sessions."""
        for session in self._sessions.values():
            session.close()

    @contextlib.contextmanager
    def _opened(self, candidate: Candidate) -> Iterator[Any | None]:
        """The candidate's session; None where its ONNX graph is to be computed literally in its place.

        That is on TensorRT without a GPU, and for another CPU than this: the signed int8 that an ARM multiplies
        exactly would saturate here.

        Raises:
            DeviceError: it cannot be run here, and no graph says what it computes.
        """
        target = self.workshop.request.target
        if target.format in ("onnx", "ort") and not target.is_local:
            yield None
            return
        session = gate.open_judge(self.workshop.make(candidate))
        if isinstance(session, str):
            if target.format != "trt":
                raise DeviceError(session)
            yield None
            return
        with contextlib.closing(session):
            yield session

    def _answers(self, candidate: Candidate, session: Any | None, images: Images) -> tuple[np.ndarray, str]:
        """The candidate's embeddings of `images`, and who computed them."""
        if session is not None:
            return self._run(candidate, session, images), str(session.facts().get("engine", "the runtime"))
        self.workshop.progress(0, 1, f"judging {candidate.name}")
        graph = self.workshop.graph_of(candidate)
        return self.workshop.simulate(graph, images), "the same ONNX graph, computed literally on the CPU"

    def _compare(
        self, candidate: Candidate, expected: np.ndarray, answers: np.ndarray, images: Images, *, level: float
    ) -> gate.Figures:
        return gate.judge_accuracy(
            expected,
            answers,
            labels=self._labels_of(images) if self.bank is not None else None,
            bank=self.bank,
            limits=self.limits,
            level=level,
            precision=candidate.precision,
            class_names=self.workshop.images.bank.classes,
        )

    def _run(self, candidate: Candidate, session: Any, images: Images) -> np.ndarray:
        """Embeddings of `images`.

        Raises:
            ArtifactError: an image alone is answered otherwise than in a batch.
        """
        pieces = []
        note = f"{'judging' if images is self.workshop.images.judging else 'screening'} {candidate.name}"
        for piece in images.batches(self.workshop.request.student.preprocessing, _BATCH):
            pieces.append(session.run(piece))
            self.workshop.progress(min(len(pieces) * _BATCH, len(images)), len(images), note)
        embeddings = np.concatenate(pieces)
        first = images.normalised(self.workshop.request.student.preprocessing, slice(8))
        alone = np.concatenate([session.run(first[i : i + 1]) for i in range(len(first))])
        check_batches(embeddings[: len(first)], alone, what=candidate.name)
        return embeddings

    def _time(self, candidate: Candidate, folder: Path) -> gate.Figures:
        """The candidate's speed; where a first look cannot tell, a longer one joins it."""
        baselines = self._baselines(candidate)
        self.workshop.progress(0, 1, f"timing {candidate.name}")
        images = self.first_images(_TIMED_IMAGES)
        session = gate.open_judge(folder, batch=_TIMED_BATCH)
        if isinstance(session, str):
            raise DeviceError(session)
        with session:
            timed = {"candidate": session, **baselines}
            blocks = gate.time_interleaved(timed, images)
            if gate.judge_speed(blocks, self.limits)[0] == "INCONCLUSIVE" and baselines:
                more = gate.time_interleaved(timed, images, times=3)
                blocks = {name: [*first, *more[name]] for name, first in blocks.items()}
        return gate.judge_speed(blocks, self.limits)

    def _baselines(self, candidate: Candidate) -> dict[str, Any]:
        """The sessions that a candidate is timed against."""
        found = {name: self._baseline(name, candidate) for name in ("fp32", "fp16")}
        return {name: session for name, session in found.items() if session is not None}

    def _baseline(self, name: str, candidate: Candidate) -> Any | None:
        """The session in which plain fp32 or fp16 is timed; None for the candidate itself, or without one."""
        if name == candidate.precision:
            return None
        if name not in self._sessions:
            precision: Precision = "fp32" if name == "fp32" else "fp16"
            try:
                folder = self.workshop.make(Candidate(name=name, precision=precision))
                session = gate.open_judge(folder, batch=_TIMED_BATCH)
            except (InputError, ArtifactError):
                return None
            if isinstance(session, str):
                return None
            self._sessions[name] = session
        return self._sessions[name]

    def _labels_of(self, images: Images) -> np.ndarray:
        """Labels in the bank's numbering, (N,) int64: by the class's name, and -1 for one that the bank has not."""
        classes = self.workshop.images.bank.classes
        if images.classes == classes:
            return images.labels
        if images.classes is None or classes is None:
            return np.full_like(images.labels, -1)
        return renumbered(images.labels, class_numbers(images.classes, classes))


def check_batches(together: np.ndarray, alone: np.ndarray, *, what: str) -> dict[str, Value]:
    """Refuse a model whose answer for an image depends on the batch that it came in.

    Raises:
        ArtifactError: a cosine below .999 between the two.
    """
    least = float(cosine(together, alone).min())
    nothing = not together.any(axis=1).all() or not alone.any(axis=1).all()  # rows of zeros have no direction
    if np.isfinite(together).all() and not nothing and not least >= 0.999:
        raise ArtifactError(f"{what} answers otherwise for one image alone than in a batch (cosine {least:.4f})")
    return {"batch_cosine_min": Value(value=least, n=len(together))}


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def _smooth_pixels(count: int, size: int) -> np.ndarray:
    """Smooth coloured gradients, uint8 (count, 3, size, size), to see that two engines compute the same function.

    Nothing is judged by them.
    """
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, size, dtype=np.float32)
    corners = random.normal(size=(count, 3, 2, 2)).astype(np.float32)
    weights = np.stack([1 - grid, grid])
    fields = np.einsum("ncij,ih,jw->nchw", corners, weights, weights)
    pixels: np.ndarray = np.clip(127.5 + 64 * fields, 0, 255).astype(np.uint8)
    return pixels
