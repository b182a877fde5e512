"""The native runner against the Python runner on this machine: the same bundle and library, processes in turns.

    python benchmarks/native_runner.py RUN/onnx-fp32 [--processes 10] [--seconds 2]

Run `robx device build` first. It prints, native divided by Python: the p50 of each (median over the processes, and the
fastest process of each, which a busy machine disturbs least), the CPU time per query, and the time from the start of
the process to the first answer, and writes results/native-runner.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import publish

from robx.records import load_bundle, to_json
from robx.runtime.bench import native_runner, runner_zip
from robx.runtime.bench.inputs import load_inputs
from robx.runtime.bench.results import ProcessResult, read_result

COMMANDS = {"python": [sys.executable, runner_zip.NAME, "job.json"], "native": ["./robx_runner", "job.json"]}


def prepare(folder: Path, bundle_folder: Path, seconds: float) -> int:
    """A job's folder with both runners; returns the number of images."""
    bundle = load_bundle(bundle_folder)
    batch = bundle.inputs[0].shape[0] or 1
    images = load_inputs(bundle.preprocessing, None, batch=batch).images
    np.save(folder / "images.npy", images)
    shutil.copytree(bundle_folder, folder / "bundle")
    (folder / runner_zip.NAME).write_bytes(runner_zip.pack_runner(bundle))
    for name, path in native_runner.native_files(native_runner.device_abi(os.uname().machine), bundle.runtime).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)
    job = {
        "engine": runner_zip.engine_name(bundle),
        "folder": "bundle",
        "manifest": to_json(bundle),
        "settings": {"threads": 1, "provider": None, "precision_hint": "f32", "batch": batch},
        "files": {f"bundle/{file.path}": file.sha256 for file in bundle.files},
        "affinity": None,
        "batch": batch,
        "latency": True,
        "cool_down_seconds": 0,
        "queries": 30,
        "seconds": seconds,
        "max_seconds": 60,
        "warm_up_seconds": 0.3,
        "warm_up_limit": 3,
        "time_limit": 300,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return len(images)


def _same_bits(one: ProcessResult, other: ProcessResult) -> bool:
    """Whether the outputs of the images that both reached are equal bit for bit."""
    both = one.seen & other.seen
    return bool(both.any()) and one.outputs[both].tobytes() == other.outputs[both].tobytes()


def main() -> None:
    """Run both in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    found: dict[str, list[tuple[ProcessResult, float]]] = {kind: [] for kind in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = prepare(folder, options.bundle, options.seconds)
        for _ in range(options.processes):
            for kind, command in COMMANDS.items():
                start = time.monotonic()
                subprocess.run(command, cwd=folder, check=True)
                result = read_result(folder / "result.zip", images=count)
                found[kind].append((result, result.report["answered"] - start))
    reference = found["python"][0][0]
    same = all(_same_bits(result, reference) for result, _ in found["native"])
    p50 = {kind: [float(np.median(r.samples)) / 1e6 for r, _ in runs] for kind, runs in found.items()}
    cpu = {kind: [1e3 * r.report["cpu_seconds"] / len(r.samples) for r, _ in runs] for kind, runs in found.items()}
    first = {kind: [1e3 * answered for _, answered in runs] for kind, runs in found.items()}
    rows, data = list[list[str]](), list[dict[str, Any]]()
    for title, values in (("p50", p50), ("CPU time per query", cpu), ("start to first answer", first)):
        for how, pick in (("median", np.median), ("fastest", min)):
            native, python = float(pick(values["native"])), float(pick(values["python"]))
            rows.append([title, how, f"{native:.2f}", f"{python:.2f}", f"{native / python:.3f}"])
            data.append({"what": title, "of_processes": how, "native_ms": native, "python_ms": python})
    bundle = load_bundle(options.bundle)
    publish(
        "native-runner",
        title=f"Native runner and Python runner: {bundle.student.timm_name}, {bundle.format} {bundle.precision}",
        headings=["measured", "of the processes", "native, ms", "Python, ms", "ratio"],
        rows=rows,
        data=data,
        notes=[
            f"Processes in turns, {options.processes} of each, one thread, the same library. Outputs "
            + ("are equal bit for bit." if same else "DIFFER."),
        ],
        settings={"processes": options.processes, "seconds": options.seconds, "outputs_equal": same},
    )


if __name__ == "__main__":
    main()
