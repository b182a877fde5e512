"""robx's latency against two trusted tools': run it on a quiet machine.

    OMP_NUM_THREADS=1 python benchmarks/trusted_tools.py runs/r18/openvino-int8 runs/r18/onnx-fp32

Each round runs, in random order, robx's runner (a fresh process), MLCommons' loadgen (SingleStream) that drives robx's
Session in another, and, for OpenVINO, its benchmark_app (synchronous, one stream, the same threads, batch 1; it refuses
a latency hint together with threads). A tool's p50 and p90 are set against robx's of the same round, so that what slows
the machine slows both; shown is the median over rounds with its 95 % bootstrap interval. Within 3 % is agreement. The
runner's time from its start to its first answer is set against that of a bare script: at most 1.2 times is the aim.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from robx.records import Value, load_bundle, to_json
from robx.runtime import packing
from robx.runtime.bench import bench
from robx.runtime.inputs import load_inputs
from robx.runtime.latency import paired_ratio
from robx.runtime.profiles import PROFILES, BenchOptions, Profile
from robx.runtime.session import SessionSettings, open_session

Figures = dict[str, float]  # p50 and p90 in ms
_AGREEMENT, _START = 0.03, 1.2
_BARE = {
    "openvino": (
        "import sys, numpy, openvino as ov\nc = ov.Core()\n"
        "m = c.compile_model(c.read_model(sys.argv[1]), 'CPU',"
        " {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': sys.argv[2]})\n"
        "m.create_infer_request().infer([numpy.load('images.npy')])\n"
    ),
    "onnxruntime": (
        "import sys, numpy, onnxruntime as ort\no = ort.SessionOptions()\no.intra_op_num_threads = int(sys.argv[2])\n"
        "s = ort.InferenceSession(sys.argv[1], o, ['CPUExecutionProvider'])\n"
        "s.run(None, {s.get_inputs()[0].name: numpy.load('images.npy')})\n"
    ),
}


def by_robx(folder: Path, threads: int, seconds: float) -> Figures:
    """robx bench itself: one fresh process of `seconds`."""
    PROFILES["trusted"] = Profile(
        name="trusted",
        queries=64,
        seconds=seconds,
        processes=1,
        warm_up_seconds=1,
        warm_up_limit=10,
        cool_down_seconds=0,
        max_seconds=20 * seconds,
        publishable=False,
    )
    (record,) = bench([folder], BenchOptions(profile="trusted", settings=SessionSettings(threads=threads)))
    return {"p50": record.values["p50"].value, "p90": record.values["p90"].value}


def by_benchmark_app(folder: Path, threads: int, seconds: float) -> Figures:
    """OpenVINO's own tool, twice, for it reports one percentile a run."""
    model = folder / load_bundle(folder).model.path
    crop = load_bundle(folder).preprocessing.crop
    found = {}
    for name, percentile in (("p50", 50), ("p90", 90)):
        command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"]
        command += ["-m", str(model), "-d", "CPU", "-api", "sync"]
        command += ["-hint", "none", "-nstreams", "1", "-nthreads", str(threads), "-t", str(max(1, round(seconds / 2)))]
        command += ["-shape", f"[1,3,{crop},{crop}]", "-latency_percentile", str(percentile), "-infer_precision", "f32"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        label = "Median" if percentile == 50 else f"{percentile} percentile"
        match = re.search(rf"{label}:\s+([0-9.]+) (ms|us)", text)
        if match is None:
            raise SystemExit(f"benchmark_app printed no {label}:\n{text[-2000:]}")
        found[name] = float(match.group(1)) / (1 if match.group(2) == "ms" else 1000)
    return found


def by_loadgen(folder: Path, threads: int, seconds: float) -> Figures:
    """MLCommons' loadgen in a fresh process, so that its threads meet no other engine's."""
    command = [sys.executable, __file__, str(folder), "--threads", str(threads), "--seconds", str(seconds), "--loadgen"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(text.splitlines()[-1]))


def drive_loadgen(folder: Path, threads: int, seconds: float) -> Figures:
    """SingleStream over robx's Session; the figures are read from loadgen's own summary."""
    import mlperf_loadgen as lg

    images = load_inputs(load_bundle(folder).preprocessing, None).images
    queries = [images[i : i + 1] for i in range(len(images))]
    with tempfile.TemporaryDirectory() as out, open_session(folder, SessionSettings(threads=threads)) as session:
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            session.run(queries[0])

        def issue(samples: list[Any]) -> None:
            for sample in samples:
                answer = session.run(queries[sample.index])
                lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, answer.ctypes.data, answer.nbytes)])

        settings, logs, output = lg.TestSettings(), lg.LogSettings(), lg.LogOutputSettings()
        settings.scenario, settings.mode = lg.TestScenario.SingleStream, lg.TestMode.PerformanceOnly
        settings.min_duration_ms, settings.min_query_count = round(1000 * seconds), 64
        output.outdir = out
        logs.log_output = output
        sut = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(len(queries), len(queries), lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(sut, library, settings, logs)
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
        summary = (Path(out) / "mlperf_log_summary.txt").read_text()
    return {
        name: float(_after(summary, rf"{percentile}\.00 percentile latency \(ns\)\s*:\s*(\d+)")) / 1e6
        for name, percentile in (("p50", 50), ("p90", 90))
    }


def start_to_first_answer(folder: Path, threads: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a whole process that answers once, a pair a round: robx's runner, and a script of the engine alone."""
    bundle = load_bundle(folder)
    images = load_inputs(bundle.preprocessing, None).images[:1]
    with tempfile.TemporaryDirectory() as root:
        here = Path(root)
        np.save(here / "images.npy", images)
        (here / packing.NAME).write_bytes(packing.pack_runner(bundle))
        manifest = json.loads((folder / "manifest.json").read_text())
        job = {"engine": bundle.runtime, "folder": str(folder.resolve()), "manifest": manifest, "files": {}}
        job |= {"settings": {"threads": threads}, "affinity": None, "batch": 1, "latency": False, "time_limit": 300}
        job |= dict.fromkeys(
            ("cool_down_seconds", "queries", "seconds", "max_seconds", "warm_up_seconds", "warm_up_limit"), 0
        )
        (here / "job.json").write_text(json.dumps(job))
        (here / "bare.py").write_text(_BARE[bundle.runtime])
        model = str((folder / bundle.model.path).resolve())
        runner = [sys.executable, packing.NAME, "job.json"]
        bare = [sys.executable, "bare.py", model, str(threads)]
        for command in (runner, bare):  # once for the caches of the disk
            _seconds(command, here)
        pairs = []
        for number in range(rounds):
            first, second = (runner, bare) if number % 2 else (bare, runner)
            times = {id(first): _seconds(first, here), id(second): _seconds(second, here)}
            pairs.append((times[id(runner)], times[id(bare)]))
    return pairs


def compare(folder: Path, *, threads: int, seconds: float, rounds: int) -> dict[str, Any]:
    """All rounds of one bundle."""
    tools: dict[str, Callable[[Path, int, float], Figures]] = {"robx": by_robx, "loadgen": by_loadgen}
    if load_bundle(folder).runtime == "openvino":
        tools["benchmark_app"] = by_benchmark_app
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    shuffle = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        # Of a copy: the records of a benchmark are none of the bundle's own.
        copy = Path(root) / folder.resolve().name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("measurements.jsonl", "samples-*"))
        for _ in range(rounds):
            for name in shuffle.sample(sorted(tools), len(tools)):
                found[name].append(tools[name](copy, threads, seconds))
        starts = start_to_first_answer(copy, threads, rounds)
    ratios = {
        name: {p: _ratio([f[p] for f in figures], [r[p] for r in found["robx"]]) for p in ("p50", "p90")}
        for name, figures in found.items()
        if name != "robx"
    }
    start = _ratio([ours for ours, _ in starts], [bare for _, bare in starts])
    return {"bundle": folder.resolve().name, "rounds": found, "to_robx": ratios, "starts": starts, "start_ratio": start}


def main() -> None:
    """Compare on every bundle, and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10, help="of each tool in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="trusted-tools", help="of the result")
    parser.add_argument("--loadgen", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loadgen:
        print(json.dumps(drive_loadgen(given.bundles[0], given.threads, given.seconds)))
        return
    from common import publish, say  # heavier than loadgen's process is to be

    data = []
    for folder in given.bundles:
        say(f"{folder}: {given.rounds} rounds")
        data.append(compare(folder, threads=given.threads, seconds=given.seconds, rounds=given.rounds))
    publish(
        given.name,
        title="robx's latency against trusted tools'",
        headings=("bundle", "tool", "p50 ms", "p50 to robx's", "p90 ms", "p90 to robx's", "within 3 %"),
        rows=[row for found in data for row in _rows(found)],
        data=[to_json(found) for found in data],
        notes=_notes(data, given),
        settings={"rounds": given.rounds, "seconds": given.seconds, "threads": given.threads, "batch": 1},
    )


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, figures in found["rounds"].items():
        p50, p90 = (f"{np.median([f[p] for f in figures]):.3f}" for p in ("p50", "p90"))
        ratios = found["to_robx"].get(name)
        if ratios is None:
            rows.append([found["bundle"], name, p50, "1", p90, "1", ""])
            continue
        agrees = all(abs(ratios[p].value - 1) <= _AGREEMENT for p in ("p50", "p90"))
        shown = [_shown(ratios[p]) for p in ("p50", "p90")]
        rows.append([found["bundle"], name, p50, shown[0], p90, shown[1], "yes" if agrees else "no"])
    return rows


def _notes(data: list[dict[str, Any]], given: argparse.Namespace) -> list[str]:
    notes = [
        f"Ratios are medians over {given.rounds} rounds of {given.seconds:g} s a tool, in random order; "
        "in brackets the 95 % bootstrap interval over rounds. benchmark_app is run twice a round, half as long, for it "
        "prints one percentile a run, and leaves the input's copy out of its times, which shows below a millisecond.",
        f"loadgen is MLCommons' {version('mlcommons-loadgen')}, SingleStream, over robx's own Session.",
    ]
    for found in data:
        runner, bare = np.median(found["starts"], axis=0)
        ratio = found["start_ratio"]
        verdict = "at most" if ratio.value <= _START else "above"
        notes.append(
            f"{found['bundle']}: from the start of a process to its first answer the runner takes {runner:.2f} s and a "
            f"bare script {bare:.2f} s, {_shown(ratio)} times as long: {verdict} {_START:g}."
        )
    return notes


def _ratio(ours: list[float], theirs: list[float]) -> Value:
    return paired_ratio([np.array([x]) for x in ours], [np.array([x]) for x in theirs])


def _shown(ratio: Value) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _after(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"loadgen's summary has no {pattern}:\n{text}")
    return match.group(1)


def _seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
