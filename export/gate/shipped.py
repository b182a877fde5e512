"""The last check of a float model, in the file and shapes that ship: against PyTorch, and alone against in a batch."""

from __future__ import annotations

from functools import partial

import numpy as np

from robx.embeddings import cosine, refuse_constant
from robx.errors import ArtifactError
from robx.export.gate.half import in_half_arithmetic
from robx.export.gate.sessions import open_candidate
from robx.export.image_splits import normalise
from robx.export.int8.candidate import Candidate
from robx.export.make import CandidateBuilder
from robx.export.onnx_run import run_model
from robx.export.parity import parity
from robx.formats import FORMATS
from robx.records import Value
from robx.runtime.session import run_within


def check_shipped(
    builder: CandidateBuilder, candidate: Candidate, *, judged: bool = False
) -> tuple[dict[str, Value], str | None]:
    """Compare a built candidate with PyTorch on a few images, in its shipped shapes; or why it cannot be run here.

    With `judged`, the gate has decided already: the difference from PyTorch is recorded and does not decide again.

    Raises:
        ArtifactError: it differs from PyTorch, or its answer depends on the batch.
    """
    request = builder.request
    if builder.splits is not None:
        pixels = builder.images.judging.pixels[:16]
    else:
        pixels = _smooth_pixels(8, request.image_shape)
    images = normalise(pixels, request.host_preprocessing)
    expected = builder.reference(normalise(pixels, request.student.preprocessing))
    refuse_constant(expected, request.student.timm_name)
    what = f"the {request.target.format} model in {candidate.precision}"
    compare = partial(parity, expected, precision=candidate.precision, what=what, refuse=not judged)
    session = open_candidate(builder.make(candidate))
    if isinstance(session, str):
        if not FORMATS[request.target.format].onnx_precision:
            return {}, session
        graph = builder.graph_of(candidate)
        graph = in_half_arithmetic(graph) if candidate.precision == "fp16" else graph
        return compare(run_model(graph, builder.as_input(pixels))), session
    with session:
        together = run_within(session, images)
        alone = np.concatenate([session.run(images[i : i + 1]) for i in range(len(images))])
    return compare(together) | check_batches(together, alone, what=what), None


def check_batches(together: np.ndarray, alone: np.ndarray, *, what: str) -> dict[str, Value]:
    """Refuse a model whose answer for an image depends on the batch that the image is in; (N, D) each.

    Raises:
        ArtifactError: a cosine below .999 between the two answers for one image.
    """
    least = float(cosine(together, alone).min())
    has_direction = together.any(axis=1).all() and alone.any(axis=1).all()  # a row of zeros has none
    if np.isfinite(together).all() and has_direction and not least >= 0.999:
        raise ArtifactError(f"{what} answers differently for one image alone than in a batch (cosine {least:.4f})")
    return {"batch_cosine_min": Value(value=least, n=len(together))}


def _smooth_pixels(count: int, shape: tuple[int, int]) -> np.ndarray:
    """Smooth coloured gradients, uint8 (count, 3, H, W), to check that two engines compute the same function."""
    random = np.random.default_rng(0)
    corners = random.normal(size=(count, 3, 2, 2)).astype(np.float32)
    rows, columns = (
        np.stack([1 - grid, grid]) for grid in (np.linspace(0, 1, side, dtype=np.float32) for side in shape)
    )
    fields = np.einsum("ncij,ih,jw->nchw", corners, rows, columns)
    pixels: np.ndarray = np.clip(127.5 + 64 * fields, 0, 255).astype(np.uint8)
    return pixels
