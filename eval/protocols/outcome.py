"""What a protocol takes and returns: a model that is open, and what was measured of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robx.eval.datasets.features import Features
from robx.progress import Progress
from robx.records import Json, Value
from robx.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Model:
    """An opened student or bundle, and how its features are extracted."""

    folder: Path
    session: Session
    extract: Callable[..., Features]  # features.extract with its settings bound
    threads: int
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one protocol measured: its name in records, the values, and the settings that they depend on."""

    protocol: str
    values: dict[str, Value]
    settings: dict[str, Json]
