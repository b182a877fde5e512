"""The program that runs on a device and measures one model. Python 3.8, the standard library, numpy and one engine.

    python robx_runner.pyz JOB.json

robx packs this file (as ``__main__``), the rest of this folder and one engine into ``robx_runner.pyz`` and copies it to
the device with the bundle, the images and the job. Local measurements run the same file. It reads and writes only in
the job's folder, in which one runner at a time may work:

    job.json      what to do; the keys are _KEYS
    images.npy    preprocessed, float32 (N, 3, H, W)
    result.zip    written last, by a rename:
        outputs.npz      ``outputs`` float32 (N, D) and ``seen`` bool (N,): the outputs of the timed run itself
        samples.npy      int64 (n,), nanoseconds of each query in order
        telemetry.jsonl  what a second process recorded five times a second
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
from typing import Any, Callable, Iterable

# Before any engine is imported: ONNX Runtime's wheel otherwise writes a device id on import, and may send events.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if sys.version_info < (3, 8):
    raise SystemExit("the device's Python is %s: robx needs 3.8 or later on a device" % sys.version.split()[0])

from robx.runtime.device import describe, nvidia, timing, watch
from robx.runtime.device.engine import check_output

SCHEMA = 1
RESULT = "result.zip"
_PARTS = ("outputs.npz", "samples.npy", "telemetry.jsonl", "result.json")
_KEYS = {
    *("engine", "folder", "manifest", "settings", "files", "affinity", "batch", "latency", "cool_down_seconds"),
    *("queries", "seconds", "max_seconds", "warm_up_seconds", "warm_up_limit", "time_limit"),
}

# Environment variables that may change an engine's threads or memory allocation.
_ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"),
)


def main(arguments: list[str]) -> int:
    """Do one job, or describe the device and the given packages; returns the exit status."""
    if arguments[:1] == ["--doctor"]:
        found = {"facts": describe.describe(), "packages": describe.packages(arguments[1:])}
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    if len(arguments) != 1:
        sys.stderr.write("usage: robx_runner.pyz JOB.json | --doctor [PACKAGE...]\n")
        return 2
    path = os.path.abspath(arguments[0])
    with open(path) as file:
        job = json.load(file)
    os.chdir(os.path.dirname(path))
    # CUDA then numbers GPUs as NVML does, which reports their memory and energy.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        with open("lock", "w") as lock:
            return _alone(job, lock)
    except OSError as error:  # a full or read-only disk: no result file can report it
        sys.stderr.write("cannot write in the job's folder: %s\n" % (error.strerror or error))
        return 1


def _alone(job: dict[str, Any], lock: Any) -> int:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # A runner that lost its host may still be running, and would write the same files.
        sys.stderr.write("another runner is still working in this folder\n")
        return 1
    for stale in (*_PARTS, RESULT):
        if os.path.exists(stale):
            os.remove(stale)
    try:
        result = run_job(job)
    except Exception as error:
        # One line for the host; a traceback would only point into this file.
        lines = (str(error).strip() or type(error).__name__).splitlines()
        result = {"schema": SCHEMA, "error": lines[0][:500], "missing": isinstance(error, ImportError)}
    keep(result)
    return 1 if "error" in result else 0


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Open the model, measure it, and keep its outputs."""
    unknown = sorted(set(job) ^ _KEYS)
    if unknown:
        raise ValueError("the job's keys do not match this runner: %s" % ", ".join(unknown))
    # The kernel ends a hung engine, even if the host is gone.
    signal.alarm(int(job["time_limit"]))
    facts = describe.describe()
    cores = pin(job["affinity"])
    threads = int(job["settings"]["threads"])
    if cores and threads > len(cores):
        raise ValueError("%d threads on the cores %s: use at most %d threads" % (threads, cores, len(cores)))
    # On an emulated processor nothing is timed, so that no time can be mistaken for a result.
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
    result.update(timed=timed, device=facts, throttled=watch.new_flags(flags, watch.throttle_flags()))
    return result


def measure(job: dict[str, Any], *, timed: bool) -> dict[str, Any]:
    """Load, first inference, then either timed queries or all images once; outputs are kept."""
    verified = beside(lambda: verify(job["files"]))
    import numpy as np  # takes as long as verifying the files

    verified()
    clock = time.perf_counter_ns
    images = np.array(np.load("images.npy", mmap_mode="r"))
    batch = int(job["batch"])
    queries = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    before = watch.memory(reset=True)
    start = clock()
    engine = importlib.import_module("robx.runtime.engines." + job["engine"])
    model = engine.open_model(job["folder"], job["manifest"], job["settings"])
    try:
        loaded = clock()
        width = job["manifest"]["outputs"][0]["shape"][-1]
        first = run_in_batches(model, queries[0], fixed_batch(job["manifest"]), [width] if width else [])
        result = {"schema": SCHEMA, "load_ns": loaded - start, "first_ns": clock() - loaded, "facts": model.facts()}
        result["answered"] = time.monotonic()
        outputs = np.full((len(images), *first.shape[1:]), np.nan, dtype=np.float32)
        seen = np.zeros(len(images), dtype=bool)
        if timed:
            result.update(_timed(job, model, queries, (outputs, seen)))
        else:
            for index, query in enumerate(queries):
                timing.keep_output(model.run(query), index * batch, (outputs, seen))
        result["memory"], result["memory_before"] = watch.memory(), before
    finally:
        model.close()
    np.savez("outputs.npz", outputs=outputs, seen=seen)
    return result


def _timed(job: dict[str, Any], model: Any, queries: list[Any], kept: tuple[Any, Any]) -> dict[str, Any]:
    import numpy as np

    warm = timing.warm_up(model, queries, job["warm_up_seconds"], job["warm_up_limit"])
    gpu = nvidia.runs(model.facts())
    gpu_before, before = nvidia.reading() if gpu else None, watch.energy()
    began, wall, cpu = time.monotonic(), time.time(), time.process_time()
    samples, complete = timing.time_queries(model, queries, job, kept)
    ended, wall, cpu = time.monotonic(), time.time() - wall, time.process_time() - cpu
    after, gpu_after = watch.energy(since=before), nvidia.reading() if gpu else None
    np.save("samples.npy", samples)
    return {
        "warm_up": warm,
        "window": [began, ended],
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "complete": complete,
        "energy": {"before": before, "after": after},
        "gpu": {"before": gpu_before, "after": gpu_after} if gpu else None,
    }


def run_in_batches(model: Any, images: Any, batch: int | None, widths: Iterable[int]) -> Any:
    """Run `images` through a model whose batch may be fixed: in pieces of `batch`, the last one padded and cut.

    Raises ValueError unless the outputs are (N, D) with D one of `widths` (any, if there are none).
    """
    import numpy as np

    if batch is None or len(images) == batch:
        return check_output(model.run(images), len(images), widths)
    pieces = []
    for start in range(0, len(images), batch):
        piece = images[start : start + batch]
        short = batch - len(piece)
        if short:
            piece = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)])
        pieces.append(check_output(model.run(piece), batch, widths)[: batch - short])
    return np.concatenate(pieces)


def fixed_batch(manifest: dict[str, Any]) -> int | None:
    """The batch size that the model was exported with; None if dynamic."""
    batch: int | None = manifest["inputs"][0]["shape"][0]
    return batch


def cool_down(limit: float) -> dict[str, Any]:
    """Wait until no sensor is more than 3 °C above the first process's reading, or for `limit` seconds.

    The first process stores its reading in the parent folder, which all bundles of one bench share.
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
    host = os.getppid()
    while reading > wanted and time.monotonic() - start < limit:
        if os.getppid() != host:
            raise RuntimeError("the host's process is gone")
        time.sleep(1.0)
        reading = max(watch.snapshot()["celsius"], default=reading)
    return {"seconds": time.monotonic() - start, "celsius": reading, "reached": reading <= wanted}


def beside(work: Callable[[], None]) -> Callable[[], None]:
    """Start `work` in a thread; the returned function waits for it and raises what it raised."""
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
    """Check the SHA-256 of every file."""
    import hashlib

    for name, expected in sorted(files.items()):
        digest = hashlib.sha256()
        with open(name, "rb") as file:
            # In large blocks: between blocks this thread waits for the importing one.
            for block in iter(lambda: file.read(1 << 24), b""):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError("%s arrived damaged: its SHA-256 differs" % name)


def pin(cores: list[int] | None) -> list[int] | None:
    """Pin this process and its future threads to `cores`; returns the cores it may use, None if unknown."""
    if not hasattr(os, "sched_setaffinity"):
        if cores:
            raise ValueError("this system cannot pin a process to cores: leave out --affinity")
        return None
    have = os.sched_getaffinity(0)
    if not cores:
        return sorted(have)
    # The kernel accepts a set if any of its cores exists, and silently ignores the others.
    if not set(cores) <= have:
        raise ValueError("cores %s are not available: this process may use %s" % (cores, sorted(have)))
    os.sched_setaffinity(0, set(cores))
    return sorted(cores)


def keep(result: dict[str, Any]) -> None:
    """Pack the results into one file, which appears by a rename and is therefore complete."""
    import zipfile  # not needed for the first inference, so not imported before it

    write_json(result, "result.json")
    with zipfile.ZipFile(RESULT + ".tmp", "w", zipfile.ZIP_STORED) as archive:
        for name in _PARTS:
            if os.path.exists(name):
                archive.write(name)
    os.replace(RESULT + ".tmp", RESULT)


def write_json(value: Any, path: str) -> None:
    """Write `value` to a temporary file, then rename it to `path`."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
