"""One int8 (or float) candidate: which quantiser with which settings, and which layers stay in float."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from robx.errors import RobxError
from robx.records import Json, Precision

Quantiser = Literal["onnxruntime", "nncf", "tensorrt", "pt2e", "ai-edge", "converter", "none"]
RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]
RangeSource = RangeMethod | Literal["trained"]  # trained: with the healed weights; elsewhere by percentile
Activations = Literal["static", "dynamic", "float"]


class NotTried(RobxError):
    """What a candidate would be made from is missing, such as healed weights: the candidate itself did not fail."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Everything that determines the model file; stored in the manifest as the candidate's settings."""

    name: str
    precision: Precision = "int8"
    quantiser: Quantiser = "none"
    ranges: RangeSource = "minmax"
    percentile: float = 99.99
    signed: bool = False  # int8 activations without a zero point; otherwise uint8
    mean_ranges: bool = False  # NNCF and ai-edge: average the extremes of images or batches; else the overall ones
    asymmetric: bool = False  # NNCF: a zero point for activations that go below zero, as after a swish
    reduce_range: bool = False  # 7-bit weights: AVX2 without VNNI saturates on products of 8-bit values
    float_nodes: tuple[str, ...] = ()  # names of ONNX nodes that stay in float
    full_bias: bool = False  # NNCF: full bias correction instead of the fast one
    keep_bias: bool = False  # NNCF: no bias correction
    transformer: bool = False  # NNCF: quantise attention as a pattern
    smooth_alpha: float | None = None  # NNCF: SmoothQuant's alpha; None turns it off
    # Mobile formats. static: int8, with ranges from calibration. dynamic: float between layers, and quantised by each
    # layer at run time. float: only the weights are int8.
    activations: Activations = "static"
    weighted_only: bool = False  # mobile formats: only convolutions and linear layers are int8
    clipped_weights: bool = False  # ai-edge: clip a channel's largest weights (OCTAV), for a smaller scale
    healed: bool = False  # made from healed weights instead of the student's own

    @property
    def careful(self) -> bool:
        """Whether it trades speed or minutes of work for accuracy: not needed if a plain candidate is accurate."""
        return bool(self.float_nodes or self.full_bias)

    def keeps_no_less_float_than(self, other: Candidate) -> bool:
        """Whether this one keeps every layer in float that `other` does, and so cannot be faster."""
        return {*other.float_nodes} <= {*self.float_nodes}

    @property
    def form(self) -> Candidate:
        """What determines its speed: candidates that differ only in their numbers have one graph and one speed."""
        numbers = Candidate(name="")
        same = ("name", "ranges", "percentile", "mean_ranges", "full_bias", "keep_bias", "healed")
        return replace(self, **{name: getattr(numbers, name) for name in same})

    @property
    def family(self) -> Candidate:
        """What it has in common with candidates that keep more layers in float: if it is slow, they are slower."""
        return replace(self.form, float_nodes=())

    def settings(self) -> dict[str, Json]:
        """The fields that differ from their defaults, for the manifest."""
        plain = asdict(Candidate(name=self.name))
        own = {key: value for key, value in asdict(self).items() if value != plain[key] and key != "precision"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
