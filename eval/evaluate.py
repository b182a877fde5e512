"""What `robx eval` does: open the models and the images, run the protocols that were asked for, give their records."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import InputError
from robx.eval.features import BATCH, Features, extract, extract_each, model_id, model_name
from robx.eval.fidelity import Comparison, fidelity, make_bank
from robx.eval.knn import HEADLINE_K, TEMPERATURE, knn_accuracy
from robx.eval.verdict import holm
from robx.records import Accuracy, Bundle, Fidelity, Json, Measurement, Student, Value, to_json
from robx.runtime.session import Session, SessionSettings, load_record, open_session
from robx.sources import ImageSource, data_info, open_source

Progress = Callable[[int, int, str], None]


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
    threads: int = 1
    batch: int = BATCH
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One record and the folder of the model that it belongs to."""

    folder: Path
    record: Measurement


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and test images with one numbering of the classes."""

    bank: ImageSource
    test: ImageSource
    classes: int
    names: tuple[str, ...] | None
    renumber: np.ndarray | None  # test label -> bank label, where the two number their classes differently

    def aligned(self, found: Features) -> Features:
        """Test features with the bank's class numbers."""
        if self.renumber is None:
            return found
        labels = np.where(found.labels >= 0, self.renumber[np.maximum(found.labels, 0)], -1)
        return replace(found, labels=labels)


def evaluate(folders: Sequence[Path], plan: Plan, *, progress: Progress | None = None) -> Iterator[Result]:
    """Run `plan` on each model folder; records come as soon as they are known.

    Raises:
        InputError: images or folders that do not serve; the message says which.
        ArtifactError, MissingExtra, DeviceError: a model cannot be opened or run.
    """
    records = {folder: load_record(folder) for folder in folders}
    split = open_split(plan.data, plan.test) if plan.data else None
    if split is None and (plan.knn or plan.linear or plan.lowshot or plan.fidelity):
        raise InputError("no images to judge on: give --data with a folder that has train/ and test/, or add --test")
    references = {f: find_reference(f, r, plan.reference) for f, r in records.items()} if plan.fidelity else {}
    if plan.fidelity and not any(references.values()):
        raise InputError("--fidelity compares bundles with their student, and no bundle was given: add one")
    with contextlib.ExitStack() as stack:
        wanted = dict.fromkeys([*folders, *filter(None, references.values())])
        settings = SessionSettings(threads=plan.threads)
        sessions = {folder: stack.enter_context(_open(folder, settings)) for folder in wanted}
        if split is not None and (plan.knn or plan.lowshot or plan.fidelity or plan.linear):
            bank = _extract_all(sessions, split.bank, plan, progress)
            test = {
                folder: split.aligned(found)
                for folder, found in _extract_all(sessions, split.test, plan, progress).items()
            }
            if plan.knn:
                for folder in folders:
                    yield Result(folder=folder, record=_knn(sessions[folder], split, bank[folder], test[folder]))
            if plan.fidelity:
                yield from _fidelity(sessions, references, split, bank, test, plan)
            yield from _heads(folders, sessions, split, bank, test, plan, progress)
        yield from _transfers(folders, sessions, plan, progress)


def open_split(data: Path, test: Path | None) -> Split:
    """The training images in `data` and the test images in `test`, or in `data` when it has both splits.

    Raises:
        InputError: no such images, no labels, the same images twice, or test classes that the training images lack.
    """
    if test is None:
        try:
            pair = open_source(data, split="train"), open_source(data, split="test")
        except InputError as error:
            raise InputError(f"{error}; or give the judged images with --test") from error
    else:
        pair = open_source(data), _test_part(test)
    return make_split(*pair)


def make_split(bank: ImageSource, test: ImageSource) -> Split:
    """Pair two sources, with the bank's numbering of the classes; see `open_split`."""
    if bank.fingerprint == test.fingerprint:
        raise InputError(f"{bank.name} would be judged on the images it is trained on: give other images with --test")
    if bank.classes is None or test.classes is None:
        bare = bank if bank.classes is None else test
        raise InputError(f"{bare.name} has no labels: give images with one folder a class, or shards with .cls members")
    if bank.classes[: len(test.classes)] == test.classes:
        return Split(bank=bank, test=test, classes=len(bank.classes), names=bank.classes, renumber=None)
    numbers = {name: n for n, name in enumerate(bank.classes)}
    if unknown := [name for name in test.classes if name not in numbers]:
        raise InputError(
            f"{test.name} has the class {unknown[0]!r} and {bank.name} has not: give both the same classes"
        )
    renumber = np.array([numbers[name] for name in test.classes], dtype=np.int64)
    return Split(bank=bank, test=test, classes=len(bank.classes), names=bank.classes, renumber=renumber)


def find_reference(folder: Path, record: Bundle | Student, given: Path | None) -> Path | None:
    """The folder of the fp32 student that a bundle was made from; None for a student, which is its own.

    Raises:
        InputError: it is neither `given` nor the folder above the bundle.
    """
    if isinstance(record, Student):
        return None
    for place in (given, folder.resolve().parent):
        if place is None or not (place / "student.json").is_file():
            continue
        found = load_record(place)
        if isinstance(found, Student) and found.sha256 == record.student.sha256:
            return place
    raise InputError(f"{folder}'s student is not in the folder above: give its folder with --reference")


def _test_part(path: Path) -> ImageSource:
    try:
        return open_source(path, split="test")
    except InputError:
        return open_source(path)


def _open(folder: Path, settings: SessionSettings) -> Session:
    return open_session(folder, settings)


def _extract_all(
    sessions: dict[Path, Session], source: ImageSource, plan: Plan, progress: Progress | None
) -> dict[Path, Features]:
    """Features of every model; those that share a preprocessing share one decoding."""
    groups: dict[str, list[Path]] = {}
    for folder, session in sessions.items():
        groups.setdefault(repr(session.bundle.preprocessing), []).append(folder)
    found: dict[Path, Features] = {}
    for group in groups.values():
        features = extract_each(
            [sessions[folder] for folder in group], source, batch_size=plan.batch, cache=plan.cache, progress=progress
        )
        found |= dict(zip(group, features, strict=True))
    return found


def _knn(session: Session, split: Split, bank: Features, test: Features) -> Accuracy:
    values = knn_accuracy(bank.features, bank.labels, test.features, test.labels, classes=split.classes)
    settings: dict[str, Json] = {"k": HEADLINE_K, "temperature": TEMPERATURE, "skipped": bank.skipped + test.skipped}
    return _accuracy(session, "knn", split, values, settings)


def _fidelity(
    sessions: dict[Path, Session],
    references: dict[Path, Path | None],
    split: Split,
    bank: dict[Path, Features],
    test: dict[Path, Features],
    plan: Plan,
) -> Iterator[Result]:
    compared: list[tuple[Path, Comparison]] = []
    banks = {}
    for folder, reference in references.items():
        if reference is None:
            continue
        record = sessions[folder].bundle
        if not isinstance(record, Bundle):
            continue
        _check_calibration(folder, record, split)
        if reference not in banks:
            banks[reference] = make_bank(bank[reference].features, bank[reference].labels, classes=split.classes)
        keep = bank[folder].labels >= 0
        comparison = fidelity(
            test[reference].features,
            test[folder].features,
            labels=test[reference].labels,
            bank=banks[reference],
            candidate_bank=bank[folder].features[keep],
            margin=plan.margin,
            precision=record.precision,
            class_names=split.names,
        )
        compared.append((folder, comparison))
    adjusted = holm([c.decisions["probe"].p_value if "probe" in c.decisions else 1.0 for _, c in compared])
    for (folder, comparison), p_value in zip(compared, adjusted, strict=True):
        yield Result(folder=folder, record=_fidelity_record(sessions[folder], comparison, p_value, split, plan))


def _fidelity_record(session: Session, comparison: Comparison, p_value: float, split: Split, plan: Plan) -> Fidelity:
    decision = comparison.decisions.get("probe")
    settings: dict[str, Json] = {
        "margin": plan.margin,
        "images": len(split.test),
        "images_needed": decision.needed if decision else None,
        "k": HEADLINE_K,
        "bank": to_json(data_info(split.bank)),
        "data": to_json(data_info(split.test)),
    }
    values = comparison.values | {"probe_mcnemar_p_holm": Value(value=p_value, n=len(split.test))}
    return Fidelity(
        bundle_id=model_id(session.bundle),
        device=_device(session),
        settings=settings,
        values=values,
        verdict=comparison.verdict,
        reasons=comparison.reasons,
        started=_now(),
    )


def _heads(
    folders: Sequence[Path],
    sessions: dict[Path, Session],
    split: Split,
    bank: dict[Path, Features],
    test: dict[Path, Features],
    plan: Plan,
    progress: Progress | None,
) -> Iterator[Result]:
    """The protocols that train something on the features: low-shot and linear."""
    if not (plan.lowshot or plan.linear):
        return
    from robx.eval.linear import VISSL

    for folder in folders:
        session = sessions[folder]
        if plan.lowshot:
            yield from _lowshot(folder, session, split, bank[folder], test[folder], plan, progress)
        if plan.linear:
            yield Result(folder=folder, record=_linear(folder, session, split, plan, "linear", VISSL, True, progress))


def _lowshot(
    folder: Path, session: Session, split: Split, bank: Features, test: Features, plan: Plan, progress: Progress | None
) -> Iterator[Result]:
    from robx.eval.lowshot import LAMBDA, draw_splits, low_shot, read_splits

    output = "embedding"
    if isinstance(session.bundle, Student):
        from robx.eval.trunk_outputs import TrunkSession

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
        yield Result(folder=folder, record=_accuracy(session, f"lowshot:{shot}", split, values, settings))


def _transfers(
    folders: Sequence[Path], sessions: dict[Path, Session], plan: Plan, progress: Progress | None
) -> Iterator[Result]:
    if not plan.transfers:
        return
    from robx.eval.datasets import SquareSource, open_dataset
    from robx.eval.transfer import transfer

    for name, root in plan.transfers:
        how = transfer(name)
        pair = open_dataset(name, root)
        for folder in folders:
            session = sessions[folder]
            side = session.bundle.preprocessing.crop
            sources = pair if how.crop else tuple(SquareSource(source, side) for source in pair)
            split = make_split(*sources)
            record = _linear(folder, session, split, plan, f"transfer:{name}", how.recipe, how.crop, progress)
            yield Result(folder=folder, record=record)


def _linear(
    folder: Path,
    session: Session,
    split: Split,
    plan: Plan,
    protocol: str,
    recipe: Any,
    crop: bool,
    progress: Progress | None,
) -> Accuracy:
    """Heads on fresh crops for a Student, on features extracted once for a Bundle or with `plan.cached`."""
    from robx.eval.linear import LEAST_STEPS, linear_cached, linear_streamed

    settings: dict[str, Json] = {"recipe": to_json(recipe)}
    if isinstance(session.bundle, Bundle):
        bank, test = _pair_of_features(session, split, plan, progress)
        values = linear_cached(bank, test, classes=split.classes, recipe=recipe, progress=progress)
        settings |= {"least_steps": LEAST_STEPS, "features": "embedding, extracted once"}
        return _accuracy(session, _cached(protocol), split, values, settings)
    from robx.eval.trunk_outputs import TrunkSession

    with TrunkSession(folder, output="last4", threads=plan.threads) as trunk:
        if plan.cached:
            bank, test = _pair_of_features(trunk, split, plan, progress)
            values = linear_cached(
                bank, test, classes=split.classes, kinds=trunk.kinds, recipe=recipe, progress=progress
            )
            settings |= {"least_steps": LEAST_STEPS, "features": f"{', '.join(trunk.kinds)}, extracted once"}
            return _accuracy(session, _cached(protocol), split, values, settings)
        test = split.aligned(extract(trunk, split.test, batch_size=plan.batch, cache=plan.cache, progress=progress))
        values = linear_streamed(
            trunk, split.bank, test, classes=split.classes, recipe=recipe, crop=crop, progress=progress
        )
        settings |= {"features": f"{', '.join(trunk.kinds)}, of fresh crops each epoch"}
        return _accuracy(session, protocol, split, values, settings)


def _pair_of_features(
    session: Session, split: Split, plan: Plan, progress: Progress | None
) -> tuple[Features, Features]:
    bank = extract(session, split.bank, batch_size=plan.batch, cache=plan.cache, progress=progress)
    test = extract(session, split.test, batch_size=plan.batch, cache=plan.cache, progress=progress)
    return bank, split.aligned(test)


def _cached(protocol: str) -> str:
    """ "linear" -> "linear-cached", "transfer:cifar10" -> "transfer-cached:cifar10": other protocols, other names."""
    head, colon, tail = protocol.partition(":")
    return f"{head}-cached{colon}{tail}"


def _accuracy(
    session: Session, protocol: str, split: Split, values: dict[str, Value], settings: dict[str, Json]
) -> Accuracy:
    return Accuracy(
        model_id=model_id(session.bundle),
        model_name=model_name(session.bundle),
        protocol=protocol,
        device=_device(session),
        settings=settings | {"classes": split.classes, "bank": to_json(data_info(split.bank))},
        data=data_info(split.test),
        values=values,
        started=_now(),
    )


def _check_calibration(folder: Path, bundle: Bundle, split: Split) -> None:
    if bundle.calibration is not None and bundle.calibration.fingerprint == split.test.fingerprint:
        raise InputError(f"{folder} was calibrated on the images of {split.test.name}: judge it on others, with --test")


def _device(session: Session) -> dict[str, Json]:
    return {"arch": platform.machine(), "os": platform.system(), **session.facts()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def parse_transfers(names: Sequence[str], data: Path | None) -> tuple[tuple[str, Path], ...]:
    """(("cifar10", Path("/data/cifar")), ...) of "cifar10=/data/cifar"; a bare name is in `data`.

    Raises:
        InputError: an unknown name, or none of the two places.
    """
    from robx.eval.transfer import transfer

    found = []
    for text in names:
        name, _, root = text.partition("=")
        transfer(name)
        if not root and data is None:
            raise InputError(f"--transfer {name} has no folder: give --transfer {name}=DIR")
        found.append((name, Path(root) if root else data))
    return tuple((name, root) for name, root in found if root is not None)


def default_cache() -> Path:
    """Where features are kept: features/ in $ROBX_CACHE, else in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robx"
    return Path(os.environ.get("ROBX_CACHE") or user) / "features"
