"""Why one way of distilling beats another: four figures of the log, over the runs of equal_compute.py.

    python benchmarks/equal_compute_picture.py --runs runs/equal-compute/efficientnet_lite0-resnet10t

The targets' entropy, the student's use of the prototypes, how often student and teacher agree on the best prototype,
and the rank of the student's embeddings: which of them move, and how far, in the same CPU time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from matplotlib.figure import Figure

from robx.store.files import read_json, write_atomically

PANELS = (
    ("target_entropy", "entropy of the targets, nats"),
    ("student_use", "prototypes in use by the student, %"),
    ("agreement", "best prototype as the teacher's, %"),
    ("embedding_rank", "effective rank of the embeddings"),
)
STYLES = (("o", "-"), ("s", "--"), ("D", ":"), ("^", "-."))


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the methods' folders")
    parser.add_argument("--methods", nargs="+", default=["published", "prototypes", "control", "quick"])
    parser.add_argument("--budget", default="2min-0", help="budget and seed, as the folders are called")
    parser.add_argument("--name", default="equal-compute-why")
    given = parser.parse_args()
    runs = {name: given.runs / name / given.budget / "run" for name in given.methods}
    write_atomically(RESULTS / f"{given.name}.svg", lambda path: picture(runs, path))


def picture(runs: dict[str, Path], path: Path) -> None:
    """One panel for each figure, one line for each run, over the share of the run."""
    canvas = Figure(figsize=(9, 5.5), layout="constrained")
    for axis, (key, title) in zip(canvas.subplots(2, 2).flat, PANELS, strict=True):
        for (name, run), (marker, line) in zip(runs.items(), STYLES, strict=False):
            axis.plot(*curve(run, key), marker=marker, ls=line, ms=3, label=name)
        axis.set_title(title, fontsize="medium")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("share of the run, %")
    axis.legend(fontsize="small")  # the last panel has all runs: a method without prototypes logs nothing else
    canvas.savefig(path, format="svg", metadata={"Date": None})


def curve(run: Path, key: str) -> tuple[list[float], list[float]]:
    """A figure over the run, each point the mean of a tenth of it; empty if the run did not log it."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recipe = read_json(run / "recipe.json")["recipe"]
    scale = {"student_use": 100 / recipe["prototypes"], "agreement": 100.0}.get(key, 1.0)
    last = max(line["step"] for line in lines)
    found = [(line["step"], scale * line[key]) for line in lines if key in line]
    x, y = [], []
    for tenth in range(10):
        values = [value for step, value in found if tenth < 10 * step / last <= tenth + 1]
        if values:
            x.append(10.0 * tenth + 5)
            y.append(float(np.mean(values)))
    return x, y


if __name__ == "__main__":
    main()
