"""What a bench is asked for, and how long it runs.

The lengths are MLPerf Mobile's rapid, quick and normal ones, and MLPerf Inference's ten minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from robx.errors import InputError
from robx.runtime.session import SessionSettings


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Queries and seconds are totals over the fresh processes, and both must be reached."""

    name: str
    queries: int
    seconds: float
    processes: int
    warm_up_seconds: float  # the least of each process
    warm_up_limit: float  # after it a process counts as not steady
    cool_down_seconds: float  # the longest wait before each process
    max_seconds: float  # of timed queries over all processes; then the run is INVALID
    publishable: bool  # rapid and quick figures are for oneself


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="rapid",
            queries=64,
            seconds=6,
            processes=3,
            warm_up_seconds=0.3,
            warm_up_limit=3,
            cool_down_seconds=0,
            max_seconds=120,
            publishable=False,
        ),
        Profile(
            name="quick",
            queries=128,
            seconds=10,
            processes=3,
            warm_up_seconds=1,
            warm_up_limit=10,
            cool_down_seconds=60,
            max_seconds=300,
            publishable=False,
        ),
        Profile(
            name="standard",
            queries=1024,
            seconds=60,
            processes=5,
            warm_up_seconds=1,
            warm_up_limit=60,
            cool_down_seconds=300,
            max_seconds=600,
            publishable=True,
        ),
        Profile(
            name="mlperf",
            queries=1024,
            seconds=600,
            processes=1,
            warm_up_seconds=2,
            warm_up_limit=60,
            cool_down_seconds=300,
            max_seconds=3600,
            publishable=True,
        ),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}: one of {', '.join(PROFILES)}")
    return PROFILES[name]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how; every field stands in the record."""

    device: str = "local"  # local, ssh://[user@]host[:port] or adb://serial
    profile: str = "quick"  # of PROFILES
    settings: SessionSettings = field(default_factory=SessionSettings)
    processes: int | None = None  # None: the profile's
    affinity: tuple[int, ...] | None = None  # cores that the measured process may use; None: any
    batch: int = 1  # more than one is offline throughput
    python: str | None = None  # the device's Python command
    emulated: bool = False  # an emulated processor: refuse latency, keep the answers
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        find_profile(self.profile)
        for name, number in (("processes", self.processes), ("batch", self.batch)):
            if number is not None and number < 1:
                raise InputError(f"{name} is {number}: give 1 or more")
