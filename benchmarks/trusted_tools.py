"""robx's latency against two trusted tools', on one OpenVINO model, interleaved: run it on a quiet machine.

    python benchmarks/trusted_tools.py runs/r18/openvino-int8 --rounds 5 --seconds 20 --out trusted_tools.json

Each round runs, in random order, robx's runner (a fresh process), OpenVINO's benchmark_app (synchronous, one stream,
the same threads, batch 1; it refuses a latency hint together with threads) and MLCommons' loadgen (SingleStream) that
drives robx's Session. Printed are p50 and p90 of each and the ratio to robx's, as the median over rounds; within 3 % is
agreement. benchmark_app leaves the input's copy out of its times, which shows in models of less than a millisecond. The
runner's time from its start to its first answer is set against a bare script's: at most 1.2 times as long is the aim.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robx.files import write_json
from robx.records import load_bundle
from robx.runtime import packing
from robx.runtime.bench import BenchOptions, bench
from robx.runtime.inputs import load_inputs
from robx.runtime.profiles import PROFILES, Profile
from robx.runtime.session import SessionSettings, open_session

Figures = dict[str, float]  # p50 and p90 in ms


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


def start_to_first_answer(folder: Path, threads: int) -> tuple[float, float]:
    """Seconds of a whole process that answers once: robx's runner, and a script that knows only OpenVINO."""
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
        bare = (
            "import sys, numpy, openvino as ov\nc = ov.Core()\n"
            "m = c.compile_model(c.read_model(sys.argv[1]), 'CPU',"
            " {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': sys.argv[2]})\n"
            "m.create_infer_request().infer([numpy.load('images.npy')])\n"
        )
        (here / "bare.py").write_text(bare)
        model = str((folder / bundle.model.path).resolve())
        ours = _seconds([sys.executable, packing.NAME, "job.json"], here)
        theirs = _seconds([sys.executable, "bare.py", model, str(threads)], here)
    return ours, theirs


def main() -> None:
    """Interleave the tools and print how they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of each tool in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--loadgen", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loadgen:
        print(json.dumps(drive_loadgen(options.bundle, options.threads, options.seconds)))
        return
    tools: dict[str, Callable[[Path, int, float], Figures]] = {"robx": by_robx, "loadgen": by_loadgen}
    if load_bundle(options.bundle).runtime == "openvino":
        tools["benchmark_app"] = by_benchmark_app
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    shuffle = random.Random(0)
    for _ in range(options.rounds):
        for name in shuffle.sample(sorted(tools), len(tools)):
            found[name].append(tools[name](options.bundle, options.threads, options.seconds))
    agreement = {
        name: {
            p: float(np.median([f[p] / r[p] for f, r in zip(figures, found["robx"], strict=True)]))
            for p in ("p50", "p90")
        }
        for name, figures in found.items()
    }
    starts = np.array([start_to_first_answer(options.bundle, options.threads) for _ in range(options.rounds)])
    for name, figures in found.items():
        p50, p90 = (float(np.median([f[p] for f in figures])) for p in ("p50", "p90"))
        ratio = agreement[name]
        print(f"{name:14} p50 {p50:8.3f} ms ({ratio['p50']:.3f} x)   p90 {p90:8.3f} ms ({ratio['p90']:.3f} x)")
    start = float(np.median(starts[:, 0] / starts[:, 1]))
    ours, theirs = np.median(starts, axis=0)
    print(f"start to first answer: runner {ours:.2f} s, bare {theirs:.2f} s ({start:.2f} x)")
    if options.out is not None:
        write_json(options.out, {"figures": found, "ratio_to_robx": agreement, "start_ratio": start})


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
