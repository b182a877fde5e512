"""A network of one export in float32, and what is computed from it once: its ONNX, its layers, its activation ranges.

An export has one of the student itself and, where it heals, one with the healed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from robx import __version__
from robx.export.cache import Cache
from robx.export.formats import to_onnx
from robx.export.formats.network import PIXELS, ExportModel
from robx.export.image_splits import whole_batches
from robx.export.int8 import ranges, sensitivity
from robx.export.int8.graph_facts import GraphFacts, read_facts
from robx.export.request import ExportRequest
from robx.progress import Progress, silent
from robx.records import to_json
from robx.store.files import sha256_bytes
from robx.store.onnx_safety import check_model, walk_graphs

_RANGE_BATCH = 4  # every activation of these images is in memory at once
_SENSITIVITY_IMAGES = 64
_REVISION = 2  # increment when the exported network changes: older cached models are then ignored


class FloatNetwork:
    """One network as it is exported."""

    def __init__(
        self,
        model: ExportModel,
        request: ExportRequest,
        *,
        weights: str,
        calibration: Callable[[], np.ndarray],
        cache: Cache,
        scratch: Path,
        progress: Progress = silent,
    ) -> None:
        """Compute nothing yet.

        Args:
            model: the network, rewritten for export, with its head.
            request: the student and the target.
            weights: changes with every weight of `model`.
            calibration: gives the calibration images as the model takes them, (N, 3, H, W).
            cache: of computed files.
            scratch: for unfinished files.
            progress: called with (done, total, note).
        """
        self.model, self.request, self.calibration = model, request, calibration
        self.cache, self.scratch, self.progress = cache, scratch, progress
        self.key = _key(request, weights)
        self.measured_costs: dict[str, float] | None = None  # of `layer_costs`, where they were needed

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The float32 ONNX model, from the cache where it is there and sound."""
        name = f"{self.key}.onnx"
        stored = self.cache.read(name)
        if stored is not None:
            model: onnx.ModelProto = onnx.load_model_from_string(stored)
            # robx writes no control flow, which could run for ever: such a file is another's.
            if sum(1 for _ in walk_graphs(model)) == 1:
                check_model(model, where=str(self.cache.folder / name))
                return model
        path, target = self.scratch / f"{self.key}.onnx", self.request.target
        model = to_onnx.export_onnx(
            self.model, path, student=self.request.student, batch=target.batch, opset=target.opset
        )
        self.cache.write(name, path.read_bytes())
        return model

    @cached_property
    def facts(self) -> GraphFacts:
        """The kind of the network and its weighted layers."""
        return read_facts(self.proto)

    @cached_property
    def histograms(self) -> dict[str, ranges.Histogram]:
        """Of every activation, over the calibration images."""
        self.progress(0, 1, "measuring activation ranges")
        batches = whole_batches(self.calibration(), self.request.target.batch or _RANGE_BATCH)
        return ranges.collect(self.proto, batches, input_name=PIXELS)

    def layer_costs(self) -> dict[str, float]:
        """1 - centred cosine of the embedding with one layer quantised, for each layer, the largest first."""
        if self.measured_costs is None:
            self.measured_costs = sensitivity.measure(
                self.proto,
                ranges.choose(self.histograms, "minmax"),
                self.calibration()[:_SENSITIVITY_IMAGES],
                self.facts.weighted,
                progress=self.progress,
            )
        return self.measured_costs


def _key(request: ExportRequest, weights: str) -> str:
    """Twenty-four hex digits that change with every setting that changes the float32 ONNX."""
    target = request.target
    key: list[Any] = [_REVISION, weights, target.batch, target.opset, target.uint8_input, __version__]
    key += [version(name) for name in ("torch", "onnxscript", "onnx")]
    key += [to_json(request.student.preprocessing), request.rewrites]
    return sha256_bytes(repr(key).encode())[:24]
