"""Building the candidates of one export: what they share, and how one of them becomes a folder that a runtime opens."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import shutil
import tempfile
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from robx import __version__
from robx.errors import InputError
from robx.export.cache import Cache
from robx.export.formats import to_onnx
from robx.export.formats.builder import Source, build_model, draft_manifest
from robx.export.formats.half import to_half
from robx.export.formats.network import PIXELS, ExportModel
from robx.export.image_splits import Images, Splits, normalise, whole_batches
from robx.export.int8 import by_nncf, by_onnxruntime, for_tensorrt, ranges, sensitivity
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import GraphFacts, read_facts
from robx.export.onnx_run import run_model
from robx.export.parity import parity
from robx.export.request import ExportRequest
from robx.formats import FORMATS
from robx.progress import Progress, silent
from robx.records import save_bundle, to_json
from robx.store.files import sha256_bytes, write_bytes
from robx.store.onnx_safety import check_model, load_checked, walk_graphs
from robx.trunk import embed

_BATCH = 32
_RANGE_BATCH = 4  # every activation of these images is in memory at once
_SENSITIVITY_IMAGES = 64
_REVISION = 2  # increment when the exported network changes: older cached models are then ignored


@dataclasses.dataclass(frozen=True)
class Networks:
    """One student in the forms that an export works with."""

    trunk: nn.Module  # as timm builds it: the reference, never rewritten
    model: ExportModel  # its copy, rewritten for export, with the head
    head_sha256: str | None = None


def _float_key(networks: Networks, request: ExportRequest) -> str:
    """Twenty-four hex digits that change with every setting that changes the float32 ONNX."""
    target = request.target
    key: list[Any] = [_REVISION]
    key += [request.student.sha256, target.batch, target.opset, target.uint8_input, networks.head_sha256, __version__]
    key += [version(name) for name in ("torch", "onnxscript", "onnx")]
    key += [to_json(request.student.preprocessing), request.rewrites]
    return sha256_bytes(repr(key).encode())[:24]


class CandidateBuilder:
    """The float models, the images and the candidates of one export; unfinished files go into `scratch`."""

    def __init__(
        self,
        request: ExportRequest,
        networks: Networks,
        *,
        splits: Splits | None,
        scratch: Path,
        cache: Cache,
        progress: Progress = silent,
    ) -> None:
        self.request, self.networks = request, networks
        self.splits, self.progress = splits, progress
        self.scratch, self.cache = scratch, cache
        self.float_key = _float_key(networks, request)
        self.folders: dict[str, Path] = {}  # candidate name -> the folder of its bundle
        self.sources: dict[str, Path] = {}  # candidate name -> the ONNX that its builder started from
        self.measured_costs: dict[str, float] | None = None  # of `layer_costs`, where they were needed

    # Read or computed once -------------------------------------------------------------------------------------------

    @property
    def images(self) -> Splits:
        """The real images of this export.

        Raises:
            InputError: there are none.
        """
        if self.splits is None:
            raise InputError("this export has to be judged on real images: give --data")
        return self.splits

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The float32 ONNX model, from the cache where it is there and sound."""
        name, request = f"{self.float_key}.onnx", self.request
        stored = self.cache.read(name)
        if stored is not None:
            model: onnx.ModelProto = onnx.load_model_from_string(stored)
            # robx writes no control flow, which could run for ever: such a file is another's.
            if sum(1 for _ in walk_graphs(model)) == 1:
                check_model(model, where=str(self.cache.folder / name))
                return model
        path = self.scratch / "float.onnx"
        model = to_onnx.export_onnx(
            self.networks.model,
            path,
            student=request.student,
            batch=request.target.batch,
            opset=request.target.opset,
        )
        self.cache.write(name, path.read_bytes())
        return model

    @cached_property
    def facts(self) -> GraphFacts:
        """The kind of the network and its weighted layers."""
        return read_facts(self.proto)

    @cached_property
    def calibration(self) -> np.ndarray:
        """The calibration images as the model takes them, (N, 3, H, W)."""
        return self.as_input(self.images.calibration.pixels)

    @cached_property
    def histograms(self) -> dict[str, ranges.Histogram]:
        """Of every activation of the float32 model, over the calibration images."""
        self.progress(0, 1, "measuring activation ranges")
        batch = self.request.target.batch or _RANGE_BATCH
        return ranges.collect(self.proto, whole_batches(self.calibration, batch), input_name=PIXELS)

    def layer_costs(self) -> dict[str, float]:
        """1 - centred cosine of the embedding with one layer quantised, for each layer, the largest first."""
        if self.measured_costs is None:
            self.measured_costs = sensitivity.measure(
                self.proto,
                ranges.choose(self.histograms, "minmax"),
                self.calibration[:_SENSITIVITY_IMAGES],
                self.facts.weighted,
                progress=self.progress,
            )
        return self.measured_costs

    def embeddings(self, images: Images, note: str) -> np.ndarray:
        """The student's fp32 embeddings (N, D), cached for the next export.

        Computed by the float32 ONNX model, several times as fast as PyTorch and compared with it on the first images.
        """
        student = self.request.student
        name = f"{sha256_bytes(f'{images.fingerprint} {self.float_key}'.encode())[:24]}.npy"
        if (stored := self.cache.read(name)) is not None:
            found: np.ndarray = np.load(io.BytesIO(stored), allow_pickle=False)
            return found
        self.progress(0, 1, note)
        features = self.simulate(self.proto, images, literal=False)
        first = images.normalised(student.preprocessing, slice(16))
        parity(self.reference(first), features[:16], precision="fp32", what="the float32 ONNX model")
        buffer = io.BytesIO()
        np.save(buffer, features)
        self.cache.write(name, buffer.getvalue())
        return features

    def reference(self, images: np.ndarray) -> np.ndarray:
        """The embeddings (n, D) of normalised images (n, 3, H, W) by the student in PyTorch, as timm builds it."""
        return embed(self.networks.trunk, torch.from_numpy(images)).numpy()

    # Building --------------------------------------------------------------------------------------------------------

    def make(self, candidate: Candidate) -> Path:
        """Build a candidate as a bundle's folder, not judged yet; once.

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
            self.folders[candidate.name], self.sources[candidate.name] = folder, source_of(folder)
        return self.folders[candidate.name]

    def _write(self, candidate: Candidate, folder: Path) -> None:
        target = dataclasses.replace(self.request.target, precision=candidate.precision)
        request = dataclasses.replace(self.request, target=target)
        if candidate.precision == "int8":
            # The head takes little of the time, and the gate does not judge its logits: it stays in float.
            candidate = dataclasses.replace(candidate, float_nodes=(*candidate.float_nodes, *self.facts.head))
        source = Source(
            model=self.networks.model,
            onnx=source_of(folder),
            calibration=self.calibration if request.precision == "int8" else None,
            candidate=candidate,
            shared=self.scratch,
        )
        write_bytes(source.onnx, self.onnx_for(candidate).SerializeToString())
        built = build_model(source, request, folder)
        versions = {"nncf": importlib.metadata.version("nncf")} if candidate.quantiser == "nncf" else {}
        save_bundle(draft_manifest(request, built, folder, versions=versions), folder)

    def graph_of(self, candidate: Candidate) -> onnx.ModelProto:
        """The ONNX that a candidate's builder started from, which is what ships as ``.onnx`` or ``.ort``."""
        self.make(candidate)
        return load_checked(self.sources[candidate.name])

    def onnx_for(self, candidate: Candidate) -> onnx.ModelProto:
        """The ONNX that the candidate's builder starts from: see ``FormatRow.onnx_precision``."""
        if candidate.precision == "fp32" or not FORMATS[self.request.target.format].onnx_precision:
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
        # The file fixes all types: layers that are not int8 run in fp16 on a GPU, where float32 would be the slowest.
        return to_half(quantised) if is_trt else quantised

    def as_input(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pixels (n, 3, H, W) as the model takes them: normalised, or unchanged with --uint8-input."""
        if self.request.target.uint8_input:
            return pixels
        return normalise(pixels, self.request.student.preprocessing)

    def simulate(self, model: onnx.ModelProto, images: Images, *, literal: bool = True) -> np.ndarray:
        """The embeddings (N, D) of `images` by an ONNX model on this CPU; see `run_model`."""
        return run_model(model, images.pixels, batch=_BATCH, literal=literal, prepare=self.as_input)


def source_of(folder: Path) -> Path:
    """Where `CandidateBuilder.make` keeps the ONNX that it built the candidate in `folder` from."""
    return folder.with_name(f"{folder.name}.onnx")
