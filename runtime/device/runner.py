"""What a device runs: one model, measured and checked. Standard library, numpy and one engine; Python 3.8 and later.

    python robx_runner.pyz JOB.json

robx packs this file (as ``__main__``), what describes and watches the device, and one engine into ``robx_runner.pyz``
and pushes it with the bundle, the images and the job. The same file measures this machine. It reads and writes in the
job's folder alone, where only one may be at work:

    job.json      what to do; the keys are _KEYS
    images.npy    preprocessed, float32 (N, 3, H, W)
    result.zip    written last, by a rename:
        outputs.npz      ``outputs`` float32 (N, D) and ``seen`` bool (N,): the answers of the timed run itself
        samples.npy      int64 (n,), nanoseconds of each query in order
        telemetry.jsonl  what a process beside this one saw five times a second
        result.json      load and first-inference times, memory, steady state, energy, device facts; or ``error``
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any, Callable

# Before any engine is imported: importing ONNX Runtime's wheel otherwise writes a device id, and may send events.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if sys.version_info < (3, 8):
    raise SystemExit("the device's Python is %s: robx needs 3.8 or later there" % sys.version.split()[0])

from robx.runtime.device import (
    describe,
    nvidia,
    timing,
    watch,  # packed beside this file
)

SCHEMA = 1
RESULT = "result.zip"
_PARTS = ("outputs.npz", "samples.npy", "telemetry.jsonl", "result.json")
_KEYS = {
    *("engine", "folder", "manifest", "settings", "files", "affinity", "batch", "latency", "cool_down_seconds"),
    *("queries", "seconds", "max_seconds", "warm_up_seconds", "warm_up_limit", "time_limit"),
}


# What an engine's threads or memory may follow beside its settings.
_ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"),
)


def main(arguments: list[str]) -> int:
    """Do one job, or print what the device is; returns the exit status."""
    if arguments[:1] == ["--doctor"]:
        sys.stdout.write(json.dumps({"facts": describe.describe(), "packages": describe.packages()}) + "\n")
        return 0
    if len(arguments) != 1:
        sys.stderr.write("usage: robx_runner.pyz JOB.json | --doctor\n")
        return 2
    path = os.path.abspath(arguments[0])
    with open(path) as file:
        job = json.load(file)
    os.chdir(os.path.dirname(path))
    # CUDA's first GPU is then NVML's first too, whose memory and energy are read.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        with open("lock", "w") as lock:
            return _alone(job, lock)
    except OSError as error:  # a full or read-only disk: no result can be written that says so
        sys.stderr.write("the folder of the job cannot be written: %s\n" % (error.strerror or error))
        return 1


def _alone(job: dict[str, Any], lock: Any) -> int:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # One that was cut off from its host may still be at work, and would write the same files.
        sys.stderr.write("another runner is still at work in this folder\n")
        return 1
    for stale in (*_PARTS, RESULT):
        if os.path.exists(stale):
            os.remove(stale)
    try:
        result = run_job(job)
    except Exception as error:
        # One line for the host; a traceback would only name this file.
        lines = (str(error).strip() or type(error).__name__).splitlines()
        result = {"schema": SCHEMA, "error": lines[0][:500], "missing": isinstance(error, ImportError)}
    keep(result)
    return 1 if "error" in result else 0


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Open the model, measure it, and keep what it answered."""
    unknown = sorted(set(job) ^ _KEYS)
    if unknown:
        raise ValueError("the job has not the keys that this runner takes: %s" % ", ".join(unknown))
    # A hung engine is ended by the kernel, whatever became of the host.
    signal.alarm(int(job["time_limit"]))
    facts = describe.describe()
    cores = pin(job["affinity"])
    threads = int(job["settings"]["threads"])
    if cores and threads > len(cores):
        raise ValueError("%d threads on the cores %s: give at most %d threads" % (threads, cores, len(cores)))
    # Times of an emulated processor are not taken at all, so that none can be mistaken for a figure.
    timed = bool(job["latency"]) and not facts["emulated"]
    cooled = cool_down(job["cool_down_seconds"])
    flags = watch.throttle_flags() or ()
    telemetry = watch.start_telemetry("telemetry.jsonl", cores)
    try:
        result = measure(job, timed=timed)
    finally:
        watch.stop_telemetry(telemetry)
    result.update(cores=cores, environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ})
    result.update(telemetry_process=telemetry is not None, cool_down=cooled)
    result.update(timed=timed, device=facts, throttled=_new_flags(flags, watch.throttle_flags()))
    return result


def measure(job: dict[str, Any], *, timed: bool) -> dict[str, Any]:
    """Load, first inference, then either timed queries or all images once; what was answered is kept."""
    verified = beside(lambda: verify(job["files"]))
    import numpy as np  # takes as long as to verify does

    verified()
    clock = time.perf_counter_ns
    images = np.array(np.load("images.npy", mmap_mode="r"))
    batch = int(job["batch"])
    queries = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    before = watch.memory(reset=True)
    start = clock()
    model = _engine(job["engine"]).open_model(job["folder"], job["manifest"], job["settings"])
    try:
        loaded = clock()
        first = run_in_batches(model, queries[0], fixed_batch(job["manifest"]))
        result = {"schema": SCHEMA, "load_ns": loaded - start, "first_ns": clock() - loaded, "facts": model.facts()}
        result["answered"] = time.monotonic()
        outputs = np.full((len(images), *first.shape[1:]), np.nan, dtype=np.float32)
        seen = np.zeros(len(images), dtype=bool)
        if timed:
            result.update(_timed(job, model, queries, (outputs, seen)))
        else:
            for index, query in enumerate(queries):
                timing.keep_answer(model.run(query), index * batch, (outputs, seen))
        result["memory"], result["memory_before"] = watch.memory(), before
    finally:
        model.close()
    np.savez("outputs.npz", outputs=outputs, seen=seen)
    return result


def _timed(job: dict[str, Any], model: Any, queries: list[Any], kept: tuple[Any, Any]) -> dict[str, Any]:
    import numpy as np

    warm = timing.warm_up(model, queries, job["warm_up_seconds"], job["warm_up_limit"])
    provider = str(model.facts().get("provider")).lower()
    gpu = "cuda" in provider or "tensorrt" in provider
    gpu_before, before = nvidia.reading() if gpu else None, watch.energy()
    began, wall = time.monotonic(), time.time()
    samples, complete = timing.time_queries(model, queries, job, kept)
    ended, wall = time.monotonic(), time.time() - wall
    after, gpu_after = watch.energy(since=before), nvidia.reading() if gpu else None
    np.save("samples.npy", samples)
    return {
        "warm_up": warm,
        "window": [began, ended],
        "wall_seconds": wall,
        "complete": complete,
        "energy": {"before": before, "after": after},
        "gpu": {"before": gpu_before, "after": gpu_after} if gpu else None,
    }


def run_in_batches(model: Any, images: Any, batch: int | None) -> Any:
    """`images` through a model whose batch may be fixed: pieces of `batch`, the last one filled up and cut."""
    import numpy as np

    if batch is None or len(images) == batch:
        return model.run(images)
    pieces = []
    for start in range(0, len(images), batch):
        piece = images[start : start + batch]
        short = batch - len(piece)
        if short:
            piece = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)])
        pieces.append(model.run(piece)[: batch - short])
    return np.concatenate(pieces)


def fixed_batch(manifest: dict[str, Any]) -> int | None:
    """The batch that the model was exported with, or None where it is dynamic."""
    batch: int | None = manifest["inputs"][0]["shape"][0]
    return batch


def cool_down(limit: float) -> dict[str, Any]:
    """Wait until no sensor is more than 3 degrees above what the first process of this bench found, or `limit` seconds.

    The first process leaves its reading in the folder above the job's, which all bundles of one bench share.
    """
    reading = max(watch.snapshot()["celsius"], default=None)
    shared = os.path.join("..", "celsius.json")
    if reading is None or not os.path.exists(shared):
        if reading is not None:
            write_json(reading, shared)
        return {"seconds": 0.0, "celsius": reading, "reached": True}
    with open(shared) as file:
        wanted = json.load(file) + 3.0
    start = time.monotonic()
    while reading > wanted and time.monotonic() - start < limit:
        time.sleep(1.0)
        reading = max(watch.snapshot()["celsius"], default=reading)
    return {"seconds": time.monotonic() - start, "celsius": reading, "reached": reading <= wanted}


def beside(work: Callable[[], None]) -> Callable[[], None]:
    """Start `work` in a thread; what is returned waits for its end, and raises what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> None:
        thread.join()
        if raised:
            raise raised[0]

    return wait


def verify(files: dict[str, str]) -> None:
    """Every file arrived as it was sent (SHA-256)."""
    import hashlib

    for name, expected in sorted(files.items()):
        digest = hashlib.sha256()
        with open(name, "rb") as file:
            # In large blocks: between two of them this thread waits for the one that imports.
            for block in iter(lambda: file.read(1 << 24), b""):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError("%s arrived damaged: its SHA-256 differs" % name)


def pin(cores: list[int] | None) -> list[int] | None:
    """Keep this process, and the threads it will start, on `cores`; returns those that it may use, None if unknown."""
    if not hasattr(os, "sched_setaffinity"):
        if cores:
            raise ValueError("this system cannot pin a process to cores: leave --affinity out")
        return None
    have = os.sched_getaffinity(0)
    if not cores:
        return sorted(have)
    # The kernel takes a set of which any core exists, and says nothing of the others.
    if not set(cores) <= have:
        raise ValueError("cores %s are not to be had: this process may use %s" % (cores, sorted(have)))
    os.sched_setaffinity(0, set(cores))
    return sorted(cores)


def keep(result: dict[str, Any]) -> None:
    """Pack what was measured into one file; it appears by a rename, so that it is whole."""
    import zipfile  # what is not needed for the first answer waits until after it

    write_json(result, "result.json")
    with zipfile.ZipFile(RESULT + ".tmp", "w", zipfile.ZIP_STORED) as archive:
        for name in _PARTS:
            if os.path.exists(name):
                archive.write(name)
    os.replace(RESULT + ".tmp", RESULT)


def write_json(value: Any, path: str) -> None:
    """Write `value` beside `path`, then rename."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


def _new_flags(before: Any, after: Any) -> Any:
    """The throttling flags of now, and those "since boot" that were not there before; None where none can be had."""
    return after and [flag for flag in after if not (flag.endswith("since boot") and flag in before)]


def _engine(name: str) -> Any:
    return importlib.import_module("robx.runtime.engines.on_" + name.replace("tensorrt_rtx", "tensorrt"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
