"""A minimal loop around an engine, as the baseline for robx's runner. It uses nothing of robx.

    python benchmarks/bare_loop.py openvino|onnxruntime MODEL IMAGES.npy THREADS SECONDS

It runs the model once and prints the time of that answer, in seconds of the monotonic clock. Then it warms up for a
fifth of SECONDS, measures for SECONDS and prints p50 and p90 in ms as JSON. With 0 seconds it ends after the first
answer.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

Answer = Callable[[np.ndarray], Any]


def open_openvino(path: str, shape: Sequence[int], threads: int) -> Answer:
    """A function from an image to its answer."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    model.reshape([1, *shape])
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", {**config, "INFERENCE_NUM_THREADS": str(threads)})
    request = compiled.create_infer_request()

    def answer(image: np.ndarray) -> Any:
        request.set_input_tensor(ov.Tensor(image, shared_memory=True))
        request.infer()
        return request.get_output_tensor(0).data.copy()

    return answer


def open_onnxruntime(path: str, shape: Sequence[int], threads: int) -> Answer:
    """As open_openvino; ONNX Runtime needs no shape."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def main(engine: str, path: str, images_file: str, threads: str, seconds: str) -> None:
    """Print the time of the first answer, then run the loop."""
    images = np.load(images_file)
    opened = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}[engine]
    answer = opened(path, images.shape[1:], int(threads))
    answer(images[:1])
    print(time.monotonic(), flush=True)
    clock, number, times = time.perf_counter, 0, []
    begin = clock()
    measured, end = begin + 0.2 * float(seconds), begin + 1.2 * float(seconds)
    while clock() < end:
        image = images[number % len(images)][None]
        number += 1
        start = clock()
        answer(image)
        taken = clock() - start
        if start > measured:
            times.append(1000 * taken)
    if times:
        print(json.dumps({name: float(np.quantile(times, part)) for name, part in (("p50", 0.5), ("p90", 0.9))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
