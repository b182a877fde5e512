"""What `robx eval` was asked for, and the records that it gives."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robx.errors import InputError
from robx.eval.datasets.features import BATCH, model_id, model_name
from robx.eval.datasets.splits import Split
from robx.images.sources import data_info
from robx.records import Accuracy, Json, Measurement, Value, to_json, utc_now
from robx.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which protocols, on which images, and how."""

    data: Path | None  # training images (and the test images, where it has both splits)
    test: Path | None = None
    knn: bool = True
    linear: bool = False
    lowshot: tuple[str, ...] = ()
    lowshot_splits: Path | None = None
    transfers: tuple[tuple[str, Path], ...] = ()
    fidelity: bool = False
    reference: Path | None = None
    margin: float = 1.0  # points
    cached: bool = False  # heads on features extracted once, for a Student too
    save_head: Path | None = None  # where a linear head on the embedding goes
    threads: int = 1
    batch: int = BATCH
    cache: Path | None = None

    @property
    def needs_data(self) -> bool:
        """Whether anything is judged on `data`; else only transfers are."""
        return bool(self.knn or self.linear or self.lowshot or self.fidelity or self.save_head)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One record and the folder of the model that it belongs to."""

    folder: Path
    record: Measurement


def parse_transfers(names: Sequence[str], data: Path | None) -> tuple[tuple[str, Path], ...]:
    """(("cifar10", Path("/data/cifar")), ...) of "cifar10=/data/cifar"; a bare name is in `data`.

    Raises:
        InputError: an unknown name, or none of the two places.
    """
    from robx.eval.protocols.transfer import transfer

    found = []
    for text in names:
        name, _, root = text.partition("=")
        transfer(name)
        if not root and data is None:
            raise InputError(f"--transfer {name} has no folder: give --transfer {name}=DIR")
        found.append((name, Path(root) if root else data))
    return tuple((name, root) for name, root in found if root is not None)


def accuracy_record(
    session: Session, protocol: str, split: Split, values: dict[str, Value], settings: dict[str, Json]
) -> Accuracy:
    """The record of one protocol's figures for one model, made now."""
    return Accuracy(
        model_id=model_id(session.bundle),
        model_name=model_name(session.bundle),
        protocol=protocol,
        device=device_facts(session),
        settings=settings | {"classes": split.classes} | data_facts(split),
        data=data_info(split.test),
        values=values,
        started=utc_now(),
    )


def data_facts(split: Split) -> dict[str, Json]:
    """The training images of a figure, and how many of its test images they repeat."""
    return {"bank": to_json(data_info(split.bank)), "look_alikes": to_json(split.shared)}


def device_facts(session: Session) -> dict[str, Json]:
    """What the figures were computed on; the latency stage describes a machine in full."""
    return {"arch": platform.machine(), "os": platform.system(), **session.facts()}
