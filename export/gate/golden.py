"""The golden sample of what ships: its answers to a drawn picture, and to the picture after each common mistake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from robx.export.gate.half import in_half_arithmetic
from robx.export.gate.sessions import open_candidate
from robx.export.make import CandidateBuilder, source_of
from robx.export.onnx_run import run_model
from robx.formats import FORMATS
from robx.golden.mistakes import variants
from robx.golden.picture import draw_picture
from robx.golden.sample import GoldenRecord, GoldenSample, model_input
from robx.images.decode import host_input
from robx.records import Bundle
from robx.runtime.session import run_within
from robx.store.onnx_safety import load_checked

if TYPE_CHECKING:
    from robx.runtime.session import Session


def golden_sample(builder: CandidateBuilder, bundle: Bundle, folder: Path) -> GoldenSample:
    """The golden sample of the bundle in `folder`, computed by its own runtime where this machine can run it.

    Elsewhere the candidate's ONNX graph stands in for it, and for formats without one the student in PyTorch.
    """
    image = draw_picture(bundle.student.preprocessing)
    mistaken = list(variants(image, bundle))
    images = [host_input(image, bundle), *(values for _, values in mistaken)]
    session = open_candidate(folder)
    if isinstance(session, str):
        embeddings, answered_by = _stand_in(builder, bundle, folder, np.stack(images))
    else:
        with session:
            embeddings = np.concatenate([run_within(session, values[None]) for values in images])
            answered_by = _engine(session)
    outputs = {"embedding": embeddings.astype(np.float32)}
    if (head := builder.networks.model.head) is not None:
        with torch.inference_mode():
            outputs["logits"] = head(torch.from_numpy(outputs["embedding"])).numpy()
    record = GoldenRecord(answered_by=answered_by, mistakes=tuple(mistake for mistake, _ in mistaken))
    return GoldenSample(record=record, image=image, inputs=model_input(image, bundle), outputs=outputs)


def _engine(session: Session) -> str:
    facts = session.facts()
    return f"{facts.get('engine', 'the runtime')} {facts.get('version', '')}".strip()


def _stand_in(builder: CandidateBuilder, bundle: Bundle, folder: Path, images: np.ndarray) -> tuple[np.ndarray, str]:
    """The embeddings (N, D) of normalised images (N, 3, H, W) without the bundle's runtime, and what computed them."""
    if not FORMATS[bundle.format].onnx_precision:
        return builder.reference(images), "the student in PyTorch"
    graph = load_checked(source_of(folder))
    graph = in_half_arithmetic(graph) if bundle.precision != "fp32" else graph
    return run_model(graph, images), f"{FORMATS[bundle.format].title}'s ONNX graph, computed by ONNX Runtime"
