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
from robx.errors import InputError
from robx.export.formats import to_onnx
from robx.export.formats.half import to_half
from robx.export.formats.write import draft, write_model
from robx.export.image_splits import Images, Splits, normalise, whole_batches
from robx.export.int8 import by_nncf, by_onnxruntime, for_tensorrt, ranges, sensitivity
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import GraphFacts, read_facts
from robx.export.onnx_run import run_model
from robx.export.request import ExportRequest
from robx.progress import Progress, silent
from robx.records import save_bundle
from robx.store.files import sha256_bytes, write_bytes
from robx.store.onnx_safety import load_checked
from robx.trunk import embed

_BATCH = 32
_RANGE_BATCH = 4  # every activation of these images is in memory at once
_SENSITIVITY_IMAGES = 64


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
        self.sources: dict[str, Path] = {}  # candidate name -> the ONNX that its builder started from

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
        return self.as_input(self.images.calibration.pixels)

    @cached_property
    def histograms(self) -> dict[str, ranges.Histogram]:
        """Of every activation of the float32 model, over the calibration images."""
        self.progress(0, 1, "measuring activation ranges")
        batch = self.request.target.batch or _RANGE_BATCH
        return ranges.collect(self.proto, whole_batches(self.calibration, batch), input_name=to_onnx.PIXELS)

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
            with contextlib.suppress(ValueError, OSError, EOFError):
                stored: np.ndarray = np.load(path, allow_pickle=False)
                if stored.shape == (len(images), student.width):
                    return stored
        self.progress(0, 1, note)
        features = self.simulate(self.proto, images, literal=False)
        first = images.normalised(student.preprocessing, slice(16))
        expected = embed(self.model.trunk, torch.from_numpy(first)).numpy()
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
            self.folders[candidate.name], self.sources[candidate.name] = folder, _source_of(folder)
        return self.folders[candidate.name]

    def _write(self, candidate: Candidate, folder: Path) -> None:
        target = dataclasses.replace(self.request.target, precision=candidate.precision)
        request = dataclasses.replace(self.request, target=target)
        if candidate.precision == "int8":
            # The head is a small part of the time, and its logits are what nobody judges: they follow the embedding.
            candidate = dataclasses.replace(candidate, float_nodes=(*candidate.float_nodes, *self.facts.head))
        source = _source_of(folder)
        write_bytes(source, self.onnx_for(candidate).SerializeToString())
        images = self.calibration if request.precision == "int8" else None
        built = write_model(self.model, source, request, folder, images=images, candidate=candidate)
        versions = {"robx": __version__, **built.versions}
        if candidate.quantiser == "nncf":
            versions["nncf"] = importlib.metadata.version("nncf")
        save_bundle(draft(request, built, folder, versions=versions), folder)

    def graph_of(self, candidate: Candidate) -> onnx.ModelProto:
        """The ONNX that a candidate's builder was given, which is what ships as ``.onnx`` or ``.ort``."""
        self.make(candidate)
        return load_checked(self.sources[candidate.name])

    def onnx_for(self, candidate: Candidate) -> onnx.ModelProto:
        """The ONNX that the candidate's builder starts from, in the candidate's precision where the format reads it."""
        carried = self.request.target.format in ("onnx", "ort", "trt")
        if candidate.precision == "fp32" or not carried:
            return self.proto
        model = to_half(self.proto) if candidate.precision == "fp16" else self._quantise(candidate)
        to_onnx.finish(model, self.request.student, opset=self.request.target.opset)
        return model

    def _quantise(self, candidate: Candidate) -> onnx.ModelProto:
        is_trt = self.request.target.format == "trt"
        if candidate.quantiser == "nncf":
            quantised = by_nncf.quantize_onnx(self.proto, self.calibration, candidate)
            quantised = for_tensorrt.from_uint8(quantised) if is_trt else quantised
        else:
            chosen = ranges.choose(
                self.histograms, candidate.ranges, percentile=candidate.percentile, symmetric=candidate.signed
            )
            quantize = for_tensorrt.quantize if candidate.quantiser == "tensorrt" else by_onnxruntime.quantize
            quantised = quantize(self.proto, chosen, candidate)
        # What is not int8 runs in fp16 on a GPU: types are fixed in the file, and float32 would make it the slowest.
        return to_half(quantised) if is_trt else quantised

    def as_input(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pixels (n, 3, H, W) as the model takes them: normalised, or themselves."""
        if self.request.target.uint8_input:
            return pixels
        return normalise(pixels, self.request.student.preprocessing)

    def simulate(self, model: onnx.ModelProto, images: Images, *, literal: bool = True) -> np.ndarray:
        """The embeddings (N, D) of `images` by an ONNX model on this CPU; see `run_model`."""
        return run_model(model, images.pixels, batch=_BATCH, literal=literal, prepare=self.as_input)


def _source_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.onnx")
