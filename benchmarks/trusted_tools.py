"""robx's latency against that of two trusted tools; run it on an idle machine.

    OMP_NUM_THREADS=1 python benchmarks/trusted_tools.py runs/demo/student/openvino-int8 --name trusted-tools-64
    OMP_NUM_THREADS=1 python benchmarks/trusted_tools.py --networks resnet18 mobilenetv3_large_100

**One model**: in one process, on one opened model, in blocks of random order: robx's timed loop; MLCommons' loadgen
(SingleStream), which drives robx's Session; and, for OpenVINO, the loop of its benchmark_app on the same request. Only
the measurement differs. A tool's p50 and p90 are divided by those of robx's block in the same round; the table shows
the median over rounds with its 95 % bootstrap interval. A difference within 3 % counts as agreement.

**Own process**: each complete tool in a fresh process, in random order: robx bench, twice, to show how much two equal
processes differ; a bare loop around the engine (bare_loop.py); and benchmark_app (synchronous, one stream, the same
threads and precision, batch 1; it refuses a latency hint together with threads). This shows that the tools configure
the model equally, as far as the variation between processes allows.

benchmark_app reads OpenVINO's own timer, which starts when the input is in place and stops before the output is read,
and it runs one input. The row "robx, by OpenVINO's timer" reads that timer during robx's calls, in the same process.

The runner's time from its start to its first answer is compared with that of the bare script; the aim is at most 1.2
times as long. ``--networks`` makes bundles of timm networks with random weights, which are as fast as trained ones.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish, save_student, say
from other_tools import (
    OWN_TIMER,
    Figures,
    by_bare_loop,
    by_benchmark_app,
    by_robx,
    in_one_session,
    start_to_first_answer,
)

from robx.export.build import ExportSettings, export
from robx.export.request import ExportTarget
from robx.image_size import usual_preprocessing
from robx.records import Value, load_bundle, to_json
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.latency import paired_ratio
from robx.trunk import build_trunk

_AGREEMENT, _START = 0.03, 1.2


def make_bundles(networks: Sequence[str], size: int, out: Path) -> list[Path]:
    """fp32 bundles in ONNX and OpenVINO of networks with random weights; existing ones are reused."""
    folders = []
    for network in networks:
        student = out / f"{network}-{size}"
        if not (student / "student.json").is_file():
            save_student(random_trunk(network, size), network, student, size)
        for fmt in ("openvino", "onnx"):
            folder = student / f"{fmt}-fp32"
            if not (folder / "manifest.json").is_file():
                target = ExportTarget(format=fmt)
                export(ExportSettings(run=student, target=target, out=folder))
            folders.append(folder)
    return folders


def random_trunk(network: str, size: int) -> Any:
    """A trunk with BatchNorm statistics of rendered scenes, so that no activation becomes a denormal."""
    torch.manual_seed(0)
    trunk = build_trunk(network).train()
    images = torch.from_numpy(load_inputs(usual_preprocessing(size), None).images)
    with torch.no_grad():
        for start in range(0, len(images), 16):
            trunk(images[start : start + 16])
    return trunk.eval()


def compare(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds for one bundle."""
    with tempfile.TemporaryDirectory() as root:
        # Measure a copy: the bundle should not collect a benchmark's records.
        copy, images = Path(root) / folder.resolve().name, Path(root) / "images.npy"
        one: dict[str, list[Figures]] = {}
        own: dict[str, list[Figures]] = {}
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("measurements.jsonl", "samples-*"))
        np.save(images, load_inputs(load_bundle(folder).preprocessing, None).images)
        if not given.start_only:
            one = in_one_session(copy, images, given.threads, given.seconds, given.blocks)
            own = in_own_processes(copy, images, given)
        starts = start_to_first_answer(copy, images, given.threads, 2 * given.rounds)
    return {
        "bundle": f"{folder.resolve().parent.name}/{folder.resolve().name}",
        "one model": {"blocks": one, "to_robx": _ratios(one)},
        "own process": {"blocks": own, "to_robx": _ratios(own)},
        "starts": starts,
        "start_ratio": _ratio([ours for ours, _ in starts], [bare for _, bare in starts]),
    }


def in_own_processes(folder: Path, images: Path, given: argparse.Namespace) -> dict[str, list[Figures]]:
    """Run each tool in a fresh process, `given.rounds` times: name -> its rounds."""
    tools: dict[str, Callable[[Path, Path, int, float], Figures]]
    tools = {"robx": by_robx, "robx again": by_robx, "bare loop": by_bare_loop}
    if load_bundle(folder).runtime == "openvino":
        tools["benchmark_app"] = by_benchmark_app
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    shuffle = random.Random(0)
    for _ in range(given.rounds):
        for name in shuffle.sample(sorted(tools), len(tools)):
            found[name].append(tools[name](folder, images, given.threads, given.seconds))
    return found


def main() -> None:
    """Compare the tools on every bundle, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--networks", nargs="*", default=[], help="timm networks to export")
    parser.add_argument("--size", type=int, default=224, help="image size of --networks, in pixels")
    parser.add_argument("--out", type=Path, default=Path("runs/trusted-tools"), help="folder of --networks")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each tool on one model")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each tool in its own process")
    parser.add_argument("--seconds", type=float, default=1, help="seconds of each block and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start-only", action="store_true", help="measure only the time from start to first answer")
    parser.add_argument("--name", default="trusted-tools", help="name of the result")
    given = parser.parse_args()
    folders = [*given.bundles, *make_bundles(given.networks, given.size, given.out)]
    if not folders:
        parser.error("give bundles, or --networks to export")
    data = []
    for folder in folders:
        say(str(folder))
        data.append(compare(folder, given))
    if given.start_only:
        publish_starts(data, given)
        return
    publish(
        given.name,
        title="robx's latency against trusted tools",
        headings=("bundle", "how", "tool", "p50 ms", "p50 / robx's", "p90 ms", "p90 / robx's", "within 3 %"),
        rows=[row for found in data for row in _rows(found)],
        data=[to_json(found) for found in data],
        notes=_notes(data, given),
        settings={
            "blocks": given.blocks,
            "rounds": given.rounds,
            "seconds": given.seconds,
            "threads": given.threads,
            "batch": 1,
        },
    )


def publish_starts(data: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write the table of --start-only."""
    rows = []
    for found in data:
        runner, bare = np.median(found["starts"], axis=0)
        ratio = found["start_ratio"]
        agrees = "yes" if ratio.value <= _START else "no"
        rows.append([found["bundle"], f"{runner:.3f}", f"{bare:.3f}", _shown(ratio), agrees])
    publish(
        given.name,
        title="Time from process start to first answer",
        headings=("bundle", "robx's runner, s", "a bare script, s", "ratio", f"at most {_START:g}"),
        rows=rows,
        data=[{key: to_json(found[key]) for key in ("bundle", "starts", "start_ratio")} for found in data],
        notes=[f"Medians over {2 * given.rounds} pairs in alternating order, with 95 % bootstrap intervals."],
        settings={"rounds": given.rounds, "threads": given.threads, "batch": 1},
    )


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for how in ("one model", "own process"):
        for name, figures in found[how]["blocks"].items():
            p50, p90 = (f"{np.median([f[p] for f in figures]):.3f}" for p in ("p50", "p90"))
            ratios = found[how]["to_robx"].get(name)
            if ratios is None:
                rows.append([found["bundle"], how, name, p50, "1", p90, "1", ""])
                continue
            shown = [_shown(ratios[p]) for p in ("p50", "p90")]
            rows.append([found["bundle"], how, name, p50, shown[0], p90, shown[1], _verdict(ratios.values())])
    return rows


def _verdict(ratios: Iterable[Value]) -> str:
    """Whether both agree; "open" if an interval contains the limit of 3 %."""
    verdicts = set()
    for ratio in ratios:
        low, high = (ratio.low or 0.0) - 1, (ratio.high or 9.0) - 1
        inside, outside = low >= -_AGREEMENT and high <= _AGREEMENT, high < -_AGREEMENT or low > _AGREEMENT
        verdicts.add("yes" if inside else "no" if outside else "open")
    return "no" if "no" in verdicts else "open" if "open" in verdicts else "yes"


def _notes(data: list[dict[str, Any]], given: argparse.Namespace) -> list[str]:
    notes = [
        f"One model: {given.blocks} blocks of {given.seconds:g} s per tool in one process; own process: {given.rounds} "
        f"rounds of {given.seconds:g} s. Ratios are medians with 95 % bootstrap intervals in brackets.",
        f"loadgen is MLCommons' {version('mlcommons-loadgen')}, SingleStream, on robx's own Session.",
        "benchmark_app runs one input in the engine's memory and reads OpenVINO's timer, which covers neither setting "
        "the input nor reading the output. The row 'robx, by OpenVINO's timer' reads it during robx's calls.",
        "'robx again' is the same command a second time in each round: it shows the variation between processes.",
    ]
    for found in data:
        notes += _left_out(found)
        runner, bare = np.median(found["starts"], axis=0)
        ratio = found["start_ratio"]
        verdict = "at most" if ratio.value <= _START else "above"
        notes.append(
            f"{found['bundle']}: from process start to first answer the runner takes {runner:.3f} s and a bare script "
            f"{bare:.3f} s, a ratio of {_shown(ratio)}: {verdict} {_START:g}."
        )
    return notes


def _left_out(found: dict[str, Any]) -> list[str]:
    """The part of robx's call outside OpenVINO's timer, and benchmark_app's ratio to that timer."""
    blocks = found["one model"]["blocks"]
    if OWN_TIMER not in blocks:  # a bundle of another engine
        return []
    robx, timer, app = ([f["p50"] for f in blocks[name]] for name in ("robx", OWN_TIMER, "benchmark_app"))
    outside = float(np.median(np.subtract(robx, timer)))
    return [
        f"{found['bundle']}: {1000 * outside:.0f} microseconds, {100 * outside / np.median(robx):.1f} %, of robx's "
        f"call are outside OpenVINO's timer; by that timer benchmark_app's p50 is {_shown(_ratio(app, timer))} of "
        "robx's."
    ]


def _ratios(found: dict[str, list[Figures]]) -> dict[str, dict[str, Value]]:
    """Each tool's p50 and p90, divided by robx's of the same round."""
    return {
        name: {p: _ratio([f[p] for f in figures], [r[p] for r in found["robx"]]) for p in ("p50", "p90")}
        for name, figures in found.items()
        if name != "robx"
    }


def _ratio(ours: list[float], theirs: list[float]) -> Value:
    return paired_ratio([np.array([x]) for x in ours], [np.array([x]) for x in theirs])


def _shown(ratio: Value) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


if __name__ == "__main__":
    main()
