"""What `robx eval` does: open the models and the images, run the protocols that were asked for, give their records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from robx.embeddings import KNN_K, KNN_TEMPERATURE, refuse_constant
from robx.errors import InputError
from robx.eval.datasets.duplicates import look_alikes
from robx.eval.datasets.features import Features, extract_each, model_id
from robx.eval.datasets.splits import Split, open_split
from robx.eval.fidelity.fidelity import Comparison, fidelity, make_bank
from robx.eval.fidelity.repeat import repeat_difference
from robx.eval.plan import Plan, Result, accuracy_record, data_facts, device_facts
from robx.eval.protocols.knn import knn_accuracy
from robx.eval.protocols.lowshot import check_splits
from robx.images.sources import ImageSource, data_info
from robx.progress import Progress
from robx.records import Bundle, Fidelity, Json, Student, Value, to_json, utc_now
from robx.runtime.session import Session, SessionSettings, load_record, open_session
from robx.stats import check_margin, holm


def evaluate(folders: Sequence[Path], plan: Plan, *, progress: Progress | None = None) -> Iterator[Result]:
    """Run `plan` on each model folder; records come as soon as they are known.

    Raises:
        InputError: images or folders that do not serve; the message says which.
        ArtifactError, MissingExtra, DeviceError: a model cannot be opened or run.
    """
    records = {folder: load_record(folder) for folder in folders}
    split = open_split(plan.data, plan.test) if plan.data else None
    if split is None and plan.needs_data:
        raise InputError("no images to judge on: give --data with a folder that has train/ and test/, or add --test")
    if plan.fidelity:
        check_margin(plan.margin)
    if plan.save_head and len(folders) > 1:
        raise InputError(f"--save-head keeps the head of one model and {len(folders)} were given: name one")
    if split is not None:
        for shot in plan.lowshot:
            check_splits(split.bank, shot, plan.lowshot_splits)
    references = _references(records, plan) if plan.fidelity else {}
    for folder, record in records.items():
        _check_calibration(folder, record, split)
    with contextlib.ExitStack() as stack:
        settings = SessionSettings(threads=plan.threads)
        wanted = dict.fromkeys([*folders, *references.values()])
        sessions = {folder: stack.enter_context(open_session(folder, settings)) for folder in wanted}
        if split is not None and plan.needs_data:
            yield from _on_the_data(folders, sessions, references, split, plan, progress)
        if plan.transfers:
            from robx.eval.protocols.run import transfers

            yield from transfers(folders, sessions, plan, progress)


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


def _references(records: dict[Path, Bundle | Student], plan: Plan) -> dict[Path, Path]:
    """bundle's folder -> its student's, under the name that the user gave it, if any: it is opened once."""
    given = {folder.resolve(): folder for folder in records}
    found = {folder: find_reference(folder, record, plan.reference) for folder, record in records.items()}
    pairs = {folder: given.get(place.resolve(), place) for folder, place in found.items() if place is not None}
    if not pairs:
        raise InputError("--fidelity compares bundles with their student, and no bundle was given: add one")
    return pairs


def _on_the_data(
    folders: Sequence[Path],
    sessions: dict[Path, Session],
    references: dict[Path, Path],
    split: Split,
    plan: Plan,
    progress: Progress | None,
) -> Iterator[Result]:
    """Every protocol that is judged on --data."""
    bank = _extract_all(sessions, split.bank, plan, progress)
    for folder, found in bank.items():
        if folder not in references:  # of those that are compared, the verdict says it
            refuse_constant(found.features, folder)
    test = {f: split.aligned(found) for f, found in _extract_all(sessions, split.test, plan, progress).items()}
    split = replace(split, shared=look_alikes(bank[folders[0]].looks, test[folders[0]].looks))
    bundles = [folder for folder, session in sessions.items() if isinstance(session.bundle, Bundle)]
    repeats = {folder: repeat_difference(sessions[folder], split.test) for folder in bundles}
    if plan.knn:
        for folder in folders:
            values = _knn(split, bank[folder], test[folder], progress)
            settings = _knn_settings(bank[folder], test[folder], repeats.get(folder))
            yield Result(folder=folder, record=accuracy_record(sessions[folder], "knn", split, values, settings))
    yield from _fidelity(sessions, references, split, bank, test, repeats, plan)
    if plan.lowshot or plan.linear or plan.save_head:
        from robx.eval.protocols.run import trained_protocols

        for folder in folders:
            features = bank[folder], test[folder]
            yield from trained_protocols(folder, sessions[folder], split, features, plan, progress)


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


def _knn(split: Split, bank: Features, test: Features, progress: Progress | None) -> dict[str, Value]:
    return knn_accuracy(
        bank.features, bank.labels, test.features, test.labels, classes=split.classes, progress=progress
    )  # fmt: skip


def _knn_settings(bank: Features, test: Features, repeat: Value | None) -> dict[str, Json]:
    return {
        "k": min(KNN_K, int(np.count_nonzero(bank.labels >= 0))),
        "temperature": KNN_TEMPERATURE,
        "skipped": bank.skipped + test.skipped,
        **({} if repeat is None else {"repeat_max_abs": repeat.value}),
    }


def _fidelity(
    sessions: dict[Path, Session],
    references: dict[Path, Path],
    split: Split,
    bank: dict[Path, Features],
    test: dict[Path, Features],
    repeats: Mapping[Path, Value | None],
    plan: Plan,
) -> Iterator[Result]:
    compared: list[tuple[Path, Comparison]] = []
    banks = {}
    for folder, reference in references.items():
        record = sessions[folder].bundle
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
            precision=record.precision if isinstance(record, Bundle) else "fp32",
            class_names=split.names,
        )
        compared.append((folder, comparison))
    # Several bundles are one family of tests: each one's p-value is raised for the company it keeps.
    adjusted = holm([c.decisions["probe"].p_value if "probe" in c.decisions else 1.0 for _, c in compared])
    for (folder, comparison), p_value in zip(compared, adjusted, strict=True):
        comparison = _with_repeat(comparison, repeats.get(folder))
        yield Result(folder=folder, record=_fidelity_record(sessions[folder], comparison, p_value, split, plan))


def _with_repeat(comparison: Comparison, repeat: Value | None) -> Comparison:
    if repeat is None:
        return comparison
    values = comparison.values | {"repeat_max_abs": repeat}
    if repeat.value == 0:
        return replace(comparison, values=values)
    note = f"not deterministic: two runs of the same {repeat.n} images differ by up to {repeat.value:.2g}"
    return replace(comparison, values=values, reasons=(*comparison.reasons, note))


def _fidelity_record(session: Session, comparison: Comparison, p_value: float, split: Split, plan: Plan) -> Fidelity:
    decision = comparison.decisions.get("probe")
    settings: dict[str, Json] = {
        "margin": plan.margin,
        "images": len(split.test),
        "images_needed": decision.needed if decision else None,
        "k": KNN_K,
        "data": to_json(data_info(split.test)),
        **data_facts(split),
    }
    values = comparison.values
    if decision:
        values = values | {"probe_mcnemar_p_holm": Value(value=p_value, n=decision.n)}
    return Fidelity(
        bundle_id=model_id(session.bundle),
        device=device_facts(session),
        settings=settings,
        values=values,
        verdict=comparison.verdict,
        reasons=comparison.reasons,
        started=utc_now(),
    )


def _check_calibration(folder: Path, record: Bundle | Student, split: Split | None) -> None:
    calibration = record.calibration if isinstance(record, Bundle) else None
    if calibration is not None and split is not None and calibration.source == split.test_source:
        raise InputError(f"{folder} was calibrated on the images of {split.test.name}: judge it on others, with --test")
