"""How a candidate is judged: its answers on held-out images, and its speed, beside the student and the float models."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robx.collapse import refuse_constant
from robx.errors import ArtifactError, DeviceError, InputError
from robx.export import gate, sensitivity, to_onnx
from robx.export.candidate import Candidate
from robx.export.workshop import Workshop
from robx.records import Precision, Rung, Value, Verdict
from robx.trunk import embed

_BATCH = 32
_TIMED_IMAGES = 16


class Judge:
    """The references that the candidates of one workshop are held against, computed once, and the verdicts."""

    def __init__(self, workshop: Workshop, limits: gate.Limits) -> None:
        self.workshop, self.limits = workshop, limits
        self._sessions: dict[str, Any] = {}

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
        if bank.classes is None or len(bank.classes) < 2 or (bank.labels >= 0).sum() < 2 or not self._labels_agree():
            return None
        features = self.workshop.embeddings(bank, "the bank's embeddings")
        return gate.make_bank(features, bank.labels, classes=len(bank.classes))

    def judge(self, candidate: Candidate) -> Rung:
        """Build a candidate, run it on the judging images, time it against fp32 and fp16, and say how it did.

        Raises:
            RobxError: it cannot be built, or its runtime fails on it.
        """
        folder = self.workshop.make(candidate)
        self.workshop.progress(0, 1, f"judging {candidate.name}")
        with contextlib.ExitStack() as stack:
            session = self._open(folder)
            if session is not None:
                stack.callback(session.close)
                embeddings, judge = self._run(candidate, session), str(session.facts().get("engine", "the runtime"))
            else:
                embeddings = self.workshop.simulate(self.workshop.graph_of(candidate), self.workshop.images.judging)
                judge = "the same ONNX graph, computed literally on the CPU"
            accuracy, values, reason = gate.judge_accuracy(
                self.reference,
                embeddings,
                labels=self.workshop.images.judging.labels if self.bank is not None else None,
                bank=self.bank,
                limits=self.limits,
                precision=candidate.precision,
                class_names=self.workshop.images.judging.classes,
            )
            values["bytes"] = Value(value=float(_model_bytes(folder)), unit="B")
            speed: Verdict = "INCONCLUSIVE"
            said = "speed is measured on the device: robx bench"
            if session is not None and self.workshop.request.target.is_local:
                speed, figures, said = self._time(candidate, session)
                values |= figures
        return Rung(
            name=candidate.name,
            settings=candidate.settings(),
            precision=candidate.precision,
            accuracy=accuracy,
            speed=speed,
            values=values,
            reason=f"{reason} (judged by {judge}); {said}",
        )

    def parity(self, candidate: Candidate) -> tuple[dict[str, Value], str | None]:
        """The built candidate against PyTorch on real images, in its shipped shape mode; or why it cannot be run here.

        Raises:
            ArtifactError: it answers otherwise than PyTorch, or otherwise alone than in a batch.
        """
        request = self.workshop.request
        images = self.first_images(16) if self.workshop.splits is not None else _smooth_images(8, request.image_size)
        expected = embed(self.workshop.model.trunk, torch.from_numpy(images)).numpy()
        refuse_constant(expected, request.student.timm_name)
        what = f"the {request.target.format} model in {candidate.precision}"
        session = gate.open_judge(self.workshop.make(candidate))
        if isinstance(session, str):
            if request.target.format != "trt":
                return {}, session
            answer = sensitivity.simulate(self.workshop.graph_of(candidate), images)  # its pixels are never uint8
            return to_onnx.parity(expected, answer, precision=candidate.precision, what=what), session
        with session:
            together = session.run(images)
            alone = np.concatenate([session.run(images[i : i + 1]) for i in range(len(images))])
        figures = to_onnx.parity(expected, together, precision=candidate.precision, what=what)
        return figures | check_batches(together, alone, what=what), None

    def close(self) -> None:
        """Close the baselines' sessions."""
        for session in self._sessions.values():
            session.close()

    def _open(self, folder: Path) -> Any | None:
        """The candidate's session; None where its ONNX graph is to be computed literally in its place.

        That is on TensorRT without a GPU, and for another CPU than this: the signed int8 that an ARM multiplies
        exactly would saturate here.

        Raises:
            DeviceError: it cannot be run here, and no graph says what it computes.
        """
        target = self.workshop.request.target
        if target.format in ("onnx", "ort") and not target.is_local:
            return None
        session = gate.open_judge(folder)
        if not isinstance(session, str):
            return session
        if target.format != "trt":
            raise DeviceError(session)
        return None

    def _run(self, candidate: Candidate, session: Any) -> np.ndarray:
        """Embeddings of the judging images.

        Raises:
            ArtifactError: an image alone is answered otherwise than in a batch.
        """
        images, pieces = self.workshop.images.judging, []
        for piece in images.batches(self.workshop.request.student.preprocessing, _BATCH):
            pieces.append(session.run(piece))
            self.workshop.progress(min(len(pieces) * _BATCH, len(images)), len(images), f"judging {candidate.name}")
        embeddings = np.concatenate(pieces)
        first = self.first_images(8)
        alone = np.concatenate([session.run(first[i : i + 1]) for i in range(len(first))])
        check_batches(embeddings[: len(first)], alone, what=candidate.name)
        return embeddings

    def _time(self, candidate: Candidate, session: Any) -> gate.Figures:
        """The candidate's speed; where a first look cannot tell, a longer one joins it."""
        baselines = {name: s for name in ("fp32", "fp16") if (s := self._baseline(name, candidate)) is not None}
        self.workshop.progress(0, 1, f"timing {candidate.name}")
        images = self.first_images(_TIMED_IMAGES)
        blocks = gate.time_interleaved({"candidate": session, **baselines}, images)
        if gate.judge_speed(blocks, self.limits)[0] == "INCONCLUSIVE" and baselines:
            more = gate.time_interleaved({"candidate": session, **baselines}, images, times=3)
            blocks = {name: [*first, *more[name]] for name, first in blocks.items()}
        return gate.judge_speed(blocks, self.limits)

    def _baseline(self, name: str, candidate: Candidate) -> Any | None:
        """The session of plain fp32 or fp16 in the same runtime; None for the candidate itself, or without one."""
        if name == candidate.precision:
            return None
        if name not in self._sessions:
            precision: Precision = "fp32" if name == "fp32" else "fp16"
            try:
                session = gate.open_judge(self.workshop.make(Candidate(name=name, precision=precision)))
            except (InputError, ArtifactError):
                return None
            if isinstance(session, str):
                return None
            self._sessions[name] = session
        return self._sessions[name]

    def _labels_agree(self) -> bool:
        return self.workshop.images.judging.classes == self.workshop.images.bank.classes


def check_batches(together: np.ndarray, alone: np.ndarray, *, what: str) -> dict[str, Value]:
    """Refuse a model whose answer for an image depends on the batch that it came in.

    Raises:
        ArtifactError: a cosine below .999 between the two.
    """
    a, b = together.astype(np.float64), alone.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)).min())
    if np.isfinite(a).all() and norms.min() > 0 and not cosine >= 0.999:
        raise ArtifactError(f"{what} answers otherwise for one image alone than in a batch (cosine {cosine:.4f})")
    return {"batch_cosine_min": Value(value=cosine, n=len(a))}


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def _smooth_images(count: int, size: int) -> np.ndarray:
    """Smooth coloured gradients, only to see that two engines compute the same function; nothing is judged by them."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, size, dtype=np.float32)
    corners = random.normal(size=(count, 3, 2, 2)).astype(np.float32)
    weights = np.stack([1 - grid, grid])
    return np.ascontiguousarray(np.einsum("ncij,ih,jw->nchw", corners, weights, weights), dtype=np.float32)
