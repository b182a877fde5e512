"""Building the candidates of one export: what they share, and how one of them becomes a folder that a runtime opens."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from robx.errors import ArtifactError, InputError, NoSpace, RobxError
from robx.export.cache import Cache
from robx.export.float_network import FloatNetwork
from robx.export.formats import to_onnx
from robx.export.formats.builder import Source, build_model, draft_manifest
from robx.export.formats.half import to_half
from robx.export.formats.network import ExportModel
from robx.export.heal.heal import HealSettings, heal, minutes_needed
from robx.export.image_splits import Images, Splits, normalise
from robx.export.int8 import by_nncf, by_onnxruntime, for_tensorrt, ranges
from robx.export.int8.candidate import Candidate, NotTried
from robx.export.int8.trained_ranges import tensor_ranges
from robx.export.onnx_run import run_model
from robx.export.parity import parity
from robx.export.request import ExportRequest
from robx.formats import FORMATS
from robx.int8_simulation import LayerRange
from robx.progress import Progress, silent
from robx.records import Healing, save_bundle
from robx.store.files import sha256_bytes, write_bytes
from robx.store.onnx_safety import load_checked
from robx.trunk import embed

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Networks:
    """One student in the forms that an export works with."""

    trunk: nn.Module  # as timm builds it: the reference, never rewritten
    model: ExportModel  # its copy, rewritten for export, with the head
    head_sha256: str | None = None


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
        heal_settings: HealSettings | None = None,
        progress: Progress = silent,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.request, self.networks = request, networks
        self.splits, self.heal_settings = splits, heal_settings
        self.progress, self.say = progress, say
        self.scratch, self.cache = scratch, cache
        self.folders: dict[str, Path] = {}  # candidate name -> the folder of its bundle
        self.sources: dict[str, Path] = {}  # candidate name -> the ONNX that its builder started from
        self.healing: Healing | None = None  # set once the weights are healed, with their ranges
        self.healed_ranges: tuple[LayerRange, ...] = ()
        self._not_healed = ""  # why, once healing has failed

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
    def calibration(self) -> np.ndarray:
        """The calibration images as the model takes them, (N, 3, H, W)."""
        return self.as_input(self.images.calibration.pixels)

    @cached_property
    def student(self) -> FloatNetwork:
        """The float32 student itself: what all candidates are compared with, and what most are made from."""
        return self._float_network(self.networks.model, self.request.student.sha256)

    @cached_property
    def healed(self) -> FloatNetwork:
        """The student with healed weights, for int8 alone; the first use trains them.

        Raises:
            InputError: the export does not heal, or there are too few images.
            ArtifactError: the training diverged, or was in vain.
        """
        if self.heal_settings is None:
            raise InputError("this export does not heal its weights: give --heal")
        student = self.request.student
        healed = heal(
            self.networks.model.trunk,
            student,
            self.images,
            self.heal_settings,
            cache=self.cache,
            progress=self.progress,
            say=self.say,
        )
        self.healing, self.healed_ranges = healed.record, healed.ranges
        record = healed.record
        if record.is_in_vain:
            raise ArtifactError(
                f"healing was in vain: the int8 error was {record.loss_before:.4f} and is {record.loss_after:.4f}"
            )
        model = copy.deepcopy(self.networks.model)
        model.trunk = healed.trunk
        return self._float_network(model, healed.sha256)

    def minutes_to_heal(self) -> float:
        """What healing would cost on this machine, from one measured step."""
        self.progress(0, 1, "measuring what healing would cost")
        return minutes_needed(self.networks.model.trunk, self.images, self.request.student.preprocessing)

    def network_of(self, candidate: Candidate) -> FloatNetwork:
        """The float32 network that a candidate is made from.

        Raises:
            NotTried: the weights cannot be healed, or healing was in vain; healing is tried once.
            NoSpace: the disk is full.
        """
        if not candidate.healed:
            return self.student
        if self._not_healed:
            raise NotTried(self._not_healed)
        try:
            return self.healed
        except NoSpace:
            raise
        except RobxError as error:
            self._not_healed = str(error)
            raise NotTried(self._not_healed) from error

    def _float_network(self, model: ExportModel, weights: str) -> FloatNetwork:
        return FloatNetwork(
            model,
            self.request,
            weights=f"{weights} {self.networks.head_sha256}",
            calibration=lambda: self.calibration,
            cache=self.cache,
            scratch=self.scratch,
            progress=self.progress,
        )

    def embeddings(self, images: Images, note: str) -> np.ndarray:
        """The student's fp32 embeddings (N, D), cached for the next export.

        Computed by the float32 ONNX model, several times as fast as PyTorch and compared with it on the first images.
        """
        student = self.request.student
        name = f"{sha256_bytes(f'{images.fingerprint} {self.student.key}'.encode())[:24]}.npy"
        if (stored := self.cache.read(name)) is not None:
            found: np.ndarray = np.load(io.BytesIO(stored), allow_pickle=False)
            return found
        self.progress(0, 1, note)
        features = self.simulate(self.student.proto, images, literal=False)
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
        network = self.network_of(candidate)
        if candidate.precision == "int8":
            # The head takes little of the time, and the gate does not judge its logits: it stays in float.
            candidate = dataclasses.replace(candidate, float_nodes=(*candidate.float_nodes, *network.facts.head))
        source = Source(
            model=network.model,
            onnx=source_of(folder),
            calibration=self.calibration if request.precision == "int8" else None,
            ranges=tensor_ranges(network.proto, self.healed_ranges) if candidate.ranges == "trained" else None,
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
        network = self.network_of(candidate)
        if candidate.precision == "fp32" or not FORMATS[self.request.target.format].onnx_precision:
            return network.proto
        model = to_half(network.proto) if candidate.precision == "fp16" else self._quantise(network, candidate)
        to_onnx.finish(model, self.request.student, opset=self.request.target.opset)
        return model

    def _quantise(self, network: FloatNetwork, candidate: Candidate) -> onnx.ModelProto:
        is_trt = self.request.target.format == "trt"
        if candidate.quantiser == "nncf":
            quantised = by_nncf.quantize_onnx(network.proto, self.calibration, candidate)
            quantised = for_tensorrt.from_uint8(quantised) if is_trt else quantised
        else:
            chosen = ranges.choose(
                network.histograms,
                "percentile" if candidate.ranges == "trained" else candidate.ranges,
                percentile=candidate.percentile,
                symmetric=candidate.signed,
            )
            if candidate.ranges == "trained":
                chosen |= tensor_ranges(network.proto, self.healed_ranges)
            quantize = for_tensorrt.quantize if candidate.quantiser == "tensorrt" else by_onnxruntime.quantize
            quantised = quantize(network.proto, chosen, candidate)
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
