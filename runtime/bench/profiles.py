"""The settings of a benchmark, and the profiles that say how long it runs.

The lengths follow MLPerf Mobile's rapid, quick and normal runs, and MLPerf Inference's ten minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robx.errors import InputError, did_you_mean
from robx.formats import CPU_PROVIDERS, RUNTIMES
from robx.path_ends import path_ends
from robx.records import Bundle
from robx.runtime.session import SessionSettings, check_provider

RETRY_SECONDS = 600.0  # for measuring UNSTABLE bundles again, all of them together


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How long a benchmark runs. `queries` and `seconds` are totals over the processes; both must be reached."""

    name: str
    queries: int
    seconds: float
    processes: int
    warm_up_seconds: float  # minimum per process
    warm_up_limit: float  # a process that is not steady after this many seconds counts as unsteady
    cool_down_seconds: float  # longest wait before each process
    max_seconds: float  # of timed queries over all processes; a run that needs more is INVALID
    publishable: bool  # rapid and quick figures are for development only


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


_LAST_CORE = 4095
_OF_SESSION = {"threads", "provider", "precision_hint"}


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers from "0,2" or "4-7".

    Raises:
        InputError: it is neither.
    """
    cores: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            ends = int(first), int(last or first)
            if not 0 <= ends[0] <= ends[1] <= _LAST_CORE:
                raise ValueError(part)
            cores |= set(range(ends[0], ends[1] + 1))
    except ValueError:
        raise InputError(f"affinity {text!r} is not a list of cores: write 0,1 or 4-7") from None
    return tuple(sorted(cores))


def find_profile(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        InputError: no profile has that name.
    """
    if name not in PROFILES:
        hint = did_you_mean(name, PROFILES, otherwise=f"choose one of {', '.join(PROFILES)}")
        raise InputError(f"unknown profile {name!r}: {hint}")
    return PROFILES[name]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What `robx bench` measures and how; everything but the paths is written into the record."""

    bundles: Sequence[str | Path]  # folders written by robx export
    device: str = "local"  # local, ssh://[user@]host[:port] or adb://serial
    profile: str = "quick"  # a key of PROFILES
    session: SessionSettings = field(default_factory=SessionSettings)  # threads, provider, precision hint
    processes: int | None = None  # fresh processes per bundle; None: the profile's number
    affinity: tuple[int, ...] | None = None  # cores that the measured process may use; None: all of them
    batch: int = 1  # more than 1 measures offline throughput
    data: str | Path | None = None  # images to run; None: rendered scenes
    image_member: str | None = None  # which image of a tar sample to read when it has several ("rgb.jpg")
    runner: str | None = None  # python or native; None: Python where the device has one, else native
    python: str | None = None  # Python command on the device
    emulated: bool = False  # the processor is emulated: check the outputs, do not time them
    seed: int = 0  # of the order of the processes
    retries: int = 2  # times that an UNSTABLE bundle is measured again, if the reason may pass

    def __post_init__(self) -> None:
        """Reject settings that cannot be measured."""
        find_profile(self.profile)
        check_provider(self.session.provider)
        if not self.bundles:
            raise InputError("no bundle was given: make one with robx export")
        for name, number in (("processes", self.processes), ("batch", self.batch)):
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        if self.image_member is not None and self.data is None:
            raise InputError("--image-member is about the images of --data: give --data too")
        timing = {"--processes": self.processes is not None, "--retries": self.retries != BenchSettings.retries}
        if self.emulated and (unused := [name for name, is_given in timing.items() if is_given]):
            raise InputError(f"--emulated checks the outputs and times nothing: leave out {', '.join(unused)}")
        if self.retries < 0:
            raise InputError(f"retries must be at least 0, got {self.retries}")
        if self.affinity is not None and not (self.affinity and all(0 <= core <= _LAST_CORE for core in self.affinity)):
            raise InputError(f"affinity must be core numbers of 0 to {_LAST_CORE}, got {list(self.affinity)}: give 0,1")

    @classmethod
    def of(cls, **values: Any) -> BenchSettings:
        """Settings from the keywords of ``robx.api.bench``: `affinity` may be text, and a path a string.

        Raises:
            InputError: settings that cannot be measured.
        """
        session = SessionSettings(**{name: values.pop(name) for name in _OF_SESSION & set(values)})
        cores = values.pop("affinity", None)
        affinity = parse_cores(cores) if isinstance(cores, str) else None if cores is None else tuple(cores)
        if values.get("data") is not None:
            values["data"] = Path(values["data"])
        return cls(session=session, affinity=affinity, **values)

    @property
    def process_count(self) -> int:
        """Processes per bundle and try."""
        return 1 if self.emulated else self.processes or find_profile(self.profile).processes

    @property
    def folders(self) -> list[Path]:
        """The bundles' folders."""
        return [Path(bundle) for bundle in self.bundles]

    @property
    def labels(self) -> list[str]:
        """A short name for each bundle that no other bundle has: as many of its last folders as that takes."""
        paths = [str(folder.resolve()) for folder in self.folders]
        distinct = list(dict.fromkeys(paths))
        ends = dict(zip(distinct, path_ends(distinct), strict=True))
        # A bundle that was given again has its number behind it.
        times = [paths[: place + 1].count(path) for place, path in enumerate(paths)]
        return [ends[path] + (f" ({time})" if time > 1 else "") for path, time in zip(paths, times, strict=True)]


def unused_threads(settings: BenchSettings, bundles: Sequence[Bundle]) -> str:
    """A warning that names the bundles for which ``--threads`` has no effect; empty where it was not given or counts.

    The engines refuse every other setting that they cannot apply.
    """
    threads, provider = settings.session.threads, settings.session.provider or "cpu"
    if threads == SessionSettings.threads:
        return ""
    on_cpu = provider.lower() in CPU_PROVIDERS
    pairs = zip(settings.labels, bundles, strict=True)
    names = [label for label, bundle in pairs if not (on_cpu and RUNTIMES[bundle.runtime].uses_cpu)]
    runs = "does not compute" if len(names) == 1 else "do not compute"
    return f"warning: --threads {threads} has no effect on {', '.join(names)}, which {runs} on the CPU" if names else ""
