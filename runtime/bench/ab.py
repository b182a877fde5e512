"""Compare each bundle with the first one in alternating blocks of one process: the ratio of their latencies."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import InputError
from robx.images.decode import renormalise
from robx.images.sources import open_source
from robx.records import Validity, Value, load_bundle, utc_now
from robx.runtime.bench import latency, profiles, validity
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.interleave import Interleaved, interleave
from robx.runtime.bench.profiles import BenchSettings, find_profile
from robx.runtime.bench.record import require_writable
from robx.runtime.bench.reference import check_outputs, find_reference
from robx.runtime.session import Session, open_session
from robx.store.files import sha256_bytes, write_bytes

BLOCKS = 20  # per bundle: a bootstrap interval needs ten or more


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One bundle against another; the raw samples of both are in the file `samples` in the bundle's folder."""

    bundle: str
    against: str
    ratio: Value  # the bundle's latency divided by the other's
    verdict: Validity
    reasons: tuple[str, ...]  # to doubt either of the two
    samples: str
    samples_sha256: str
    started: str
    runtime: tuple[dict[str, Any], dict[str, Any]]  # `Session.facts` of the two
    tries: tuple[tuple[str, ...], ...]  # the reasons to doubt each measurement, if it was repeated

    @property
    def claim(self) -> str:
        """What the figures support: faster or slower only if the run is VALID and the interval excludes 1."""
        if self.verdict != "VALID":
            return self.verdict
        low, high = self.ratio.low or 0.0, self.ratio.high or 0.0
        return "faster" if high < 1 else "slower" if low > 1 else "no difference shown"


def compare(settings: BenchSettings) -> list[Comparison]:
    """Compare each of `settings.bundles` but the first with the first, on this machine.

    Each bundle is timed for the profile's seconds, divided into BLOCKS blocks. An UNSTABLE measurement is repeated, up
    to `settings.retries` times and within profiles.RETRY_SECONDS; the one with the fewest reasons against it counts.

    Raises:
        InputError: fewer than two bundles, the same bundle twice, bundles of different input sizes, or a setting
            that only a benchmark in separate processes has.
    """
    _check(settings)
    folders = settings.folders
    for folder in folders[1:]:
        require_writable(folder)
    bundles = [load_bundle(folder) for folder in folders]
    shared = bundles[0].preprocessing
    if not all(shared.same_pixels(bundle.preprocessing) for bundle in bundles):
        raise InputError("--ab needs bundles of the same input size and resize: they have to run the same images")
    data = settings.data
    source = open_source(Path(data), image_member=settings.image_member) if data is not None else None
    started, pixels = utc_now(), load_inputs(shared, source).images
    labels = settings.labels
    images = {
        label: renormalise(pixels, shared, bundle.preprocessing) for label, bundle in zip(labels, bundles, strict=True)
    }
    with contextlib.ExitStack() as stack:
        one = replace(settings.session, batch=1)
        sessions = {
            label: stack.enter_context(open_session(folder, one)) for label, folder in zip(labels, folders, strict=True)
        }
        tries = _time(sessions, images, settings)
        known: dict[Path, np.ndarray] = {}
        wrong = {
            label: [f"{reason} ({label})" for reason in _wrong_outputs(folder, sessions[label], images[label], known)]
            for label, folder in zip(labels, folders, strict=True)
        }
        facts = {label: session.facts() for label, session in sessions.items()}
    timed = min(tries, key=lambda one: len(one.reasons()))
    found = []
    for label, folder in zip(labels[1:], folders[1:], strict=True):
        ours, first = timed.blocks[label], timed.blocks[labels[0]]
        reasons = (*wrong[labels[0]], *wrong[label], *timed.reasons(labels[0], label))
        name, digest = _save(folder, ours, first, started)
        found.append(
            Comparison(
                bundle=str(folder),
                against=str(folders[0]),
                ratio=latency.paired_ratio(ours, first),
                verdict=validity.verdict(reasons),
                reasons=reasons,
                samples=name,
                samples_sha256=digest,
                started=started,
                runtime=(facts[label], facts[labels[0]]),
                tries=tuple(tuple(one.reasons()) for one in tries) if len(tries) > 1 else (),
            )
        )
    return found


def _time(
    sessions: Mapping[str, Session], images: Mapping[str, np.ndarray], settings: BenchSettings
) -> list[Interleaved]:
    """Time the sessions in turns; again while there are reasons to doubt the result that may pass."""
    seconds = find_profile(settings.profile).seconds / BLOCKS
    begun, tries = time.monotonic(), list[Interleaved]()
    while True:
        tries.append(interleave(sessions, images, blocks=BLOCKS, seconds=seconds, seed=settings.seed + len(tries)))
        spent = time.monotonic() - begun
        in_time = spent / len(tries) * (len(tries) + 1) < profiles.RETRY_SECONDS
        if len(tries) > settings.retries or not in_time or not validity.is_passing(tries[-1].reasons()):
            return tries


def _check(settings: BenchSettings) -> None:
    separate = {
        "device": settings.device != "local",
        "affinity": settings.affinity,
        "processes": settings.processes,
        "batch": settings.batch > 1,
        "python": settings.python,
        "emulated": settings.emulated,
    }
    if names := [f"--{name}" for name, given in separate.items() if given]:
        raise InputError(f"--ab runs all bundles in one process on this machine: leave out {', '.join(names)}")
    if len(settings.bundles) < 2:
        raise InputError("--ab compares every other bundle with the first: give two bundles or more")
    if len({folder.resolve() for folder in settings.folders}) < len(settings.bundles):
        raise InputError("--ab was given the same bundle twice: give each once")


def _wrong_outputs(folder: Path, session: Session, images: np.ndarray, known: dict[Path, np.ndarray]) -> list[str]:
    """Reasons to doubt a bundle's outputs in this very session."""
    bundle = load_bundle(folder)
    answers = session.run(images)
    reference = find_reference(folder, bundle, images, known)
    return check_outputs(answers, np.ones(len(images), dtype=bool), reference, bundle)[1]


def _save(folder: Path, ours: list[np.ndarray], theirs: list[np.ndarray], started: str) -> tuple[str, str]:
    """Save raw samples, int64 ns of each block in order: ``bundle_i`` and ``against_i`` are a pair."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"bundle_{i}": block for i, block in enumerate(ours)}
    arrays |= {f"against_{i}": block for i, block in enumerate(theirs)}
    np.savez_compressed(buffer, **arrays)
    digest = sha256_bytes(buffer.getvalue())
    name = f"ab-{started[:19].replace(':', '')}-{digest[:8]}.npz"
    write_bytes(folder / name, buffer.getvalue())
    return name, digest
