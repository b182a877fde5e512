"""The protocols that train on frozen features: low-shot, linear, transfer, and a head to keep.

Each function evaluates one model and returns an `Outcome`; what becomes of it is the caller's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from robx.eval.datasets.features import Features
from robx.eval.datasets.layouts import whole_images
from robx.eval.datasets.splits import Split, make_split
from robx.eval.protocols.linear import LEAST_STEPS, VISSL, linear_cached, linear_streamed, train_cached
from robx.eval.protocols.lowshot import LAMBDA, draw_splits, low_shot, read_splits
from robx.eval.protocols.outcome import Model, Outcome
from robx.eval.protocols.trained_heads import TOP, head_values
from robx.eval.protocols.transfer import TRANSFERS, Transfer
from robx.eval.protocols.trunk_outputs import TrunkSession
from robx.images.sources import ImageSource
from robx.linear_head import Head, save_head
from robx.records import Json, Student, to_json
from robx.runtime.session import Session


def lowshot(
    model: Model, split: Split, bank: Features, test: Features, *, shots: Sequence[str], folder: Path | None
) -> Iterator[Outcome]:
    """MSN's low-shot accuracy for each size in `shots`, on the split lists in `folder` or on drawn splits.

    `bank` and `test` are the model's embeddings; a ViT student is evaluated on the features before its final norm,
    which are extracted here.
    """
    output = "embedding"
    if isinstance(model.session.bundle, Student):
        with TrunkSession(
            model.folder, output="before_norm", threads=model.threads, device=model.session.facts()["provider"]
        ) as trunk:
            if (output := trunk.output) != "embedding":
                bank = model.extract(trunk, split.bank)
                test = split.aligned(model.extract(trunk, split.test))
    place = np.full(len(split.bank), -1, np.int64)
    place[bank.indices] = np.arange(len(bank.indices))
    for shot in shots:
        if folder is None:
            rows = draw_splits(bank.labels, shot, names=split.names)
        else:
            rows = [place[listed] for listed in read_splits(folder, shot, split.bank)]
            rows = [found[found >= 0] for found in rows]  # unreadable images are left out
        settings: dict[str, Json] = {
            "lambda": LAMBDA,
            "features": output,
            "splits": "drawn by robx, seed 0" if folder is None else "published",
            "images": [len(found) for found in rows],
        }
        yield Outcome(protocol=f"lowshot:{shot}", values=low_shot(bank, test, rows=rows), settings=settings)


def kept_head(model: Model, split: Split, bank: Features, test: Features, *, path: Path) -> Outcome:
    """Train a linear head on the embedding, fold its BatchNorm in, write it to `path`, and evaluate it."""
    columns = {"embedding": slice(0, bank.features.shape[1])}
    heads, name = train_cached(bank, classes=split.classes, kinds=columns, progress=model.progress)
    names = split.names or tuple(map(str, range(split.classes)))
    head = Head(*heads.folded(name), names)
    save_head(head, path)
    keep = test.labels >= 0
    scores = test.features[keep] @ head.weight.T + head.bias
    tops = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    values = head_values({name: tops}, test.labels[keep], classes=split.classes, headline=name)
    settings: dict[str, Json] = {"recipe": to_json(VISSL), "features": "embedding, extracted once"}
    settings |= {"least_steps": LEAST_STEPS, "kept": path.name}
    return Outcome(protocol="linear-cached", values=values, settings=settings)


def linear(
    model: Model, split: Split, *, cached: bool, protocol: str = "linear", how: Transfer = TRANSFERS["folder"]
) -> Outcome:
    """Linear heads: on fresh crops for a student, on features extracted once for a bundle or with `cached`."""
    pre = model.session.bundle.preprocessing
    # A source that is already resized to the model's input must not lose its border to a centre crop.
    pre = pre if how.crop else replace(pre, size=pre.crop)

    def embed(session: Session, source: ImageSource) -> Features:
        return model.extract(session, source, pre)

    with contextlib.ExitStack() as stack:
        trunk = None
        if isinstance(model.session.bundle, Student):
            trunk = stack.enter_context(_trunk(model))
        session, kinds = (model.session, None) if trunk is None else (trunk, trunk.kinds)
        test = split.aligned(embed(session, split.test))
        names = ", ".join(kinds or ("embedding",))
        settings: dict[str, Json] = {"recipe": to_json(how.recipe)}
        if trunk is None or cached:
            settings |= {"features": f"{names}, extracted once", "least_steps": LEAST_STEPS}
            values = linear_cached(
                embed(session, split.bank), test, classes=split.classes, kinds=kinds, recipe=how.recipe,
                progress=model.progress,
            )  # fmt: skip
            return Outcome(protocol=_cached(protocol), values=values, settings=settings)
        settings |= {"features": f"{names}, of fresh crops each epoch", "random_resized_crop": how.crop}
        values = linear_streamed(
            trunk, split.bank, test, classes=split.classes, recipe=how.recipe, crop=how.crop, progress=model.progress
        )
        return Outcome(protocol=protocol, values=values, settings=settings)


def transfer(
    model: Model, name: str, sources: tuple[ImageSource, ImageSource], *, cached: bool
) -> tuple[Split, Outcome]:
    """Linear heads on another data set: its (training, test) `sources`, and the split that was evaluated."""
    how = TRANSFERS[name]
    if not how.crop:
        shape = model.session.bundle.preprocessing.shape
        sources = (whole_images(sources[0], shape), whole_images(sources[1], shape))
    split = make_split(*sources)
    return split, linear(model, split, cached=cached, protocol=f"transfer:{name}", how=how)


def _trunk(model: Model) -> TrunkSession:
    """The student's trunk, for its features of several depths, on the device that its session uses."""
    device = str(model.session.facts()["provider"])
    return TrunkSession(model.folder, output="last4", threads=model.threads, device=device)


def _cached(protocol: str) -> str:
    """ "linear" -> "linear-cached", "transfer:cifar10" -> "transfer-cached:cifar10": another protocol, another name."""
    head, colon, tail = protocol.partition(":")
    return f"{head}-cached{colon}{tail}"
