"""One candidate of the INT8 ladder: which quantiser, with which settings, and what stays in float."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from robx.records import Json, Precision

Quantiser = Literal["onnxruntime", "nncf", "tensorrt", "converter", "none"]
RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Everything that decides what a rung's model is; written into the manifest as the rung's settings."""

    name: str
    precision: Precision = "int8"
    quantiser: Quantiser = "none"
    ranges: RangeMethod = "minmax"
    percentile: float = 99.99
    signed: bool = False  # int8 activations, without a zero point; else uint8
    mean_ranges: bool = False  # NNCF: the mean of every image's extremes, its default, in place of the extremes of all
    asymmetric: bool = False  # NNCF: activations with a zero point where they go below zero, as after a swish
    reduce_range: bool = False  # 7-bit weights: AVX2 without VNNI saturates on 8-bit products
    float_ops: tuple[str, ...] = ()  # operator types that stay in float
    float_nodes: tuple[str, ...] = ()  # nodes that stay in float
    equalize: bool = False  # cross-layer equalisation before quantising
    full_bias: bool = False  # full bias correction instead of the fast one
    transformer: bool = False
    smooth_alpha: float | None = None  # SmoothQuant; None: off

    @property
    def careful(self) -> bool:
        """Whether it trades speed, or minutes of work, for accuracy: no use where a plain one is accurate."""
        return bool(self.float_ops or self.float_nodes or self.full_bias)

    def leaves_no_less_than(self, other: Candidate) -> bool:
        """Whether it leaves all in float that `other` does: then it is not faster."""
        return {*other.float_ops} <= {*self.float_ops} and {*other.float_nodes} <= {*self.float_nodes}

    @property
    def form(self) -> Candidate:
        """What decides its speed: candidates whose numbers alone differ have one graph and run as fast."""
        return replace(
            self, name="", ranges="minmax", percentile=99.99, mean_ranges=False, equalize=False, full_bias=False
        )

    @property
    def family(self) -> Candidate:
        """What it shares with those that leave more in float: where it is slow, they are slower."""
        return replace(self.form, float_ops=(), float_nodes=())

    def settings(self) -> dict[str, Json]:
        """What differs from the defaults, for the manifest."""
        plain = asdict(Candidate(name=self.name))
        own = {key: value for key, value in asdict(self).items() if value != plain[key] and key != "precision"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
