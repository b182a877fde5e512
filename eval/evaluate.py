"""`robx eval`: open the models and the images, run the protocols that were asked for, write and return the records."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robx.embeddings import KNN_K, KNN_TEMPERATURE, refuse_constant
from robx.errors import ArtifactError, InputError, counted
from robx.eval.datasets.duplicates import LookAlikes, look_alikes, repeats
from robx.eval.datasets.features import BATCH, Features, decode_workers, extract, extract_each, model_id, model_name
from robx.eval.datasets.layouts import open_dataset, parse_transfers
from robx.eval.datasets.splits import Split, open_split
from robx.eval.fidelity.fidelity import Comparison
from robx.eval.fidelity.run import Pair, compare, repeat_difference
from robx.eval.protocols.knn import knn_accuracy
from robx.eval.protocols.lowshot import check_splits, parse_shots
from robx.eval.protocols.outcome import Model, Outcome
from robx.eval.ranks import Ranks, join
from robx.images.sources import ImageSource, data_info
from robx.progress import Fact, Progress
from robx.records import (
    Accuracy,
    Bundle,
    Fidelity,
    Json,
    Measurement,
    Student,
    Value,
    append_measurements,
    require_measurable,
    to_json,
    unfinished,
    utc_now,
    warn_outdated,
)
from robx.runtime.session import Session, SessionSettings, load_record, open_session
from robx.stats import check_margin
from robx.store.files import cache_folder
from robx.store.folders import require_writable


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Which models, which protocols, on which images, and how; the defaults are those of `robx eval`."""

    models: tuple[Path, ...]  # run and bundle folders
    data: Path | None = None  # training images, and the test images where it has both splits
    test: Path | None = None
    labels: Path | None = None  # a CSV file of paths and labels, for `data` and `test`
    image_member: str | None = None  # which image of a tar sample to read when it has several: "rgb.jpg"
    knn: bool = False  # the default when no other protocol is asked for
    linear: bool = False
    lowshot: str = ""  # "1,2,5,1%": images per class, and shares
    lowshot_splits: Path | None = None  # the published lists
    transfers: tuple[str, ...] = ()  # NAME or NAME=DIR
    fidelity: bool = False
    reference: Path | None = None  # the student's folder, when it is not the bundle's parent
    margin: float = 1.0  # accepted drop of accuracy, percentage points
    cached: bool = False  # train heads on features extracted once, for a student too
    save_head: Path | None = None  # where to write a linear head on the embedding
    device: str | None = None  # of the models, as the engine calls it: "cpu", "cuda", "gpu"; None: the engine's default
    threads: int | None = None  # of the model; None: all processors
    batch: int = BATCH
    cache: Path | None = None  # folder of extracted features; None: robx's own cache
    no_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and settings that none of the protocols uses."""
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")
        if self.fidelity:
            check_margin(self.margin)
        if self.lowshot:
            parse_shots(self.lowshot)
        elif self.lowshot_splits is not None:
            raise InputError("--lowshot-splits lists images for --lowshot: give --lowshot too")
        if self.reference is not None and not self.fidelity:
            raise InputError("--reference is what --fidelity compares with: give --fidelity too")
        if self.margin != EvalSettings.margin and not self.fidelity:
            raise InputError("--margin is the drop that --fidelity accepts: give --fidelity too")
        if self.cached and not (self.linear or self.transfers):
            raise InputError("--cached is how linear heads are trained: give --linear or --transfer too")
        parse_transfers(self.transfers, self.data)
        of_data = {"--test": self.test, "--labels": self.labels, "--image-member": self.image_member}
        if not self.splits and (unused := [name for name, value in of_data.items() if value is not None]):
            raise InputError(
                f"{', '.join(unused)}: not used by --transfer, whose data sets come with their own labels and test "
                "images: give --knn too, or leave it out"
            )

    @classmethod
    def of(cls, **values: Any) -> EvalSettings:
        """Settings from the keywords of ``robx.api.evaluate``; a path may be a string.

        Raises:
            InputError: numbers out of range, or settings that contradict each other.
        """
        values = {n: Path(value) if n in _PATHS and value is not None else value for n, value in values.items()}
        return cls(**values | {"transfers": tuple(values.get("transfers", ()))})

    @property
    def splits(self) -> bool:
        """Whether anything is evaluated on `data` itself; else it is where the transfers' data sets are."""
        return self.with_knn or bool(self.linear or self.lowshot or self.fidelity or self.save_head)

    @property
    def with_knn(self) -> bool:
        """Whether kNN is evaluated: if it was asked for, or nothing else was."""
        others = (self.linear, self.lowshot, self.transfers, self.fidelity, self.save_head)
        return self.knn or not any(others)


_PATHS = {"data", "test", "labels", "lowshot_splits", "reference", "save_head", "cache"}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The settings, checked, with everything opened that needs no model."""

    settings: EvalSettings
    records: dict[Path, Bundle | Student]
    split: Split | None
    shots: tuple[str, ...]
    transfers: tuple[tuple[str, tuple[ImageSource, ImageSource]], ...]  # name, (training, test)
    references: dict[Path, Path]  # bundle's folder -> its student's
    knn: bool
    threads: int
    cache: Path | None
    ranks: Ranks
    progress: Progress | None
    say: Callable[[str], None]


def evaluate(
    settings: EvalSettings, *, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Measurement]:
    """Evaluate the models; each record is appended to measurements.jsonl in its model's folder, then yielded.

    Under torchrun the processes share the images and the queries; the first one alone writes and yields records.
    `progress` is called with (done, total, note), `say` with a line about images that were left out or are suspect.

    Raises:
        InputError: images or folders that cannot be used; the message says which.
        ArtifactError: a model that is damaged, has collapsed or returns NaN.
        MissingExtra, DeviceError: a model cannot be opened or run.
    """
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(join())
        plan = _check(settings, ranks, progress if ranks.first else None, say if ranks.first else lambda _: None)
        how = SessionSettings(threads=plan.threads, provider=settings.device)
        wanted = dict.fromkeys([*plan.records, *plan.references.values()])
        sessions = {folder: stack.enter_context(open_session(folder, how)) for folder in wanted}
        for folder, record in _measure(sessions, plan):
            if ranks.first:
                append_measurements(folder / "measurements.jsonl", [record])
                yield record


def _check(
    settings: EvalSettings, ranks: Ranks, progress: Progress | None, say: Callable[[str], None]
) -> _Plan:  # fmt: skip
    """Refuse what cannot work before a model is opened or an image is embedded."""
    s = settings
    if s.no_cache and s.cache:
        raise InputError("--cache and --no-cache contradict each other: give one")
    transfers = parse_transfers(s.transfers, s.data)
    shots = parse_shots(s.lowshot) if s.lowshot else ()
    records = {folder: load_record(folder) for folder in dict.fromkeys(s.models)}
    split = None
    if s.splits:
        split = open_split(s.data, s.test, labels=s.labels, image_member=s.image_member) if s.data else None
        if split is None:
            raise InputError("no images to evaluate on: give --data with train/ and test/ in it, or --data and --test")
    if split is not None:
        for shot in shots:
            check_splits(split.bank, shot, s.lowshot_splits)
    elif s.data is not None and all(root != s.data for _, root in transfers):
        say(f"warning: --data {s.data} is not used: every --transfer has a folder of its own; --knn evaluates on it")
    references = _references(records, s.reference) if s.fidelity else {}
    if s.save_head and len(records) > 1:
        raise InputError(f"--save-head writes the head of one model, got {len(records)}: give one")
    _require_places(s, ranks)
    for folder, record in records.items():
        if interrupted := unfinished(record.student if isinstance(record, Bundle) else record):
            say(f"warning: {folder}: {interrupted}")
        warn_outdated(folder, record, say)
        _check_calibration(folder, record, split)
    opened = tuple((name, open_dataset(name, root)) for name, root in transfers)
    sources = [*((split.bank, split.test) if split else ()), *(source for _, pair in opened for source in pair)]
    for note in dict.fromkeys(source.note for source in sources if source.note):
        say(note)
    return _Plan(
        settings=s,
        records=records,
        split=split,
        shots=shots,
        transfers=opened,
        references=references,
        knn=s.with_knn,
        threads=s.threads or decode_workers(ranks),
        cache=None if s.no_cache else s.cache or cache_folder() / "features",
        ranks=ranks,
        progress=progress,
        say=say,
    )


def _require_places(settings: EvalSettings, ranks: Ranks) -> None:
    """Refuse, before anything is measured, folders in which the records, the head or the features cannot be written."""
    if not ranks.first:  # the only one that writes records
        return
    for folder in dict.fromkeys(settings.models):
        require_measurable(folder)
    if settings.save_head is not None:
        if settings.save_head.is_dir():
            raise InputError(f"{settings.save_head} is a folder: give --save-head the name of a file")
        require_writable(settings.save_head.parent, remedy="give --save-head in another folder")
    if settings.cache is not None:
        require_writable(settings.cache, remedy="give --cache another folder")


def find_reference(folder: Path, record: Bundle | Student, given: Path | None) -> Path | None:
    """The folder of the fp32 student that a bundle was exported from; None for a student, which has none.

    Raises:
        InputError: it is neither `given` nor the parent folder of the bundle.
    """
    if isinstance(record, Student):
        return None
    for place in (given, folder.resolve().parent):
        if place is None or not (place / "student.json").is_file():
            continue
        found = load_record(place)
        if isinstance(found, Student) and found.sha256 == record.student.sha256:
            return place
    raise InputError(f"the student of {folder} is not in its parent folder: give the student's folder with --reference")


def _references(records: Mapping[Path, Bundle | Student], reference: Path | None) -> dict[Path, Path]:
    """bundle's folder -> its student's, spelled as the user gave it, if it was given: it is opened once."""
    given = {folder.resolve(): folder for folder in records}
    found = {folder: find_reference(folder, record, reference) for folder, record in records.items()}
    pairs = {folder: given.get(place.resolve(), place) for folder, place in found.items() if place is not None}
    if not pairs:
        raise InputError("--fidelity compares bundles with their student, and no bundle was given: add one")
    if reference is not None and reference.resolve() not in {place.resolve() for place in pairs.values()}:
        raise InputError(f"--reference {reference} is the student of none of the bundles: give theirs, or leave it out")
    return pairs


def _check_calibration(folder: Path, record: Bundle | Student, split: Split | None) -> None:
    calibration = record.calibration if isinstance(record, Bundle) else None
    if calibration is not None and split is not None and calibration.source in split.test_sources:
        raise InputError(f"{folder} was calibrated on the test set {split.test.name}: give other images with --test")


def _measure(sessions: Mapping[Path, Session], plan: _Plan) -> Iterator[tuple[Path, Measurement]]:
    """(model's folder, record) of every protocol of the plan, as soon as it is known."""
    if plan.split is not None:
        yield from _on_the_data(sessions, plan, plan.split)
    for name, sources in plan.transfers:
        from robx.eval.protocols.run import transfer

        for folder in plan.records:
            model = _model(folder, sessions[folder], plan)
            split, outcome = transfer(model, name, sources, cached=plan.settings.cached)
            yield folder, _accuracy(model.session, split, outcome)


def _on_the_data(
    sessions: Mapping[Path, Session], plan: _Plan, split: Split
) -> Iterator[tuple[Path, Measurement]]:  # fmt: skip
    """Every protocol that is evaluated on --data."""
    settings = plan.settings
    bank = _extract_all(sessions, split.bank, plan)
    test = {folder: split.aligned(found) for folder, found in _extract_all(sessions, split.test, plan).items()}
    for folder in sessions:
        if folder not in plan.references:  # a candidate that is compared gets a verdict instead
            _refuse_broken(folder, bank[folder], test[folder])
    first = next(iter(plan.records))
    split = replace(split, shared=_said_of_images(split, bank[first], test[first], plan.say))
    bundles = [folder for folder, session in sessions.items() if isinstance(session.bundle, Bundle)]
    repeats = {folder: repeat_difference(sessions[folder], split.test) for folder in bundles}
    if plan.knn:
        for folder in plan.records:
            outcome = _knn(split, bank[folder], test[folder], repeats.get(folder), plan)
            yield folder, _accuracy(sessions[folder], split, outcome)
    if plan.references:
        pairs = [
            Pair(
                folder=folder,
                reference=reference,
                precision=record.precision if isinstance(record := plan.records[folder], Bundle) else "fp32",
                bank=bank[folder],
                test=test[folder],
                reference_bank=bank[reference],
                reference_test=test[reference],
                repeat=repeats.get(folder),
            )
            for folder, reference in plan.references.items()
        ]
        for pair, comparison in compare(pairs, classes=split.classes, names=split.names, margin=settings.margin):
            yield pair.folder, _fidelity(sessions[pair.folder], split, comparison, settings.margin)
    if plan.shots or settings.linear or settings.save_head:
        for folder in plan.records:
            for outcome in _trained(_model(folder, sessions[folder], plan), split, bank[folder], test[folder], plan):
                yield folder, _accuracy(sessions[folder], split, outcome)


def _said_of_images(split: Split, bank: Features, test: Features, say: Callable[[str], None]) -> LookAlikes:
    """The test images that look like a training image; says so, and what else makes the figures doubtful."""
    for source, found in ((split.bank, bank), (split.test, test)):
        if found.skipped:
            say(f"warning: {found.skipped} of {len(source)} images of {source.name} cannot be read: left out")
    shared = look_alikes(bank.looks, test.looks)
    if shared.checked:
        compared = f"compared {shared.checked} of {shared.images} test images with the training images"
        say(Fact(f"{compared}, for near-duplicates"))
    if shared.warning:
        say(f"warning: {shared.warning}")
    for warning in _doubtful_labels(split, bank, test):
        say(f"warning: {warning}")
    return shared


def _doubtful_labels(split: Split, bank: Features, test: Features) -> Iterator[str]:
    """A line on a set of one class, on images that count several times, and on labels that contradict each other."""
    seen = np.unique(bank.labels[bank.labels >= 0])
    if len(seen) == 1:
        name = split.names[seen[0]] if split.names else seen[0]
        yield f"all training images are of one class, {name}: the accuracy is 100 % by definition"
    for source, found in ((split.bank, bank), (split.test, test)):
        if count := repeats(found.looks, found.labels)[0]:
            yield (
                f"{count} of {len(found.labels)} images of {source.name} repeat the pixels of another one and count as "
                "independent: the intervals are too narrow"
            )
    both = [np.concatenate([getattr(part, name) for part in (bank, test)]) for name in ("looks", "labels")]
    if count := repeats(*both)[1]:
        yield f"{counted(count, 'image')} with the same pixels have different labels: correct the labels"


def _trained(model: Model, split: Split, bank: Features, test: Features, plan: _Plan) -> Iterator[Outcome]:
    """The protocols that train something, for one model."""
    from robx.eval.protocols.run import kept_head, linear, lowshot

    settings = plan.settings
    if plan.shots:
        yield from lowshot(model, split, bank, test, shots=plan.shots, folder=settings.lowshot_splits)
    if settings.linear:
        yield linear(model, split, cached=settings.cached)
    if settings.save_head is not None and plan.ranks.first:
        yield kept_head(model, split, bank, test, path=settings.save_head)


def _model(folder: Path, session: Session, plan: _Plan) -> Model:
    how = partial(extract, batch_size=plan.settings.batch, cache=plan.cache, ranks=plan.ranks, progress=plan.progress)
    return Model(
        folder=folder,
        session=session,
        extract=how,
        threads=plan.threads,
        progress=plan.progress,
    )


def _extract_all(sessions: Mapping[Path, Session], source: ImageSource, plan: _Plan) -> dict[Path, Features]:
    """Features of every model; models with the same preprocessing share one decoding."""
    groups: dict[str, list[Path]] = {}
    for folder, session in sessions.items():
        groups.setdefault(repr(session.bundle.preprocessing), []).append(folder)
    found: dict[Path, Features] = {}
    for group in groups.values():
        opened = [sessions[folder] for folder in group]
        features = extract_each(
            opened, source, batch_size=plan.settings.batch, cache=plan.cache, ranks=plan.ranks, progress=plan.progress
        )  # fmt: skip
        found |= dict(zip(group, features, strict=True))
    return found


def _refuse_broken(folder: Path, bank: Features, test: Features) -> None:
    """A model that returns NaN, or the same embedding for every image, has no accuracy worth a record."""
    rows = np.concatenate([np.isfinite(found.features).all(axis=1) for found in (bank, test)])
    if not rows.all():
        raise ArtifactError(
            f"{folder} returns NaN or infinity for {np.count_nonzero(~rows)} of {len(rows)} images: its weights are "
            "damaged or overflow; train or export it again"
        )
    refuse_constant(bank.features, folder)


def _knn(split: Split, bank: Features, test: Features, repeat: Value | None, plan: _Plan) -> Outcome:
    values = knn_accuracy(
        bank.features, bank.labels, test.features, test.labels, classes=split.classes,
        search=partial(plan.ranks.nearest, device="cuda" if plan.settings.device == "cuda" else "cpu"),
        progress=plan.progress,
    )  # fmt: skip
    settings: dict[str, Json] = {
        "k": min(KNN_K, int(np.count_nonzero(bank.labels >= 0))),
        "temperature": KNN_TEMPERATURE,
        "skipped": bank.skipped + test.skipped,
        **({} if repeat is None else {"repeat_max_abs": repeat.value}),
    }
    return Outcome(protocol="knn", values=values, settings=settings)


# ------------------------------------------------------------------------------------------------------------- records


def _accuracy(session: Session, split: Split, outcome: Outcome) -> Accuracy:
    return Accuracy(
        model_id=model_id(session.bundle),
        model_name=model_name(session.bundle),
        protocol=outcome.protocol,
        device=_device(session),
        settings=outcome.settings | {"classes": split.classes} | _data(split),
        data=data_info(split.test),
        values=outcome.values,
        started=utc_now(),
    )


def _fidelity(session: Session, split: Split, comparison: Comparison, margin: float) -> Fidelity:
    decision = comparison.decisions.get("probe")
    settings: dict[str, Json] = {
        "margin": margin,
        "images": len(split.test),
        "images_needed": decision.needed if decision else None,
        "k": KNN_K,
        "data": to_json(data_info(split.test)),
        **_data(split),
    }
    return Fidelity(
        bundle_id=model_id(session.bundle),
        device=_device(session),
        settings=settings,
        values=comparison.values,
        verdict=comparison.verdict,
        reasons=comparison.reasons,
        started=utc_now(),
    )


def _data(split: Split) -> dict[str, Json]:
    """The training images, and how many test images repeat one of them."""
    shared: Json = to_json(split.shared)
    if split.shared is not None and split.shared.checked is None:
        del shared["checked"]
    return {"bank": to_json(data_info(split.bank)), "look_alikes": shared}


def _device(session: Session) -> dict[str, Json]:
    """What the model ran on; `robx bench` describes a machine in full."""
    return {"arch": platform.machine(), "os": platform.system(), **session.facts()}
