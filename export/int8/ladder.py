"""The int8 candidates of each format, from plain to careful. Pure; the gate picks the best of them.

First static quantisation with several range rules (ViT: several SmoothQuant alphas, and none), then full bias
correction, then the most sensitive layers, as measured, back in float. For ExecuTorch and LiteRT the candidates differ
in which operators are int8, in ranges, clipped weights, and activations that are float between layers; all have zero
points, which cost their kernels nothing.

Left out, because they never shipped on any model of ``benchmarks/results/export-table*.json``: cross-layer equalisation
and bias correction on ONNX (Nagel et al. 2019), stem, last layers or squeeze-and-excitation in float, and NNCF's
quantile ranges.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import GraphFacts
from robx.formats import FORMATS, Format

# Published results disagree on the best alpha (.15 for ViT-B, none for Swin-B; NNCF's default is .95), so it is
# searched. ViT-Tiny of the export table ships with .95.
SMOOTH_ALPHAS = (0.5, 0.15, 0.95)
# Largest share of the layers that goes back to float: beyond it, little int8 is left.
LARGEST_FLOAT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the target's CPU and this installation support."""

    vnni: bool = False  # x86 dot products of 8-bit values that do not saturate
    arm: bool = False
    nncf: bool = True

    @property
    def saturates(self) -> bool:
        """Whether sums of 8-bit products saturate, as with AVX2 alone on x86: weights then get 7 bits."""
        return not self.arm and not self.vnni


def machine_of(device: str) -> Machine:
    """What `device` supports: this machine's CPU for "local", an ARM CPU for "arm64" and Jetsons."""
    nncf = importlib.util.find_spec("nncf") is not None
    if device == "local":
        vnni = bool({"avx512_vnni", "avx_vnni"} & _cpu_flags())
        return Machine(vnni=vnni, arm=platform.machine() in ("aarch64", "arm64"), nncf=nncf)
    return Machine(arm=device.startswith(("arm", "jetson")), nncf=nncf)


def ladder(fmt: Format, facts: GraphFacts, machine: Machine) -> list[Candidate]:
    """The int8 candidates of a format before layer sensitivity is measured, from plain to careful."""
    match FORMATS[fmt].quantiser:
        case "onnxruntime":
            return _onnx_ladder(facts, machine)
        case "nncf":
            return _nncf_vit_ladder(machine) if facts.kind == "vit" else _nncf_cnn_ladder(machine)
        case "tensorrt":
            return _trt_ladder(facts, machine)
        case "pt2e":
            return _pt2e_ladder(facts)
        case "ai-edge":
            return _ai_edge_ladder(facts)
        case _:  # the converter's own; the builder of a format without int8 refuses it
            return [Candidate(name="the converter's own", quantiser="converter")]


def sensitive_candidates(best: Candidate, ranking: Sequence[str], tried: Sequence[Candidate] = ()) -> list[Candidate]:
    """Candidates like `best` with the 1, 2, 4, ... most sensitive layers of `ranking` (worst first) back in float.

    A candidate that is in `tried` already, whatever its name, gets one more layer instead.
    """
    left = [name for name in ranking if name not in best.float_nodes]
    most = round(LARGEST_FLOAT_SHARE * len(ranking))
    known = {_content(candidate) for candidate in tried}
    found: list[Candidate] = []
    count = 1
    while count <= most and count < len(left):
        layers = "worst layer" if count == 1 else f"{count} worst layers"
        kept = (*best.float_nodes, *left[:count])
        candidate = dataclasses.replace(best, name=f"{best.name}, {layers} in float", float_nodes=kept)
        if _content(candidate) in known:
            count += 1
        else:
            found.append(candidate)
            count *= 2
    return found


def healed_candidates(plain: Sequence[Candidate]) -> list[Candidate]:
    """The same candidates, made from the healed weights.

    For CNNs, ONNX Runtime's quantiser, TensorRT's form and, in OpenVINO's graphs, NNCF also get one with the activation
    ranges that were trained with the weights. Biases were trained with int8 simulated, and NNCF's fast correction would
    spoil them. Candidates with float activations are left out, as healing improves int8 activations.
    """
    takes_ranges = [
        c for c in plain if c.quantiser in ("onnxruntime", "tensorrt") or (c.quantiser == "nncf" and c.asymmetric)
    ]
    is_cnn = not any(c.transformer for c in plain)
    trained = [_with_trained_ranges(c) for c in takes_ranges[:1] if is_cnn]
    return [
        dataclasses.replace(
            c, name=f"{c.name}, healed", healed=True, keep_bias=c.quantiser == "nncf" and not c.full_bias
        )
        for c in (*trained, *plain)
        if c.activations != "float" and not c.keep_bias
    ]


def _with_trained_ranges(static: Candidate) -> Candidate:
    name = {"nncf": "nncf, asymmetric", "tensorrt": "symmetric"}.get(static.quantiser, "static")
    return dataclasses.replace(static, name=f"{name}, trained ranges", ranges="trained", mean_ranges=False)


def _content(candidate: Candidate) -> Candidate:
    """The candidate without its name and the order of its float nodes, for comparisons."""
    return dataclasses.replace(candidate, name="", float_nodes=tuple(sorted(set(candidate.float_nodes))))


def _onnx_ladder(facts: GraphFacts, machine: Machine) -> list[Candidate]:
    plain = Candidate(
        name="static, min-max",
        quantiser="onnxruntime",
        signed=machine.arm,
        reduce_range=machine.saturates,
    )
    if facts.kind == "vit":
        # Only NNCF quantises attention as a pattern, so ONNX Runtime's own quantiser comes last.
        return [*(_nncf_vit_ladder(machine) if machine.nncf else []), plain]
    return [
        plain,
        dataclasses.replace(plain, name="static, percentile 99.99", ranges="percentile"),
        dataclasses.replace(plain, name="static, least squared error", ranges="mse"),
        dataclasses.replace(plain, name="static, entropy", ranges="entropy"),
    ]


def _nncf_cnn_ladder(machine: Machine) -> list[Candidate]:
    plain = Candidate(name="nncf", quantiser="nncf", mean_ranges=True, reduce_range=machine.saturates)
    asymmetric = dataclasses.replace(plain, name="nncf, asymmetric", asymmetric=True)
    whole = dataclasses.replace(asymmetric, name="nncf, asymmetric, min-max", mean_ranges=False)
    # The fast correction gives a layer the mean of its input, whose rounding is not the mean of the rounding: on the
    # demo's resnet10t, whose activations are mostly below one step, it triples the error. The full one takes minutes.
    bare = dataclasses.replace(whole, name="nncf, asymmetric, min-max, no bias correction", keep_bias=True)
    full = dataclasses.replace(whole, name="nncf, asymmetric, min-max, full bias correction", full_bias=True)
    return [plain, asymmetric, whole, bare, full]


def _nncf_vit_ladder(machine: Machine) -> list[Candidate]:
    plain = Candidate(
        name="nncf, no SmoothQuant",
        quantiser="nncf",
        transformer=True,
        mean_ranges=True,
        reduce_range=machine.saturates,
    )
    first, *others = (
        dataclasses.replace(plain, name=f"nncf, SmoothQuant {alpha}", smooth_alpha=alpha) for alpha in SMOOTH_ALPHAS
    )
    return [first, plain, *others]


def _trt_ladder(facts: GraphFacts, machine: Machine) -> list[Candidate]:
    plain = Candidate(name="symmetric, min-max", quantiser="tensorrt", signed=True)
    found = [
        plain,
        dataclasses.replace(plain, name="symmetric, entropy", ranges="entropy"),
        dataclasses.replace(plain, name="symmetric, least squared error", ranges="mse"),
    ]
    if facts.kind == "vit" and machine.nncf:
        found += [dataclasses.replace(c, signed=True, reduce_range=False) for c in _nncf_vit_ladder(machine)]
    return found


def _pt2e_ladder(facts: GraphFacts) -> list[Candidate]:
    plain = Candidate(name="static, all operators", quantiser="pt2e")
    weighted = dataclasses.replace(plain, name="static, weighted layers only", weighted_only=True)
    static = [
        candidate
        for extremes in (plain, weighted)
        for candidate in (
            extremes,
            dataclasses.replace(extremes, name=f"{extremes.name}, least squared error", ranges="mse"),
        )
    ]
    # The last resort before fp32: activations are float between layers. First for a ViT, whose static int8 is broken.
    dynamic = dataclasses.replace(plain, name="dynamic activations", activations="dynamic")
    return [dynamic, *static] if facts.kind == "vit" else [*static, dynamic]


def _ai_edge_ladder(facts: GraphFacts) -> list[Candidate]:
    # XNNPACK runs a whole network with LayerNorm or squeeze-and-excitation only if it is float between the weighted
    # layers: a ViT that is int8 throughout is cut into a hundred partitions, and slower than fp32.
    weighted = Candidate(name="static, weighted layers only", quantiser="ai-edge", weighted_only=True)
    dynamic = Candidate(name="dynamic activations", quantiser="ai-edge", activations="dynamic")
    clipped = dataclasses.replace(weighted, name=f"{weighted.name}, clipped weights", clipped_weights=True)
    if facts.kind == "vit":
        return [weighted, clipped, dynamic]
    plain = dataclasses.replace(weighted, name="static, all operators", weighted_only=False)
    static = [
        candidate
        for extremes in (weighted, clipped, plain)
        for candidate in (
            extremes,
            # Better where few images have outliers, as in EfficientNet-B0; worse in MobileNetV3.
            dataclasses.replace(extremes, name=f"{extremes.name}, mean of extremes", mean_ranges=True),
        )
    ]
    # The last resorts before fp32: float activations between layers, or everywhere.
    weights = dataclasses.replace(dynamic, name="int8 weights, float activations", activations="float")
    return [*static, dynamic, weights]


def _cpu_flags() -> set[str]:
    """The CPU's instruction sets as Linux lists them; empty elsewhere, which picks the form that is safe anywhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
