"""One export at work: what its candidates share, and how one of them becomes a folder that a runtime opens."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import shutil
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch

from robx import __version__
from robx.errors import ArtifactError, InputError
from robx.export import quantize_nncf, quantize_onnxruntime, quantize_trt, ranges, sensitivity, to_onnx
from robx.export.bias import correct_biases
from robx.export.builders import draft, write_model
from robx.export.calibration import Images, Splits
from robx.export.candidate import Candidate
from robx.export.equalize import equalize
from robx.export.graph_facts import GraphFacts, read_facts
from robx.export.half import to_half
from robx.export.request import ExportRequest
from robx.files import sha256_bytes, write_bytes
from robx.onnx_safety import load_checked
from robx.progress import Progress, silent
from robx.records import save_bundle
from robx.trunk import embed

_BATCH = 32
_SENSITIVITY_IMAGES = 64
_BIAS_IMAGES = 64


class Workshop:
    """The float models, the images and the candidates of one export; what it writes into `scratch` is unfinished."""

    def __init__(
        self,
        request: ExportRequest,
        model: to_onnx.ExportModel,
        float_onnx: Path,
        *,
        splits: Splits | None,
        scratch: Path,
        cache: Path,
        progress: Progress = silent,
    ) -> None:
        self.request, self.model, self.float_onnx = request, model, float_onnx
        self.splits, self.progress = splits, progress
        self.scratch, self.cache = scratch, cache
        self.folders: dict[str, Path] = {}  # candidate name -> the folder of its bundle

    # What is read or computed once -----------------------------------------------------------------------------------

    @property
    def images(self) -> Splits:
        """The real images of this export.

        Raises:
            InputError: it was given none.
        """
        if self.splits is None:
            raise InputError("this export has to be judged on real images: give --data")
        return self.splits

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
        images = self.images.calibration
        if self.request.target.uint8_input:
            return images.pixels
        return images.normalised(self.request.student.preprocessing)

    @cached_property
    def histograms(self) -> dict[str, ranges.Histogram]:
        """Of every activation of the float32 model, over the calibration images."""
        pieces = [self.calibration[i : i + 16] for i in range(0, len(self.calibration), 16)]
        if self.request.target.batch is not None:
            pieces = _whole(self.calibration, self.request.target.batch)
        self.progress(0, 1, "measuring activation ranges")
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

    def embeddings(self, images: Images, note: str) -> np.ndarray:
        """The student's embeddings (N, D) in fp32, kept in the cache for the next export.

        By the float32 ONNX model, which is a few times as fast as PyTorch and is held against it on the first images.
        """
        student = self.request.student
        key = sha256_bytes(f"{student.sha256} {images.fingerprint} {self.float_onnx.stem}".encode())[:24]
        path = self.cache / f"{key}.npy"
        if path.is_file():
            with contextlib.suppress(ValueError, OSError):
                stored: np.ndarray = np.load(path, allow_pickle=False)
                if stored.shape == (len(images), student.width):
                    return stored
        self.progress(0, 1, note)
        pixels = images.normalised(student.preprocessing)
        features = sensitivity.simulate(self.proto, self.as_model_input(pixels), batch=_BATCH, literal=False)
        expected = embed(self.model.trunk, torch.from_numpy(pixels[:16])).numpy()
        to_onnx.parity(expected, features[:16], precision="fp32", what="the float32 ONNX model")
        buffer = io.BytesIO()
        np.save(buffer, features)
        write_bytes(path, buffer.getvalue())
        return features

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
        images = self.calibration if request.precision == "int8" else None
        built = write_model(self.model, source, request, folder, images=images, candidate=candidate)
        source.unlink()
        versions = {"robx": __version__, **built.versions}
        if candidate.quantiser == "nncf":
            versions["nncf"] = importlib.metadata.version("nncf")
        save_bundle(draft(request, built, folder, versions=versions), folder)

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

    def as_model_input(self, images: np.ndarray) -> np.ndarray:
        """Normalised images (N, 3, H, W) as the model takes them: themselves, or the uint8 pixels again."""
        if not self.request.target.uint8_input:
            return images
        pre = self.request.student.preprocessing
        mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (pre.mean, pre.std))
        return np.clip(np.round((images * std + mean) * 255), 0, 255).astype(np.uint8)


def _whole(images: np.ndarray, batch: int) -> list[np.ndarray]:
    """Pieces of exactly `batch` images; the last one is filled with the first images."""
    missing = -len(images) % batch
    full = np.concatenate([images, images[np.arange(missing) % len(images)]]) if missing else images
    return [full[i : i + batch] for i in range(0, len(full), batch)]
