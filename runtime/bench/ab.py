"""Each bundle against the first, in alternating blocks of one process: the ratio of latencies, and if it counts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from robx.errors import InputError
from robx.images.sources import ImageSource
from robx.records import Validity, Value, load_bundle, utc_now
from robx.runtime.bench import latency, validity
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.interleave import interleave
from robx.runtime.bench.reference import check_outputs, find_reference
from robx.runtime.session import Session, SessionSettings, open_session
from robx.store.files import sha256_bytes, write_bytes

BLOCKS = 20  # of each bundle: the bootstrap's interval wants ten or more


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One bundle against another; the raw samples of both lie in `samples`, beside the bundle."""

    bundle: str
    against: str
    ratio: Value  # the bundle's latency over the other's
    verdict: Validity
    reasons: tuple[str, ...]  # against either of the two
    samples: str
    samples_sha256: str
    started: str
    runtime: tuple[dict[str, Any], dict[str, Any]]  # what the two engines say of themselves

    @property
    def claim(self) -> str:
        """What may be said; faster or slower only where the interval excludes 1."""
        if self.verdict == "INVALID":
            return "INVALID"
        low, high = self.ratio.low or 0.0, self.ratio.high or 0.0
        return "faster" if high < 1 else "slower" if low > 1 else "no difference shown"


def compare(
    folders: Sequence[Path],
    settings: SessionSettings,
    *,
    seconds: float,
    source: ImageSource | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare each of `folders` but the first with the first; `seconds` is for each bundle, all blocks together.

    Raises:
        InputError: fewer than two bundles, the same one twice, or bundles of different preprocessing.
    """
    if len(folders) < 2:
        raise InputError("--ab compares the others with the first: give two bundles or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("--ab was given the same bundle twice: give each once")
    shapes = {load_bundle(folder).preprocessing for folder in folders}
    if len(shapes) > 1:
        raise InputError("--ab needs bundles of one preprocessing: they are to run the same images")
    started, images = utc_now(), load_inputs(shapes.pop(), source).images
    with contextlib.ExitStack() as stack:
        one = replace(settings, batch=1)
        sessions = {str(folder): stack.enter_context(open_session(folder, one)) for folder in folders}
        blocks = interleave(sessions, images, blocks=BLOCKS, seconds=seconds / BLOCKS, seed=seed)
        known: dict[Path, np.ndarray] = {}
        reasons = [_wrong(folder, sessions[str(folder)], images, known) for folder in folders]
        facts = [sessions[str(folder)].facts() for folder in folders]
    first, found = blocks[str(folders[0])], []
    for place, folder in enumerate(folders[1:], 1):
        ours = blocks[str(folder)]
        both = ((folders[0], reasons[0]), (folder, reasons[place]))
        name, digest = _save(folder, ours, first, started)
        found.append(
            Comparison(
                bundle=str(folder),
                against=str(folders[0]),
                ratio=latency.paired_ratio(ours, first),
                verdict=validity.verdict([*reasons[0], *reasons[place]]),
                reasons=tuple(f"{reason} ({one.name})" for one, wrong in both for reason in wrong),
                samples=name,
                samples_sha256=digest,
                started=started,
                runtime=(facts[place], facts[0]),
            )
        )
    return found


def _wrong(folder: Path, session: Session, images: np.ndarray, known: dict[Path, np.ndarray]) -> list[str]:
    """What speaks against a bundle's answers in this very session."""
    bundle = load_bundle(folder)
    answers = session.run(images)
    reference = find_reference(folder, bundle, images, known)
    return check_outputs(answers, np.ones(len(images), dtype=bool), reference, bundle)[1]


def _save(folder: Path, ours: list[np.ndarray], theirs: list[np.ndarray], started: str) -> tuple[str, str]:
    """Raw samples, int64 ns of each block in order: ``bundle_i`` and ``against_i`` are a pair."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"bundle_{i}": block for i, block in enumerate(ours)}
    arrays |= {f"against_{i}": block for i, block in enumerate(theirs)}
    np.savez_compressed(buffer, **arrays)
    digest = sha256_bytes(buffer.getvalue())
    name = f"ab-{started[:19].replace(':', '')}-{digest[:8]}.npz"
    write_bytes(folder / name, buffer.getvalue())
    return name, digest
