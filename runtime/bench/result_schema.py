"""The types of a device's JSON. Everything is checked here, once, so that no code behind it has to distrust it."""

from __future__ import annotations

from typing import Any, TypedDict

from robx.errors import ArtifactError, DeviceError
from robx.store.dataclass_json import check_json, parse_json

# Durations, byte counts and temperatures all stay below it, and sums of numbers below it stay finite.
_LARGEST = 2.0**63


class Cpu(TypedDict):
    """The processor."""

    model: str | None
    cores: int | None
    usable_cores: int | None
    governor: str | None


class Watched(TypedDict):
    """Which sensors the device has."""

    clocks: bool
    temperatures: bool
    throttling: bool
    load: bool
    energy: str


class Device(TypedDict):
    """The device's description of itself."""

    host: str | None
    arch: str | None
    os: str | None
    python: str | None
    board: str | None
    memory_bytes: int | None
    accelerator: str | None
    emulated: str | None
    energy_counter: str | None
    cpu: Cpu
    watched: Watched


class DoctorAnswer(TypedDict):
    """What ``runner --doctor`` prints."""

    facts: Device
    packages: dict[str, Any]


class Memory(TypedDict):
    """Resident memory of the process, in bytes."""

    now: int
    peak: int


class CoolDown(TypedDict):
    """Whether the device reached its resting temperature before the run."""

    reached: bool


class Report(TypedDict):
    """result.json of any run."""

    timed: bool
    device: Device
    facts: dict[str, Any]
    load_ns: int
    first_ns: int
    memory: Memory | None
    memory_before: Memory | None
    throttled: list[str] | None
    cores: list[int] | None
    environment: dict[str, Any]
    cool_down: CoolDown


class Energy(TypedDict):
    """One reading of an energy counter."""

    joules: float | None
    reason: str | None


class EnergyPair(TypedDict):
    """The counter before and after the timed window."""

    before: Energy
    after: Energy


class GpuReading(Energy):
    """One reading of NVML."""

    memory: int | None
    throttled: list[str]


class GpuPair(TypedDict):
    """NVML before and after the timed window."""

    before: GpuReading
    after: GpuReading


class WarmUp(TypedDict):
    """Whether latency had settled at the end of the warm-up."""

    steady: bool


class TimedReport(Report):
    """result.json of a timed run."""

    warm_up: WarmUp
    window: list[float]
    wall_seconds: float
    cpu_seconds: float
    energy: EnergyPair
    gpu: GpuPair | None


class Jiffies(TypedDict):
    """CPU time of the whole machine, in kernel ticks."""

    busy: int
    steal: int
    total: int


class Snapshot(TypedDict):
    """One line of telemetry.jsonl."""

    t: float
    jiffies: Jiffies | None
    khz: list[float] | None
    celsius: list[float] | None
    cooling: list[float]
    cgroup_throttled: int | None
    milliwatt: float | None
    own: int


def parse(text: str | bytes) -> Any:
    """JSON without NaN, infinity, huge numbers or deep nesting.

    Raises:
        DeviceError: it is not that.
    """
    try:
        return parse_json(text, limit=_LARGEST)
    except ValueError as error:
        raise DeviceError(f"the device sent invalid JSON ({str(error)[:80]}): run it again") from error


def check(value: Any, kind: Any, where: str) -> Any:
    """`value`, when it matches the TypedDict `kind`; further keys are allowed.

    Raises:
        DeviceError: it does not match; the message names the key.
    """
    try:
        return check_json(kind, value, where=where)
    except ArtifactError as error:
        raise DeviceError(f"the device sent an unexpected {error}: run it again") from None
