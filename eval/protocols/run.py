"""The protocols that train something on frozen features: low-shot, linear, transfers; each gives its records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from robx.eval.datasets.features import Features, extract
from robx.eval.datasets.layouts import SquareSource, open_dataset
from robx.eval.datasets.splits import Split, make_split
from robx.eval.plan import Plan, Result, accuracy_record
from robx.eval.protocols.linear import LEAST_STEPS, VISSL, linear_cached, linear_streamed, train_cached
from robx.eval.protocols.lowshot import LAMBDA, draw_splits, low_shot, read_splits
from robx.eval.protocols.trained_heads import TOP, head_values
from robx.eval.protocols.transfer import TRANSFERS, Transfer, transfer
from robx.eval.protocols.trunk_outputs import TrunkSession
from robx.images.sources import ImageSource
from robx.linear_head import Head, save_head
from robx.progress import Progress
from robx.records import Accuracy, Json, Student, to_json
from robx.runtime.session import Session


def trained_protocols(
    folder: Path, session: Session, split: Split, features: tuple[Features, Features], plan: Plan,
    progress: Progress | None,
) -> Iterator[Result]:  # fmt: skip
    """Low-shot, linear and a head to keep of one model, given its embeddings of the bank's and the test's images."""
    if plan.lowshot:
        yield from _lowshot(folder, session, split, *features, plan, progress)
    if plan.linear:
        yield Result(
            folder=folder, record=_linear(folder, session, split, plan, "linear", TRANSFERS["folder"], progress)
        )

    if plan.save_head is not None:
        yield Result(folder=folder, record=_keep_head(plan.save_head, session, split, *features, progress))


def _keep_head(
    path: Path, session: Session, split: Split, bank: Features, test: Features, progress: Progress | None
) -> Accuracy:
    """A linear head on the embedding itself, which an exported model can carry; its BatchNorm is folded in."""
    columns = {"embedding": slice(0, bank.features.shape[1])}
    heads, name = train_cached(bank, classes=split.classes, kinds=columns, progress=progress)
    names = split.names or tuple(map(str, range(split.classes)))
    head = Head(*heads.folded(name), names)
    save_head(head, path)
    keep = test.labels >= 0
    scores = test.features[keep] @ head.weight.T + head.bias
    tops = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    values = head_values({name: tops}, test.labels[keep], classes=split.classes, headline=name)
    settings: dict[str, Json] = {"recipe": to_json(VISSL), "features": "embedding, extracted once"}
    settings |= {"least_steps": LEAST_STEPS, "kept": path.name}
    return accuracy_record(session, "linear-cached", split, values, settings)


def _lowshot(
    folder: Path, session: Session, split: Split, bank: Features, test: Features, plan: Plan, progress: Progress | None
) -> Iterator[Result]:
    output = "embedding"
    if isinstance(session.bundle, Student):
        with TrunkSession(folder, output="before_norm", threads=plan.threads) as trunk:
            if (output := trunk.output) != "embedding":
                bank = extract(trunk, split.bank, batch_size=plan.batch, cache=plan.cache, progress=progress)
                test = split.aligned(
                    extract(trunk, split.test, batch_size=plan.batch, cache=plan.cache, progress=progress)
                )
    place = np.full(len(split.bank), -1, np.int64)
    place[bank.indices] = np.arange(len(bank.indices))
    for shot in plan.lowshot:
        if plan.lowshot_splits is None:
            rows = draw_splits(bank.labels, shot)
        else:
            rows = [place[split_] for split_ in read_splits(plan.lowshot_splits, shot, split.bank)]
            rows = [found[found >= 0] for found in rows]  # an unreadable image cannot be trained on
        settings: dict[str, Json] = {
            "lambda": LAMBDA,
            "features": output,
            "splits": "drawn by robx, seed 0" if plan.lowshot_splits is None else "published",
            "images": [len(found) for found in rows],
        }
        values = low_shot(bank, test, rows=rows)
        yield Result(folder=folder, record=accuracy_record(session, f"lowshot:{shot}", split, values, settings))


def transfers(
    folders: Sequence[Path], sessions: dict[Path, Session], plan: Plan, progress: Progress | None
) -> Iterator[Result]:
    """Heads on other data sets, one record a model and data set."""
    for name, root in plan.transfers:
        how = transfer(name)
        pair = open_dataset(name, root)
        for folder in folders:
            session = sessions[folder]
            side = session.bundle.preprocessing.crop
            sources = pair if how.crop else tuple(SquareSource(source, side) for source in pair)
            split = make_split(*sources)
            record = _linear(folder, session, split, plan, f"transfer:{name}", how, progress)
            yield Result(folder=folder, record=record)


def _linear(
    folder: Path, session: Session, split: Split, plan: Plan, protocol: str, how: Transfer, progress: Progress | None
) -> Accuracy:
    """Heads on fresh crops for a Student, on features extracted once for a Bundle or with `plan.cached`."""
    pre = session.bundle.preprocessing
    # A source that is squeezed to the model's square already must not lose its border to a centre crop.
    pre = pre if how.crop else replace(pre, size=pre.crop)

    def embed(model: Session, source: ImageSource) -> Features:
        return extract(model, source, pre, batch_size=plan.batch, cache=plan.cache, progress=progress)

    with contextlib.ExitStack() as stack:
        trunk = None
        if isinstance(session.bundle, Student):
            trunk = stack.enter_context(TrunkSession(folder, output="last4", threads=plan.threads))
        model, kinds = (session, None) if trunk is None else (trunk, trunk.kinds)
        test = split.aligned(embed(model, split.test))
        names = ", ".join(kinds or ("embedding",))
        settings: dict[str, Json] = {"recipe": to_json(how.recipe)}
        if trunk is None or plan.cached:
            settings |= {"features": f"{names}, extracted once", "least_steps": LEAST_STEPS}
            values = linear_cached(
                embed(model, split.bank), test, classes=split.classes, kinds=kinds, recipe=how.recipe,
                progress=progress,
            )  # fmt: skip
            return accuracy_record(session, _cached(protocol), split, values, settings)
        settings |= {"features": f"{names}, of fresh crops each epoch", "random_resized_crop": how.crop}
        values = linear_streamed(
            trunk, split.bank, test, classes=split.classes, recipe=how.recipe, crop=how.crop, progress=progress
        )
        return accuracy_record(session, protocol, split, values, settings)


def _cached(protocol: str) -> str:
    """ "linear" -> "linear-cached", "transfer:cifar10" -> "transfer-cached:cifar10": other protocols, other names."""
    head, colon, tail = protocol.partition(":")
    return f"{head}-cached{colon}{tail}"
