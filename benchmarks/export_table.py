"""Students x engines x {fp32, fp16, the vendor's default int8, robx's int8, robx's int8 healed}, resumable row by row.

    python benchmarks/export_table.py --distil resnet18 mobilenetv3_large_100 vit_tiny_patch16_224 --lite0
    python benchmarks/export_table.py --runs runs/r18 runs/mnv3 --engines trt --trt rtx:sm86+sm89
    .venv-litert/bin/python benchmarks/export_table.py --runs runs/r18 --engines litert --variants fp32 "robx int8"

--distil trains students briefly on the demo's images; --lite0 uses EfficientNet-Lite0 with its real ImageNet weights
as a student; --runs takes folders written by ``robx distill``. The vendor's default is what its manual shows, with the
same calibration images as robx: onnxruntime's quant_pre_process and quantize_static, nncf.quantize (with
ModelType.TRANSFORMER for a ViT), ExecuTorch's XNNPACKQuantizer, and the static recipe of ai-edge-quantizer. robx's
int8 is what ``robx export --int8`` ships: if no int8 is accurate and not slower, that is fp16 or fp32, and the table
says so. --heal adds the row of ``robx export --int8 --heal MINUTES``.

Each row is stored below its student as soon as it is made, and the table has all stored rows of its students, whichever
command and environment made them: the mobile converters need their own (make test-mobile). Any subset can be run, and
stopped at any time: the same command continues. --stage runs a part: students, then bundles, then times, which repeats
all latency measurements and takes a few minutes on a machine that should be idle otherwise; on a busy one, use
--stage bundles and no latency is shown. --stage table makes nothing but the page of all stored rows.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Chosen, demo_images, save_student, say, shown, unused_healing
from equal_compute import methods
from export_page import ENGINES, Row, row_from_json, write_down
from more_judged import hold_out
from table_judging import Judges
from vendors import MOBILE_DEFAULTS, mobile_vendor_bundle, vendor_bundle

from robx import __version__
from robx.distill.recipes import override, preset, recipe_from_json
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import load_teacher
from robx.distill.train import train
from robx.distill.training.compute import cpu_has_bf16
from robx.distill.training.run import Options, RunSpec
from robx.errors import RobxError, first_line
from robx.export.build import ExportSettings, export
from robx.export.gate import timing
from robx.export.gate.gate import Limits
from robx.export.heal.heal import HealSettings
from robx.export.image_splits import JUDGING_IMAGES, MIN_IMAGES, open_data
from robx.export.request import ExportTarget
from robx.images.sources import open_source
from robx.records import Bundle, Student, Value, from_json, load_bundle, load_student, to_json, unfinished
from robx.runtime.bench.interleave import interleave
from robx.runtime.bench.latency import paired_ratio
from robx.runtime.session import SessionSettings, open_session
from robx.store.files import read_json, write_json
from robx.trunk import build_trunk

PARTS = ("students", "bundles", "times", "table")
VENDOR, OURS, HEALED = "vendor int8", "robx int8", "robx int8 healed"
VARIANTS = {
    "onnx": ("fp32", "fp16", VENDOR, OURS, HEALED),
    "openvino": ("fp32", "fp16", VENDOR, OURS, HEALED),
    "executorch": ("fp32", VENDOR, OURS, HEALED),
    "litert": ("fp32", VENDOR, OURS, HEALED),
    "trt": ("fp32", "fp16", OURS, HEALED),
}


def main() -> None:
    """Measure every student in every engine, and write the table after each."""
    given = arguments()
    if given.min_speedup < 0.1:  # no speed decides: do not spend half of the time on them
        timing.BLOCK_SECONDS = 0.002
    data = given.data or demo_images()
    if given.hold_out or given.hold_out_unlabelled:
        name = f"images-{given.hold_out}" + (f"-{given.hold_out_unlabelled}" if given.hold_out_unlabelled else "")
        data = hold_out(data, given.out / name, labelled=given.hold_out, unlabelled=given.hold_out_unlabelled)
    works, learnt = [], []
    for folder in students(given, data):
        works.append(Work(folder, data, given))
        learnt.append(works[-1].learnt())
        for engine in given.engines if given.stage not in ("students", "table") else ():
            for variant in (v for v in VARIANTS[engine] if v in given.variants):
                works[-1].make_row(engine, variant)
                write_page(works, learnt, given)
            if engine != "trt" and given.stage != "bundles":
                works[-1].time(engine)
                write_page(works, learnt, given)
    if given.stage == "table":
        write_page(works, learnt, given)


def write_page(works: list[Work], learnt: list[str], given: argparse.Namespace) -> None:
    """The page of all rows so far."""
    rows, faults = stored_rows(works)
    write_down(rows, faults + absent(works, given), learnt, given)


def absent(works: list[Work], given: argparse.Namespace) -> list[str]:
    """Which of the rows asked for do not exist, by engine."""
    found = []
    for engine, variants in VARIANTS.items():
        lacks = {
            work.student.timm_name: [v for v in variants if v in given.variants and work.stored(engine, v) is None]
            for work in works
        }
        asked = sum(v in given.variants for v in variants)
        said = [name + ("" if len(some) == asked else f" ({', '.join(some)})") for name, some in lacks.items() if some]
        if said:
            found.append(f"Not run in {ENGINES[engine]}: {'; '.join(said)}.")
    return found


def stored_rows(works: list[Work]) -> tuple[list[Row], list[str]]:
    """All rows that are stored for these students and settings, with their latencies, and what could not be made."""
    rows, faults = [], []
    for work in works:
        for engine, variants in VARIANTS.items():
            found = [work.stored(engine, variant) for variant in variants]
            rows += work.with_times(engine, [each["row"] for each in found if each and each["row"]])
            faults += [each["fault"] for each in found if each and each["fault"]]
    return rows, faults


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="students' folders")
    parser.add_argument("--distil", nargs="*", default=[], metavar="NAME[:EPOCHS]", help="timm names to distil first")
    parser.add_argument(
        "--warm",
        nargs="*",
        default=[],
        metavar="NAME",
        help="students of --distil that start from Lite0's weights where they match",
    )
    parser.add_argument(
        "--lite0", action="store_true", help="add EfficientNet-Lite0 with its real weights as a student"
    )
    parser.add_argument("--epochs", type=int, default=5, help="epochs of --distil")
    parser.add_argument("--images", type=int, help="random training images of --distil; default: all")
    parser.add_argument("--size", type=int, default=96, help="image size of --distil and --lite0, in pixels")
    parser.add_argument("--stage", choices=("all", *PARTS), default="all", help="run a part")
    parser.add_argument("--engines", nargs="+", choices=VARIANTS, default=["onnx", "openvino"])
    parser.add_argument("--variants", nargs="+", help="rows to make; default: all, the healed one with --heal only")
    parser.add_argument("--heal", type=float, metavar="MINUTES", help="add the row of int8 from healed weights")
    parser.add_argument("--heal-steps", type=int, help="steps of healing, instead of as many as fit into the minutes")
    parser.add_argument("--trt", metavar="TARGET", default="local", help="target of --engines trt, e.g. rtx:sm86+sm89")
    parser.add_argument(
        "--max-drop", type=float, default=1.0, help="points that robx's gate allows; few images cannot prove 1 point"
    )
    parser.add_argument(
        "--min-speedup", type=float, default=1.0, help="that robx's gate asks for; 0.01 where the machine is too busy"
    )
    parser.add_argument("--budget", type=float, help="seconds after which an int8 search starts no further candidate")
    parser.add_argument("--candidates", type=int, help="int8 candidates to try of each kind of weights; default: all")
    parser.add_argument(
        "--calibration-images", type=int, default=MIN_IMAGES, help="calibration images of robx and of the vendors"
    )
    parser.add_argument("--judging-images", type=int, default=JUDGING_IMAGES, help="test images to judge on, at most")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each model in the interleaved timing")
    parser.add_argument("--seconds", type=float, default=0.1, help="seconds of a block")
    parser.add_argument("--data", type=Path, help="labelled images in train/ and test/; default: the demo's")
    parser.add_argument("--hold-out", type=int, default=0, help="labelled training images to move into the test set")
    parser.add_argument(
        "--hold-out-unlabelled", type=int, default=0, help="unlabelled training images to move there, for the cosines"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/export-table"))
    parser.add_argument("--name", default="export-table", help="name of the result files")
    given = parser.parse_args()
    if given.variants is None:
        given.variants = ["fp32", "fp16", VENDOR, OURS, *([HEALED] if given.heal else [])]
    if HEALED in given.variants and not given.heal:
        parser.error(f"the row {HEALED!r} needs --heal MINUTES")
    return given


def students(given: argparse.Namespace, data: Path) -> Iterator[Path]:
    """Yield the students' folders, creating each when it is needed."""
    yield from given.runs
    if given.lite0:
        yield save_lite0(given.out / "efficientnet_lite0", given.size)
    for text in given.distil:
        name, _, epochs = text.partition(":")
        yield distil(name, int(epochs or given.epochs), given, data)


def distil(name: str, epochs: int, given: argparse.Namespace, data: Path) -> Path:
    """Distil a student from EfficientNet-Lite0; resumed, and reused when complete.

    The recipe is that of all students of this table, also the earlier ones: `prototypes` of equal_compute.toml.
    """
    source = open_source(data, split="train")
    if given.images is not None:
        places = np.random.default_rng(0).permutation(len(source))[: given.images]
        source = Chosen(source, [int(place) for place in places])
    precision = "bf16" if cpu_has_bf16() else "fp32"
    keys = dict(methods()["prototypes"].keys)
    sizes = {"epochs": epochs, "crop_size": given.size, "precision": precision}
    recipe = override(preset(keys.pop("objective"), student_kind(name)), keys | sizes)
    out: Path = given.out / name
    if (out / "student.json").is_file():
        made = read_json(out / "recipe.json")
        same = made["data"]["fingerprint"] == source.fingerprint and recipe_from_json(made["recipe"]) == recipe
        if same and not unfinished(load_student(out)):
            return out
    teacher = load_teacher(
        "efficientnet_lite0",
        source=source,
        prototypes=recipe.prototypes,
        fit_images=recipe.fit_images,
        objective=recipe.objective,
        image_size=given.size,
    )
    options = Options(device="cpu", workers=1, measure=False, checkpoint_minutes=2)
    init = warm_start(name, given) if name in given.warm else None
    spec = RunSpec(recipe=recipe, students=[name], source=source, out=out, teacher=teacher, init=init, options=options)
    return train(spec, say=say)[0]


def warm_start(name: str, given: argparse.Namespace) -> Path:
    """A Student with EfficientNet-Lite0's weights in every tensor whose name and shape match those of `name`."""
    torch.manual_seed(0)
    trunk = build_trunk(name)
    real = load_teacher("efficientnet_lite0", objective="kd", image_size=given.size).trunk.state_dict()
    own = trunk.state_dict()
    shared = {key: value for key, value in real.items() if key in own and own[key].shape == value.shape}
    trunk.load_state_dict(own | shared)
    say(f"{name} starts from EfficientNet-Lite0 for {len(shared)} of its {len(own)} tensors")
    folder: Path = given.out / f"{name}-start"
    save_student(trunk, name, folder, given.size)
    return folder


def save_lite0(folder: Path, size: int) -> Path:
    """EfficientNet-Lite0's trunk with its real weights and its own normalisation, (x - 127) / 128, as a Student."""
    teacher = load_teacher("efficientnet_lite0", objective="kd", image_size=size)
    trunk: Any = teacher.trunk
    trunk.reset_classifier(0)
    pixels = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    save_student(trunk, "tf_efficientnet_lite0", folder, size, teacher=teacher.info, **pixels)
    return folder


@dataclass
class Work:
    """One student's bundles and rows, stored below its folder."""

    folder: Path
    data: Path
    given: argparse.Namespace

    @cached_property
    def judges(self) -> Judges:
        """Both sets of test images."""
        return Judges(self.folder, self.data, self.given)

    @property
    def student(self) -> Student:
        """Its record."""
        return self.judges.student

    def learnt(self) -> str:
        """kNN top-1 of the fp32 student and of the untrained network, as text; measured once."""
        path = self.folder / "table" / "knn.json"
        stored = read_json(path) if path.is_file() else {}
        if stored.get("student") != self.student.sha256:
            found = {"student": self.student.sha256, "trained": to_json(self.judges.knn(self.folder))}
            if self.student.images_seen:
                torch.manual_seed(0)
                bare = self.folder / "table" / "untrained"
                name, size = self.student.timm_name, self.student.preprocessing.crop
                save_student(build_trunk(name), name, bare, size)
                found["untrained"] = to_json(self.judges.knn(bare))
            write_json(path, stored := found)
        text = f"{self.student.timm_name} {shown(from_json(Value, stored['trained']), 1)}"
        if "untrained" in stored:
            bare_value = from_json(Value, stored["untrained"])
            text += f" (untrained {shown(bare_value, 1)}; {self.student.images_seen:,} images seen)"
        say(f"kNN top-1 {text}")
        return text

    def stored(self, engine: str, variant: str) -> dict[str, Any] | None:
        """The row with its settings, or what failed; None where it was not made with these settings."""
        path = self._row_file(engine, variant)
        found = read_json(path) if path.is_file() else {}
        if found.get("settings") != self._settings(engine, variant):
            return None
        return {"row": row_from_json(found["row"]) if found["row"] else None, "fault": found["fault"]}

    def make_row(self, engine: str, variant: str) -> None:
        """Build and judge one bundle, unless its row is stored."""
        if self.stored(engine, variant) is not None:
            return
        say(f"{self.student.timm_name}: {engine}, {variant}")
        row, fault = None, ""
        try:
            row = self._make(engine, variant)
            row["values"] = self.judges.judge(self.folder / "table" / row["folder"])
        except Exception as error:  # a vendor's tool may raise anything; the other rows remain valid
            if not isinstance(error, RobxError) and variant != VENDOR:
                raise
            fault = f"{self.student.timm_name}, {engine}: no {variant}: {first_line(error)}."
        stored = {"settings": self._settings(engine, variant), "row": to_json(row), "fault": fault}
        write_json(self._row_file(engine, variant), stored)

    def time(self, engine: str) -> None:
        """Time all rows of an engine in one interleaved run; --stage all reuses an existing one."""
        found = [self.stored(engine, variant) for variant in VARIANTS[engine]]
        rows = [each["row"] for each in found if each and each["row"]]
        path = self.folder / "table" / f"{engine}-times.json"
        settings = self._times_settings(rows)
        stored = read_json(path) if path.is_file() and self.given.stage != "times" else {}
        if rows and stored.get("settings") != settings:
            write_json(path, {"settings": settings, "times": to_json(self._time(engine, rows))})

    def with_times(self, engine: str, rows: list[Row]) -> list[Row]:
        """The rows with the latencies of one interleaved run, where there is one of these bundles."""
        path = self.folder / "table" / f"{engine}-times.json"
        stored = read_json(path) if rows and path.is_file() else {}
        if stored and stored["settings"] == self._times_settings(rows):
            for row in rows:
                milliseconds, ratio = stored["times"][row["variant"]]
                row["latency_ms"], row["latency_ratio"] = milliseconds, from_json(Value, ratio)
        return rows

    def _times_settings(self, rows: list[Row]) -> dict[str, Any]:
        bundles = {row["variant"]: load_bundle(self.folder / "table" / row["folder"]).id for row in rows}
        return {"bundles": bundles, "blocks": self.given.blocks, "seconds": self.given.seconds}

    def _row_file(self, engine: str, variant: str) -> Path:
        return self.folder / "table" / f"{engine}-{variant.replace(' ', '-')}-row.json"

    @cached_property
    def _fingerprints(self) -> list[str]:
        return [source.fingerprint for source in open_data(self.data) if source is not None]

    def _settings(self, engine: str, variant: str) -> dict[str, Any]:
        """Everything that a row depends on."""
        names = ("max_drop", "min_speedup", "budget", "candidates", "calibration_images")
        kept = {name: getattr(self.given, name) for name in names}
        if self.given.judging_images != JUDGING_IMAGES:
            kept["judging_images"] = self.given.judging_images
        kept["trt"] = self.given.trt if engine == "trt" else None
        kept["heal"] = [self.given.heal, self.given.heal_steps] if variant == HEALED else None
        return kept | {"student": self.student.sha256, "images": self._fingerprints, "robx": __version__}

    def _make(self, engine: str, variant: str) -> Row:
        """Build one bundle, or reuse it; returns a row without its latency."""
        out = self.folder / "table" / f"{engine}-{variant.replace(' ', '-')}"
        done = out.with_name(f"{out.name}.json")  # written last: the settings that `out` was made with
        note, settings = "", self._settings(engine, variant) | {"fp32": ""}
        if variant == VENDOR and engine not in MOBILE_DEFAULTS:
            fp32 = out.with_name(f"{engine}-fp32")
            settings["fp32"] = load_bundle(fp32).id
        if done.is_file() and out.is_dir() and (stored := read_json(done)).get("settings") == settings:
            bundle, note = load_bundle(out), stored["note"]
        else:
            calibration = self.judges.splits.calibration.normalised(self.student.preprocessing)
            if variant == VENDOR and engine in MOBILE_DEFAULTS:
                bundle = mobile_vendor_bundle(engine, self.folder, out, calibration)
            elif variant == VENDOR:
                bundle, note = vendor_bundle(engine, fp32, out, calibration)
            else:
                bundle = self._export(engine, variant, out)
            write_json(done, {"settings": settings, "note": note})
        kept = next((rung for rung in bundle.rungs if rung.kept), None)
        return {
            "student": self.student.timm_name, "engine": engine, "variant": variant, "ships": bundle.precision,
            "bytes": bundle.bytes, "images_seen": self.student.images_seen, "rung": kept.name if kept else "",
            "rungs": to_json(bundle.rungs), "note": note, "folder": out.name,
            "healing": bundle.healing.said if bundle.healing else unused_healing(bundle),
            "latency_ms": None, "latency_ratio": None,
        }  # fmt: skip

    def _export(self, engine: str, variant: str, out: Path) -> Bundle:
        precision: Any = "int8" if variant in (OURS, HEALED) else variant
        target = ExportTarget(
            format=engine,  # type: ignore[arg-type]
            precision=precision,
            device=self.given.trt if engine == "trt" else "local",
        )
        settings = ExportSettings(
            run=self.folder,
            target=target,
            data=self.data,
            out=out,
            limits=Limits(max_drop=self.given.max_drop, min_speedup=self.given.min_speedup),
            budget=self.given.budget,
            candidates=self.given.candidates,
            calibration_images=self.given.calibration_images,
            judging_images=self.given.judging_images,
            heal=HealSettings(minutes=self.given.heal, steps=self.given.heal_steps) if variant == HEALED else None,
        )
        return export(settings, on_candidate=lambda r: say(f"  {r.name}: {r.accuracy} / {r.speed}: {r.reason[:90]}"))

    def _time(self, engine: str, rows: list[Row]) -> dict[str, tuple[float, Value]]:
        """Variant -> median latency in ms, and its ratio to fp32, from one interleaved run."""
        with contextlib.ExitStack() as stack:
            sessions = {}
            for row in rows:
                path = self.folder / "table" / row["folder"]
                sessions[row["variant"]] = stack.enter_context(open_session(path, SessionSettings(threads=1, batch=1)))
            say(f"{self.student.timm_name}: timing {len(sessions)} models of {engine}, interleaved")
            images = self.judges.splits.judging.normalised(self.student.preprocessing, slice(0, 16))
            blocks = interleave(sessions, images, blocks=self.given.blocks, seconds=self.given.seconds).blocks
        return {
            name: (float(np.median(np.concatenate(mine))) / 1e6, paired_ratio(mine, blocks["fp32"]))
            for name, mine in blocks.items()
        }


if __name__ == "__main__":
    main()
