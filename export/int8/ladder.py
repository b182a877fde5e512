"""The INT8 rungs, from plain to careful; pure. climb.py takes the best, and goes as far up as accuracy asks.

plain static -> other ranges -> stem, last products, squeeze-excite, softmax, norms and gates in float -> CNN:
cross-layer equalisation, full bias correction; ViT: SmoothQuant alphas, off included -> the worst layers by measured
sensitivity back to float -> fp16 -> fp32.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robx.errors import InputError
from robx.export.int8.candidate import Candidate
from robx.export.int8.graph_facts import FLOAT_OPS, GraphFacts
from robx.records import Format

# Published results differ on which alpha serves (.15 for ViT-B, none for Swin-B; NNCF takes .95): it is searched.
SMOOTH_ALPHAS = (0.5, 0.15, 0.95)
# Of all layers, by measured sensitivity, at most this share goes back to float; with more there is little int8 left.
LARGEST_FLOAT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the target's CPU and this installation offer."""

    vnni: bool = False  # x86 dot products that do not saturate
    arm: bool = False
    nncf: bool = True


def machine_of(device: str) -> Machine:
    """What `device` offers: this machine's CPU for "local", an ARM for "arm64" and the like."""
    nncf = importlib.util.find_spec("nncf") is not None
    if device == "local":
        flags = _cpu_flags()
        vnni = bool({"avx512_vnni", "avx_vnni"} & flags)
        return Machine(vnni=vnni, arm=platform.machine() in ("aarch64", "arm64"), nncf=nncf)
    return Machine(arm=device.startswith(("arm", "jetson")), nncf=nncf)


def ladder(fmt: Format, facts: GraphFacts, machine: Machine) -> list[Candidate]:
    """The int8 candidates of a format before sensitivity is measured, from plain to careful."""
    if fmt in ("onnx", "ort"):
        return _onnx_ladder(facts, machine)
    if fmt == "openvino":
        return _nncf_ladder(facts, transformer=facts.kind == "vit")
    if fmt == "trt":
        return _trt_ladder(facts, machine)
    return [Candidate(name="the converter's own", quantiser="converter")]


def sensitive_rungs(best: Candidate, ranking: Sequence[str], tried: Sequence[Candidate] = ()) -> list[Candidate]:
    """Candidates like `best` with more and more layers back in float, the worst first in `ranking`: 1, 2, 4, ...

    A set of layers that `tried` holds with the same settings is made one layer larger instead.
    """
    left = [name for name in ranking if name not in best.float_nodes]
    most = round(LARGEST_FLOAT_SHARE * len(ranking))
    known = {_content(candidate) for candidate in tried}
    rungs: list[Candidate] = []
    count = 1
    while count <= most and count < len(left):
        said = "worst layer" if count == 1 else f"{count} worst layers"
        kept = (*best.float_nodes, *left[:count])
        rung = dataclasses.replace(best, name=f"{best.name}, {said} in float", float_nodes=kept)
        if _content(rung) in known:
            count += 1
        else:
            rungs.append(rung)
            count *= 2
    return rungs


def _content(candidate: Candidate) -> Candidate:
    """What a candidate does: its name, and the order of the nodes, are of no matter."""
    return dataclasses.replace(candidate, name="", float_nodes=tuple(sorted(set(candidate.float_nodes))))


def limit(rungs: list[Candidate], count: int | None) -> list[Candidate]:
    """The first `count` rungs; None: all.

    Raises:
        InputError: a count that is not positive.
    """
    if count is not None and count < 1:
        raise InputError(f"--rungs {count} tries nothing: give 1 or more")
    return rungs[:count]


def _onnx_ladder(facts: GraphFacts, machine: Machine) -> list[Candidate]:
    plain = Candidate(
        name="static, min-max",
        quantiser="onnxruntime",
        signed=machine.arm,
        reduce_range=not machine.arm and not machine.vnni,
    )
    if facts.kind == "vit":
        # Attention quantised as a pattern, which only NNCF does here; ONNX Runtime's own rungs follow.
        nncf = _nncf_ladder(facts, transformer=True) if machine.nncf else []
        return [*nncf, plain, _careful(plain, facts)]
    careful = _careful(plain, facts)
    return [
        plain,
        dataclasses.replace(plain, name="static, percentile 99.99", ranges="percentile"),
        dataclasses.replace(plain, name="static, least squared error", ranges="mse"),
        dataclasses.replace(plain, name="static, entropy", ranges="entropy"),
        careful,
        dataclasses.replace(careful, name="equalised, stem, last and gates in float", equalize=True),
        dataclasses.replace(careful, name="full bias correction, stem, last and gates in float", full_bias=True),
    ]


def _nncf_ladder(facts: GraphFacts, *, transformer: bool) -> list[Candidate]:
    plain = Candidate(name="nncf", quantiser="nncf", transformer=transformer, mean_ranges=True)
    kept = _careful_nodes(facts)
    if transformer:
        smooth = [
            dataclasses.replace(plain, name=f"nncf, SmoothQuant {alpha}", smooth_alpha=alpha) for alpha in SMOOTH_ALPHAS
        ]
        careful = dataclasses.replace(smooth[0], name=f"{smooth[0].name}, stem and last in float", float_nodes=kept)
        return [smooth[0], dataclasses.replace(plain, name="nncf, no SmoothQuant"), careful, *smooth[1:]]
    # NNCF's quantiles are left out: of the benchmark's five CNNs four lost 6 points or more by them.
    asymmetric = dataclasses.replace(plain, name="nncf, asymmetric", asymmetric=True)
    whole = dataclasses.replace(asymmetric, name="nncf, asymmetric, min-max", mean_ranges=False)
    return [
        plain,
        asymmetric,
        whole,
        dataclasses.replace(whole, name="nncf, asymmetric, min-max, full bias correction", full_bias=True),
        dataclasses.replace(plain, name="nncf, equalised, full bias correction", equalize=True, full_bias=True),
        dataclasses.replace(whole, name="nncf, asymmetric, min-max, stem, last and gates in float", float_nodes=kept),
    ]


def _trt_ladder(facts: GraphFacts, machine: Machine) -> list[Candidate]:
    plain = Candidate(name="symmetric, min-max", quantiser="tensorrt", signed=True)
    kept = _careful_nodes(facts)
    rungs = [
        plain,
        dataclasses.replace(plain, name="symmetric, entropy", ranges="entropy"),
        dataclasses.replace(plain, name="symmetric, least squared error", ranges="mse"),
        dataclasses.replace(plain, name="symmetric, stem, last and gates in float", ranges="mse", float_nodes=kept),
    ]
    if facts.kind == "cnn":
        careful, scope = rungs[-1], "stem, last and gates in float"
        rungs.append(dataclasses.replace(careful, name=f"equalised, {scope}", equalize=True))
        rungs.append(dataclasses.replace(careful, name=f"full bias correction, {scope}", full_bias=True))
    elif machine.nncf:
        rungs += [dataclasses.replace(c, signed=True) for c in _nncf_ladder(facts, transformer=True)]
    return rungs


def _careful_nodes(facts: GraphFacts) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*facts.first, *facts.last, *facts.squeeze_excite)))


def _careful(plain: Candidate, facts: GraphFacts) -> Candidate:
    return dataclasses.replace(
        plain,
        name="static, stem, last and gates in float",
        float_nodes=_careful_nodes(facts),
        float_ops=FLOAT_OPS if facts.squeeze_excite or facts.kind == "vit" else (),
    )


def _cpu_flags() -> set[str]:
    """The CPU's instruction sets, as Linux lists them; empty elsewhere, which picks the form that is right on all."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
