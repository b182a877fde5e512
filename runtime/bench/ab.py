"""Compare each bundle with the first one in alternating blocks of one process: the ratio of their latencies."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import InputError
from robx.images.decode import renormalise
from robx.records import Validity, Value, load_bundle, require_measurable, utc_now, warn_outdated
from robx.runtime.bench import latency, profiles, validity
from robx.runtime.bench.inputs import load_inputs, open_images
from robx.runtime.bench.interleave import Interleaved, interleave
from robx.runtime.bench.profiles import BenchSettings, find_profile
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


def compare(settings: BenchSettings, *, say: Callable[[str], None] = lambda _: None) -> list[Comparison]:
    """Compare each of `settings.bundles` but the first with the first, on this machine.

    Each bundle is timed for the profile's seconds, divided into BLOCKS blocks. An UNSTABLE measurement is repeated, up
    to `settings.retries` times and within profiles.RETRY_SECONDS; the one with the fewest reasons against it counts.
    `say` is called with a line about a bundle that should not be used any more, or that a setting has no effect on.

    Raises:
        InputError: fewer than two bundles, the same bundle twice, bundles of different input sizes, or a setting
            that only a benchmark in separate processes has.
    """
    _check(settings)
    images = _load_images(settings, say)
    bundles = [load_bundle(folder) for folder in settings.folders]
    if unused := profiles.unused_threads(settings, bundles):
        say(unused)
    for folder, bundle in zip(settings.folders, bundles, strict=True):
        warn_outdated(folder, bundle, say)
    started, one_image = utc_now(), replace(settings.session, batch=1)
    with contextlib.ExitStack() as stack:
        sessions = {
            label: stack.enter_context(open_session(folder, one_image))
            for label, folder in zip(settings.labels, settings.folders, strict=True)
        }
        tries = _time(sessions, images, settings)
        wrong = _wrong_outputs(sessions, images, settings)
        facts = {label: session.facts() for label, session in sessions.items()}
    timed = min(tries, key=lambda one: len(one.reasons()))
    (base, *labels), (base_folder, *folders) = settings.labels, settings.folders
    found = []
    for label, folder in zip(labels, folders, strict=True):
        reasons = (*wrong[base], *wrong[label], *timed.reasons(base, label))
        name, digest = _save(folder, timed.blocks[label], timed.blocks[base], started)
        found.append(
            Comparison(
                bundle=str(folder),
                against=str(base_folder),
                ratio=latency.paired_ratio(timed.blocks[label], timed.blocks[base]),
                verdict=validity.verdict(reasons),
                reasons=reasons,
                samples=name,
                samples_sha256=digest,
                started=started,
                runtime=(facts[label], facts[base]),
                tries=tuple(tuple(one.reasons()) for one in tries) if len(tries) > 1 else (),
            )
        )
    return found


def _load_images(settings: BenchSettings, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """The same images for every bundle, normalised as each expects them; float32 (N, 3, H, W) by label."""
    shapes = [load_bundle(folder).preprocessing for folder in settings.folders]
    if not all(shapes[0].same_pixels(shape) for shape in shapes):
        raise InputError("--ab needs bundles of the same input size and resize: they have to run the same images")
    pixels = load_inputs(shapes[0], open_images(settings, say)).images
    return {label: renormalise(pixels, shapes[0], shape) for label, shape in zip(settings.labels, shapes, strict=True)}


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
        "runner": settings.runner,
        "python": settings.python,
        "emulated": settings.emulated,
    }
    if names := [f"--{name}" for name, given in separate.items() if given]:
        raise InputError(f"--ab runs all bundles in one process on this machine: leave out {', '.join(names)}")
    if len(settings.bundles) < 2:
        raise InputError("--ab compares every other bundle with the first: give two bundles or more")
    if len({folder.resolve() for folder in settings.folders}) < len(settings.bundles):
        raise InputError("--ab was given the same bundle twice: give each once")
    for folder in settings.folders[1:]:
        require_measurable(folder)


def _wrong_outputs(
    sessions: Mapping[str, Session], images: Mapping[str, np.ndarray], settings: BenchSettings
) -> dict[str, list[str]]:
    """Reasons to doubt each bundle's outputs in the timed session itself."""
    cache: dict[Path, np.ndarray] = {}
    found = {}
    for label, folder in zip(settings.labels, settings.folders, strict=True):
        bundle, own = load_bundle(folder), images[label]
        reference = find_reference(folder, bundle, own, cache)
        reasons = check_outputs(sessions[label].run(own), np.ones(len(own), dtype=bool), reference, bundle)[1]
        found[label] = [f"{reason} ({label})" for reason in reasons]
    return found


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
