"""One export at work: what its rungs share, how a rung becomes a folder that a runtime opens, and how it is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from robx import __version__
from robx.errors import ArtifactError, DeviceError, InputError
from robx.export import gate, quantize_nncf, quantize_onnxruntime, quantize_trt, ranges, sensitivity, to_onnx
from robx.export.bias import correct_biases
from robx.export.calibration import Images, Splits
from robx.export.candidate import Candidate
from robx.export.equalize import equalize
from robx.export.graph_facts import GraphFacts, read_facts
from robx.export.half import to_half
from robx.export.onnx_safety import load_checked
from robx.export.request import BuiltModel, ExportRequest
from robx.files import sha256_bytes, write_bytes
from robx.progress import Progress
from robx.records import Bundle, Precision, Rung, Value, describe_file, save_bundle
from robx.trunk import embed

_BATCH = 32
_TIMED_IMAGES = 16
_SENSITIVITY_IMAGES = 64
_BIAS_IMAGES = 64


class Workshop:
    """The float models, the images and the references of one export; what it writes into `scratch` is unfinished."""

    def __init__(
        self,
        request: ExportRequest,
        model: to_onnx.ExportModel,
        float_onnx: Path,
        *,
        splits: Splits | None,
        limits: gate.Limits,
        scratch: Path,
        cache: Path,
        progress: Progress | None = None,
    ) -> None:
        self.request, self.model, self.float_onnx = request, model, float_onnx
        self.splits, self.limits, self.progress = splits, limits, progress
        self.scratch, self.cache = scratch, cache
        self.folders: dict[str, Path] = {}  # candidate name -> the folder of its bundle
        self._sessions: dict[str, Any] = {}

    # What is read or computed once -----------------------------------------------------------------------------------

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The float32 ONNX model."""
        return load_checked(self.float_onnx)

    @cached_property
    def facts(self) -> GraphFacts:
        """The graph's kind and the layers that quantise badly."""
        return read_facts(self.proto)

    @cached_property
    def calibration(self) -> np.ndarray:
        """The calibration images as the model takes them."""
        images = self._splits.calibration
        return images.pixels if self.request.target.uint8_input else images.normalised(self._preprocessing)

    @cached_property
    def judging(self) -> np.ndarray:
        """The judging images, float32 (M, 3, H, W), as a Session takes them."""
        return self._splits.judging.normalised(self._preprocessing)

    @cached_property
    def reference(self) -> np.ndarray:
        """The fp32 student's embeddings of the judging images."""
        return self._embed(self._splits.judging, "the student's own embeddings")

    @cached_property
    def bank(self) -> object | None:
        """The fp32 student's labelled training features and the probe trained on them; None without labels."""
        bank = self._splits.bank
        if bank.classes is None or len(bank.classes) < 2 or (bank.labels >= 0).sum() < 2 or not self._labels_agree():
            return None
        features = self._embed(bank, "the bank's embeddings")
        return gate.make_bank(features, bank.labels, classes=len(bank.classes))

    @cached_property
    def histograms(self) -> dict[str, ranges.Histogram]:
        """Of every activation of the float32 model, over the calibration images."""
        pieces = [self.calibration[i : i + 16] for i in range(0, len(self.calibration), 16)]
        if self.request.target.batch is not None:
            pieces = _whole(self.calibration, self.request.target.batch)
        self._say(0, 1, "measuring activation ranges")
        return ranges.collect(self.proto, pieces, input_name=to_onnx.PIXELS)

    @cached_property
    def layer_costs(self) -> dict[str, float]:
        """1 - centred cosine with that layer alone quantised; the worst first."""
        return sensitivity.measure(
            self.proto,
            ranges.choose(self.histograms, "minmax"),
            self.calibration[:_SENSITIVITY_IMAGES],
            self.facts.weighted,
            progress=self.progress,
        )

    # Making ----------------------------------------------------------------------------------------------------------

    def make(self, candidate: Candidate) -> Path:
        """Build a candidate as a bundle's folder, not judged yet; made once.

        Raises:
            RobxError: it cannot be built.
        """
        if candidate.name not in self.folders:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            try:
                self._write(candidate, folder)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self.folders[candidate.name] = folder
        return self.folders[candidate.name]

    def _write(self, candidate: Candidate, folder: Path) -> None:
        target = dataclasses.replace(self.request.target, precision=candidate.precision)
        request = dataclasses.replace(self.request, target=target)
        source = self.scratch / f"{folder.name}.onnx"
        write_bytes(source, self.onnx_for(candidate).SerializeToString())
        built = self._build(request, candidate, source, folder)
        source.unlink()
        versions = {"robx": __version__, **built.versions}
        if candidate.quantiser == "nncf":
            versions["nncf"] = importlib.metadata.version("nncf")
        save_bundle(draft(request, built, folder, versions=versions), folder)

    def _build(self, request: ExportRequest, candidate: Candidate, source: Path, folder: Path) -> BuiltModel:
        """The visible match from format to builder."""
        images = None
        if request.precision == "int8":
            images = self.calibration
        match request.target.format:
            case "onnx":
                return to_onnx.build(self.model, source, request, folder, images)
            case "openvino":
                from robx.export import to_openvino

                return to_openvino.build(self.model, source, request, folder, images, candidate)
            case "trt":
                from robx.export import to_tensorrt

                return to_tensorrt.build(self.model, source, request, folder, images)
            case "ort":
                from robx.export import to_ort

                return to_ort.build(self.model, source, request, folder, images)
            case "executorch":
                from robx.export import to_executorch

                return to_executorch.build(self.model, source, request, folder, images)
            case "litert":
                from robx.export import to_litert

                return to_litert.build(self.model, source, request, folder, images)
            case "coreml":
                from robx.export import to_coreml

                return to_coreml.build(self.model, source, request, folder, images)
            case "ncnn":
                from robx.export import to_ncnn

                return to_ncnn.build(self.model, source, request, folder, images)

    def onnx_for(self, candidate: Candidate) -> onnx.ModelProto:
        """The ONNX that the candidate's builder starts from, in the candidate's precision where the format reads it."""
        carried = self.request.target.format in ("onnx", "ort", "trt")
        if candidate.precision == "fp32" or not carried:
            return equalize(self.proto)[0] if candidate.equalize else self.proto
        model = to_half(self.proto) if candidate.precision == "fp16" else self._quantise(candidate)
        to_onnx.finish(model, self.request.student, opset=self.request.target.opset)
        return model

    def _quantise(self, candidate: Candidate) -> onnx.ModelProto:
        source, histograms = self.proto, self.histograms if candidate.quantiser != "nncf" else {}
        if candidate.equalize:
            source, changed = equalize(self.proto)
            if not changed:
                raise ArtifactError("no two convolutions of this network can be equalised")
            pieces = [self.calibration[i : i + 16] for i in range(0, len(self.calibration), 16)]
            if candidate.quantiser != "nncf":
                histograms = ranges.collect(source, pieces, input_name=to_onnx.PIXELS)
        chosen = ranges.choose(histograms, candidate.ranges, percentile=candidate.percentile)
        is_trt = self.request.target.format == "trt"
        if candidate.quantiser == "nncf":
            quantised = quantize_nncf.quantize_onnx(source, self.calibration, candidate)
            quantised = quantize_trt.from_uint8(quantised) if is_trt else quantised
        elif candidate.quantiser == "tensorrt":
            quantised = quantize_trt.quantize(source, chosen, candidate)
        else:
            quantised = quantize_onnxruntime.quantize(source, chosen, candidate)
        if candidate.full_bias and candidate.quantiser != "nncf":
            images = self.calibration[:_BIAS_IMAGES]
            quantised = correct_biases(quantised, source, images, progress=self.progress)
        # What is not int8 runs in fp16 on a GPU: types are fixed in the file, and float32 would make it the slowest.
        return to_half(quantised) if is_trt else quantised

    # Judging ---------------------------------------------------------------------------------------------------------

    def judge(self, candidate: Candidate) -> Rung:
        """Build a candidate, run it on the judging images, time it against fp32 and fp16, and say how it did.

        Raises:
            RobxError: it cannot be built, or its runtime fails on it.
        """
        folder = self.make(candidate)
        self._say(0, 1, f"judging {candidate.name}")
        embeddings, session, judged_by = self._run(candidate, folder)
        accuracy, values, reason = gate.judge_accuracy(
            self.reference,
            embeddings,
            labels=self._splits.judging.labels if self.bank is not None else None,
            bank=self.bank,
            limits=self.limits,
            precision=candidate.precision,
            class_names=self._splits.judging.classes,
        )
        values["bytes"] = Value(value=float(_model_bytes(folder)), unit="B")
        reasons, speed = [f"{reason} (judged by {judged_by})"], "INCONCLUSIVE"
        if session is not None:
            speed, figures, said = self._time(candidate, session)
            values |= figures
            reasons.append(said)
            session.close()
        else:
            reasons.append("speed is measured on the device: robx bench")
        return Rung(
            name=candidate.name,
            settings=candidate.settings(),
            precision=candidate.precision,
            accuracy=accuracy,
            speed=speed,  # type: ignore[arg-type]
            values=values,
            reason="; ".join(reasons),
        )

    def parity(self, candidate: Candidate) -> tuple[dict[str, Value], str | None]:
        """The built candidate against PyTorch on real images, in its shipped shape mode; or why it cannot be run here.

        Raises:
            ArtifactError: it answers otherwise than PyTorch, or otherwise alone than in a batch.
        """
        images = self.judging[:16] if self.splits is not None else _smooth_images(8, self.request.image_size)
        expected = embed(self.model.trunk, torch.from_numpy(images)).numpy()
        what = f"the {self.request.target.format} model in {candidate.precision}"
        session = gate.open_judge(self.make(candidate))
        if isinstance(session, str):
            if self.request.target.format != "trt":
                return {}, session
            inputs = self._as_model_input(images)
            answer = sensitivity.simulate(self.onnx_for(candidate), inputs)
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

    def _run(self, candidate: Candidate, folder: Path) -> tuple[np.ndarray, Any | None, str]:
        """Embeddings of the judging images, the session that gave them, and its name; the session stays open."""
        session = gate.open_judge(folder)
        if isinstance(session, str):
            if self.request.target.format != "trt":
                raise DeviceError(session)
            inputs = self._as_model_input(self.judging)
            answer = sensitivity.simulate(self.onnx_for(candidate), inputs)
            return answer, None, "the same ONNX graph, computed literally on the CPU"
        pieces = []
        for start in range(0, len(self.judging), _BATCH):
            pieces.append(session.run(self.judging[start : start + _BATCH]))
            self._say(min(start + _BATCH, len(self.judging)), len(self.judging), f"judging {candidate.name}")
        embeddings = np.concatenate(pieces)
        alone = np.concatenate([session.run(self.judging[i : i + 1]) for i in range(8)])
        check_batches(embeddings[:8], alone, what=candidate.name)
        return embeddings, session, str(session.facts().get("engine", "the runtime"))

    def _time(self, candidate: Candidate, session: Any) -> gate.Figures:
        baselines = {name: s for name in ("fp32", "fp16") if (s := self._baseline(name, candidate)) is not None}
        self._say(0, 1, f"timing {candidate.name}")
        blocks = gate.time_interleaved({"candidate": session, **baselines}, self.judging[:_TIMED_IMAGES])
        return gate.judge_speed(blocks, self.limits)

    def _baseline(self, name: str, candidate: Candidate) -> Any | None:
        """The session of plain fp32 or fp16 in the same runtime; None for the candidate itself, or without one."""
        if name == candidate.precision:
            return None
        if name not in self._sessions:
            precision: Precision = "fp32" if name == "fp32" else "fp16"
            try:
                session = gate.open_judge(self.make(Candidate(name=name, precision=precision)))
            except (InputError, ArtifactError):
                return None
            if isinstance(session, str):
                return None
            self._sessions[name] = session
        return self._sessions[name]

    def _embed(self, images: Images, note: str) -> np.ndarray:
        """The student's embeddings (N, D) in fp32, kept in the cache for the next export.

        By the float32 ONNX model, which is a few times as fast as PyTorch and is held against it on the first images.
        """
        key = sha256_bytes(f"{self.request.student.sha256} {images.fingerprint} {self.float_onnx.stem}".encode())[:24]
        path = self.cache / f"{key}.npy"
        if path.is_file():
            with contextlib.suppress(ValueError, OSError):
                stored: np.ndarray = np.load(path, allow_pickle=False)
                if stored.shape == (len(images), self.request.student.width):
                    return stored
        self._say(0, 1, note)
        pixels = images.normalised(self._preprocessing)
        features = sensitivity.simulate(self.proto, self._as_model_input(pixels), batch=_BATCH, literal=False)
        expected = embed(self.model.trunk, torch.from_numpy(pixels[:16])).numpy()
        to_onnx.parity(expected, features[:16], precision="fp32", what="the float32 ONNX model")
        buffer = io.BytesIO()
        np.save(buffer, features)
        write_bytes(path, buffer.getvalue())
        return features

    def _as_model_input(self, images: np.ndarray) -> np.ndarray:
        if not self.request.target.uint8_input:
            return images
        pre = self._preprocessing
        mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (pre.mean, pre.std))
        return np.clip(np.round((images * std + mean) * 255), 0, 255).astype(np.uint8)

    def _labels_agree(self) -> bool:
        return self._splits.judging.classes == self._splits.bank.classes

    @property
    def _splits(self) -> Splits:
        if self.splits is None:
            raise InputError("this export has to be judged on real images: give --data")
        return self.splits

    @property
    def _preprocessing(self) -> Any:
        return self.request.student.preprocessing

    def _say(self, done: int, total: int, note: str) -> None:
        if self.progress:
            self.progress(done, total, note)


def draft(request: ExportRequest, built: BuiltModel, folder: Path, *, versions: dict[str, str]) -> Bundle:
    """The manifest of what a builder wrote into `folder`, before any judgement."""
    return Bundle(
        format=request.target.format,
        precision=request.precision,
        requested=request.precision,
        target=request.target.device,
        runtime=built.runtime,
        inputs=built.inputs,
        outputs=built.outputs,
        preprocessing=request.student.preprocessing,
        student=request.student,
        verdict="NOT_JUDGED",
        reason="; ".join(built.notes),
        rungs=(),
        calibration=None,
        opset=built.opset,
        versions=versions,
        files=tuple(describe_file(folder, file.path, file.role) for file in built.files),
        labels=request.labels,
        robx_version=__version__,
    )


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


def _whole(images: np.ndarray, batch: int) -> list[np.ndarray]:
    """Pieces of exactly `batch` images; the last one is filled with the first images."""
    missing = -len(images) % batch
    full = np.concatenate([images, images[np.arange(missing) % len(images)]]) if missing else images
    return [full[i : i + batch] for i in range(0, len(full), batch)]


def _smooth_images(count: int, size: int) -> np.ndarray:
    """Smooth coloured gradients, only to see that two engines compute the same function; nothing is judged by them."""
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, size, dtype=np.float32)
    corners = random.normal(size=(count, 3, 2, 2)).astype(np.float32)
    weights = np.stack([1 - grid, grid])
    return np.ascontiguousarray(np.einsum("ncij,ih,jw->nchw", corners, weights, weights), dtype=np.float32)
