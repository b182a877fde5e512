"""The tools that trusted_tools.py compares with robx: each in its own process, or all on one opened model.

The former take a bundle's folder, the file of its preprocessed images (N, 3, H, W), threads and seconds.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from robx.records import load_bundle
from robx.runtime.bench import runner_zip
from robx.runtime.bench.bench import bench
from robx.runtime.bench.latency import summarise
from robx.runtime.bench.profiles import PROFILES, BenchSettings, Profile
from robx.runtime.device import runner, timing
from robx.runtime.session import SessionSettings, open_session

Figures = dict[str, float]  # p50 and p90 in ms
OWN_TIMER = "robx, by OpenVINO's timer"
_HERE = Path(__file__).parent
# benchmark_app with its own loop and times, but printed in full: it rounds to 10 microseconds.
_BENCHMARK_APP = """
import json
from openvino.tools.benchmark.benchmark import Benchmark
from openvino.tools.benchmark.main import main
plain = Benchmark.sync_inference
def kept(self, request, queue):
    times, *rest = plain(self, request, queue)
    print("figures", json.dumps({p: times[int(len(times) * q)] for p, q in (("p50", .5), ("p90", .9))}))
    return times, *rest
Benchmark.sync_inference = kept
main()
"""


def by_robx(folder: Path, _: Path, threads: int, seconds: float) -> Figures:
    """robx bench itself, with one process; it renders the same images."""
    PROFILES["trusted"] = Profile(
        name="trusted",
        queries=64,
        seconds=seconds,
        processes=1,
        warm_up_seconds=0.5,
        warm_up_limit=10,
        cool_down_seconds=0,
        max_seconds=20 * seconds,
        publishable=False,
    )
    (record,) = bench(BenchSettings(bundles=[folder], profile="trusted", session=SessionSettings(threads=threads)))
    return {"p50": record.values["p50"].value, "p90": record.values["p90"].value}


def by_benchmark_app(folder: Path, _: Path, threads: int, seconds: float) -> Figures:
    """OpenVINO's own tool, with its own input."""
    model = folder / load_bundle(folder).model.path
    crop = load_bundle(folder).preprocessing.crop
    command = [sys.executable, "-c", _BENCHMARK_APP, "-m", str(model), "-d", "CPU", "-api", "sync", "-hint", "none"]
    command += ["-nstreams", "1", "-nthreads", str(threads), "-t", str(max(1, round(seconds)))]
    command += ["-shape", f"[1,3,{crop},{crop}]", "-infer_precision", "f32"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(_after(text, r"figures (\{.*\})")))


def by_bare_loop(folder: Path, images: Path, threads: int, seconds: float) -> Figures:
    """The bare engine."""
    done = subprocess.run(_bare(folder, images, threads, seconds), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _bare(folder: Path, images: Path, threads: int, seconds: float) -> list[str]:
    bundle = load_bundle(folder)
    model = str((folder / bundle.model.path).resolve())
    return [sys.executable, str(_HERE / "bare_loop.py"), bundle.runtime, model, str(images), str(threads), str(seconds)]


def in_one_session(folder: Path, images: Path, threads: int, seconds: float, blocks: int) -> dict[str, list[Figures]]:
    """As alternate(), in a fresh process."""
    command = [sys.executable, __file__, str(folder), str(images), str(threads), str(seconds), str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alternate(folder: Path, images: np.ndarray, threads: int, seconds: float, blocks: int) -> dict[str, list[Figures]]:
    """Every tool's timed loop on the same opened model, in blocks of random order: name -> its blocks."""
    queries = [images[i : i + 1] for i in range(len(images))]
    with open_session(folder, SessionSettings(threads=threads, batch=1)) as session:
        tools = {"robx": by_robxs_loop, "loadgen": by_loadgen}
        if session.facts()["engine"] == "openvino":
            tools |= {"benchmark_app": by_benchmark_apps_loop, OWN_TIMER: by_openvinos_timer}
        timing.warm_up(session, queries, 1, 10)
        found: dict[str, list[Figures]] = {name: [] for name in tools}
        shuffle = random.Random(0)
        for _ in range(blocks):
            for name in shuffle.sample(sorted(tools), len(tools)):
                found[name].append(tools[name](session, queries, seconds))
    return found


def by_robxs_loop(session: Any, queries: list[np.ndarray], seconds: float) -> Figures:
    """The runner's own loop."""
    kept = np.empty((len(queries), session.bundle.outputs[0].shape[1]), np.float32), np.zeros(len(queries), bool)
    job = {"queries": 64, "seconds": seconds, "max_seconds": 100 * seconds}
    values = summarise([timing.time_queries(session, queries, job, kept)[0]])
    return {name: values[name].value for name in ("p50", "p90")}


def by_loadgen(session: Any, queries: list[np.ndarray], seconds: float) -> Figures:
    """MLCommons' loadgen, SingleStream; the figures are read from its own summary."""
    import mlperf_loadgen as lg

    def issue(samples: list[Any]) -> None:
        for sample in samples:
            answer = session.run(queries[sample.index])
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, answer.ctypes.data, answer.nbytes)])

    with tempfile.TemporaryDirectory() as out:
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


def by_benchmark_apps_loop(session: Any, queries: list[np.ndarray], seconds: float) -> Figures:
    """benchmark_app's loop on the session's own request: one input already in place, and OpenVINO's timer."""
    from openvino.tools.benchmark.benchmark import Benchmark

    session.run(queries[0])
    app = Benchmark("CPU", duration_seconds=1, api_type="sync", inference_only=True)
    app.duration_seconds = seconds  # its constructor takes whole seconds
    one = types.SimpleNamespace(get_next_batch_size=lambda: 1)
    return _figures(app.sync_inference(session._model._request, one)[0])


def by_openvinos_timer(session: Any, queries: list[np.ndarray], seconds: float) -> Figures:
    """The timer that benchmark_app reads, during robx's own calls."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 64 or time.perf_counter() < end:
        session.run(queries[len(times) % len(queries)])
        times.append(session._model._request.latency)
    return _figures(times)


def _figures(times: list[float]) -> Figures:
    return {name: float(np.quantile(times, part)) for name, part in (("p50", 0.5), ("p90", 0.9))}


def start_to_first_answer(folder: Path, images: Path, threads: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds from process start to first answer, one pair per round: robx's runner and the bare script."""
    bundle = load_bundle(folder)
    with tempfile.TemporaryDirectory() as root:
        here = Path(root)
        np.save(here / "images.npy", np.load(images)[:1])
        (here / runner_zip.NAME).write_bytes(runner_zip.pack_runner(bundle))
        manifest = json.loads((folder / "manifest.json").read_text())
        job: dict[str, Any] = dict.fromkeys(runner._KEYS, 0)
        job |= {
            "engine": runner_zip.engine_name(bundle),
            "folder": str(folder.resolve()),
            "manifest": manifest,
            "affinity": None,
        }
        job |= {"settings": {"threads": threads, "batch": 1}, "batch": 1, "time_limit": 300}
        job |= {"files": {str((folder / file.path).resolve()): file.sha256 for file in bundle.files}}
        (here / "job.json").write_text(json.dumps(job))

        def ours() -> float:
            start = time.monotonic()
            subprocess.run([sys.executable, runner_zip.NAME, "job.json"], cwd=here, check=True, capture_output=True)
            with zipfile.ZipFile(here / runner.RESULT) as archive:
                return float(json.loads(archive.read("result.json"))["answered"]) - start

        def bare() -> float:
            command, start = _bare(folder, here / "images.npy", threads, 0), time.monotonic()
            return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) - start

        ours(), bare()  # once to warm the disk cache
        return [(ours(), bare()) if number % 2 else (bare(), ours())[::-1] for number in range(rounds)]


def _after(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"the tool's output does not match {pattern}:\n{text[-2000:]}")
    return match.group(1)


if __name__ == "__main__":  # the process of in_one_session
    bundle_, images_, threads_, *length = sys.argv[1:]
    print(json.dumps(alternate(Path(bundle_), np.load(images_), int(threads_), float(length[0]), int(length[1]))))
