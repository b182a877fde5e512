"""How accurate a candidate is: its embeddings of held-out images against the fp32 student's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robx.embeddings import refuse_constant
from robx.errors import DeviceError, MissingExtra, RobxError
from robx.export.gate.gate import Judgement, Limits, judge_accuracy
from robx.export.gate.half import in_half_arithmetic, overflow_line, overflowing_layers
from robx.export.gate.search import Trial
from robx.export.gate.sessions import open_candidate
from robx.export.gate.shipped import check_batches
from robx.export.image_splits import MIN_JUDGING, Images
from robx.export.int8.candidate import Candidate
from robx.export.make import CandidateBuilder
from robx.formats import FORMATS, FormatRow
from robx.images.sources import class_numbers, renumbered
from robx.records import Value
from robx.runtime.session import run_within

if TYPE_CHECKING:
    from robx.eval.fidelity.fidelity import Bank
    from robx.runtime.session import Session

# Screening sets aside what is surely inaccurate: a few hundred images cannot tell more. Those that only look inaccurate
# are judged last, because each candidate that is judged makes the next test stricter.
SCREEN_LEVEL = 0.05
_BATCH = 32
_OVERFLOW_IMAGES = 16
_KEPT = ("latency", "bytes", "screen_cosine")  # figures of the first look that stay when it is judged, with speed-ups


class Judge:
    """Compares the candidates of one export with its fp32 student, whose embeddings are computed once."""

    def __init__(self, builder: CandidateBuilder, limits: Limits) -> None:
        self.builder, self.limits = builder, limits

    @cached_property
    def reference(self) -> np.ndarray:
        """The fp32 student's embeddings of the judging images, (M, D)."""
        found = self.builder.embeddings(self.builder.images.judging, "computing the student's own embeddings")
        refuse_constant(found, self.builder.request.student.timm_name)
        return found

    @cached_property
    def bank(self) -> Bank | None:
        """The fp32 student's features of labelled training images and a probe trained on them; None without labels."""
        from robx.eval.fidelity.fidelity import make_bank

        bank = self.builder.images.bank
        if bank.classes is None or len(bank.classes) < 2 or (bank.labels >= 0).sum() < 2:
            return None
        if not (self._labels_of(self.builder.images.judging) >= 0).any():
            return None
        features = self.builder.embeddings(bank, "computing the bank's embeddings")
        return make_bank(features, bank.labels, classes=len(bank.classes))

    @cached_property
    def overflowing(self) -> list[str]:
        """The layers whose activations are beyond float16; a CPU that computes fp16 models in float32 hides them."""
        few = self.builder.images.judging.pixels[:_OVERFLOW_IMAGES]
        return overflowing_layers(self.builder.student.proto, self.builder.as_input(few))

    @cached_property
    def screening(self) -> Images:
        """The images that decide which candidate is judged.

        The calibration images where there are too few others, or none with a label for the probe: they flatter all
        candidates alike, which is good enough for a choice between them.
        """
        images = self.builder.images
        labelled = self.bank is None or (images.screening.labels >= 0).any()
        return images.screening if labelled and len(images.screening) >= MIN_JUDGING else images.calibration

    def screen(self, candidate: Candidate) -> Trial:
        """Build a candidate and compare it on the screening images; FAIL or, at best, INCONCLUSIVE.

        Raises:
            RobxError: it cannot be built, or its runtime fails on it.
        """
        folder = self.builder.make(candidate)
        expected = self.builder.embeddings(self.screening, "computing the student's own embeddings")
        judged = self._compare(candidate, expected, self.screening, level=SCREEN_LEVEL)
        values = judged.values | {
            "screened": Value(value=float(len(self.screening))),
            "screen_cosine": judged.values["cosine_mean"],
            "bytes": Value(value=float(_model_bytes(folder)), unit="B"),
        }
        first = f"screened on {len(self.screening)} training images only: {judged.reasons[0]}"
        return Trial(
            candidate=candidate,
            accuracy="FAIL" if judged.verdict == "FAIL" else "INCONCLUSIVE",
            speed="INCONCLUSIVE",
            values=values,
            accuracy_reasons=(first, *judged.reasons[1:]),
        )

    def judge(self, trial: Trial, level: float) -> Trial:
        """The trial with its accuracy on the judging images, tested at `level`.

        Raises:
            RobxError: its runtime fails on them.
        """
        judged = self._compare(trial.candidate, self.reference, self.builder.images.judging, level=level)
        values = {k: v for k, v in trial.values.items() if k.startswith("speedup_") or k in _KEPT}
        if "probe_drop" in judged.values:  # a PASS says nothing without the drop that was tolerated
            values["margin"] = Value(value=self.limits.max_drop, unit="%")
        return dataclasses.replace(
            trial, accuracy=judged.verdict, values=judged.values | values, accuracy_reasons=judged.reasons
        )

    def why_not_run(self, candidate: Candidate) -> str | None:
        """Why this machine can neither run a candidate nor compute its ONNX graph instead, as for Core ML; else None.

        Raises:
            MissingExtra: a package that builds it is not installed.
        """
        if self._row.onnx_precision:  # its ONNX graph can be computed instead
            return None
        try:
            session = open_candidate(self.builder.make(candidate))
        except MissingExtra:
            raise
        except RobxError:  # it cannot be built or opened, and its trial says why
            return None
        if isinstance(session, str):
            return session
        session.close()
        return None

    @property
    def _row(self) -> FormatRow:
        return FORMATS[self.builder.request.target.format]

    @contextlib.contextmanager
    def _opened(self, candidate: Candidate) -> Iterator[Session | None]:
        """The candidate's session; None where its ONNX graph is computed literally instead.

        That is for TensorRT without a GPU, and for a CPU of another architecture: signed int8, which is exact on ARM,
        would saturate here.

        Raises:
            DeviceError: it cannot be run here, and there is no ONNX graph to compute instead.
        """
        if self._row.runtimes == ("onnxruntime",) and not self.builder.request.target.is_local:
            yield None
            return
        session = open_candidate(self.builder.make(candidate))
        if isinstance(session, str):
            if not self._row.onnx_precision:
                raise DeviceError(session)
            yield None
            return
        with session:
            yield session

    def _compare(self, candidate: Candidate, expected: np.ndarray, images: Images, *, level: float) -> Judgement:
        """The candidate's embeddings of `images` against `expected`; the first reason names what computed them."""
        answers, engine = self._answers(candidate, images)
        judged = judge_accuracy(
            expected,
            answers,
            labels=self._labels_of(images) if self.bank is not None else None,
            bank=self.bank,
            limits=self.limits,
            level=level,
            precision=candidate.precision,
            class_names=self.builder.images.bank.classes,
        )
        reasons = [f"{judged.reasons[0]} (computed by {engine})", *judged.reasons[1:]]
        values = judged.values
        if self._is_half(candidate) and (self.overflowing or not np.isfinite(answers).all()):
            said = overflow_line(self.overflowing)
            if judged.verdict == "FAIL":
                remedy = "keep fp32" if self._row.name == "trt" else "keep fp32, or try --int8"
                reasons.insert(0, f"overflow, {said}; {remedy}")
            else:  # computed in float32 here, or harmless, as in front of a sigmoid
                reasons.append(f"a device that computes in float16 may overflow, {said}")
            values = values | {"overflowing_layers": Value(value=float(len(self.overflowing)))}
        return dataclasses.replace(judged, values=values, reasons=tuple(reasons))

    def _is_half(self, candidate: Candidate) -> bool:
        """Whether a candidate has float16 in it: TensorRT's int8 has, too."""
        return candidate.precision == "fp16" or (candidate.precision == "int8" and self._row.name == "trt")

    def _answers(self, candidate: Candidate, images: Images) -> tuple[np.ndarray, str]:
        """The candidate's embeddings of `images` (N, D), and what computed them.

        A model with float16 in it is computed literally in float16 arithmetic where its own runtime cannot be opened
        here, and judged so for OpenVINO, whose CPU plugin computes it in float32 and whose GPU and NPU plugins do not.
        """
        with self._opened(candidate) as session:
            if session is not None:
                answers = self._run(candidate, session, images)
                screening = images is not self.builder.images.judging
                if screening or not self._is_half(candidate) or self._row.name != "openvino":
                    return answers, str(session.facts().get("engine", "its runtime"))
        self.builder.progress(0, 1, f"judging {candidate.name}")
        graph = self.builder.graph_of(candidate)
        if self._is_half(candidate):
            answers = self.builder.simulate(in_half_arithmetic(graph), images)
            return answers, "the same ONNX graph in float16 arithmetic, as on a GPU or NPU"
        return self.builder.simulate(graph, images), "the same ONNX graph, computed literally on the CPU"

    def _run(self, candidate: Candidate, session: Session, images: Images) -> np.ndarray:
        """Embeddings of `images`, (N, D).

        Raises:
            ArtifactError: the answer for an image depends on its batch.
        """
        preprocessing, pieces = self.builder.request.host_preprocessing, []
        note = f"{'judging' if images is self.builder.images.judging else 'screening'} {candidate.name}"
        for piece in images.batches(preprocessing, _BATCH):
            pieces.append(run_within(session, piece))
            self.builder.progress(min(len(pieces) * _BATCH, len(images)), len(images), note)
        embeddings = np.concatenate(pieces)
        first = images.normalised(preprocessing, slice(8))
        alone = np.concatenate([session.run(first[i : i + 1]) for i in range(len(first))])
        check_batches(embeddings[: len(first)], alone, what=candidate.name)
        return embeddings

    def _labels_of(self, images: Images) -> np.ndarray:
        """Labels in the bank's numbering, int64 (N,): matched by class name, -1 for a class that the bank lacks."""
        classes = self.builder.images.bank.classes
        if images.classes == classes:
            return images.labels
        if images.classes is None or classes is None:
            return np.full_like(images.labels, -1)
        return renumbered(images.labels, class_numbers(images.classes, classes))


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
