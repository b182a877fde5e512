"""Students x {ONNX Runtime, OpenVINO} x {fp32, fp16, the vendor's default int8, robx's int8}, measured in one run.

    python benchmarks/export_table.py --distil resnet18 mobilenetv3_large_100 vit_tiny_patch16_224 --lite0
    python benchmarks/export_table.py --runs runs/r18 runs/mnv3

--distil trains short students on the demo's images (one teacher, one pass); --lite0 takes EfficientNet-Lite0 with its
real ImageNet weights as a student; --runs takes folders of ``robx distill``. The vendor's default is what its manual
shows, on the same 300 calibration images that robx gets: onnxruntime's quant_pre_process and quantize_static, and
nncf.quantize (with ModelType.TRANSFORMER for a ViT). robx's int8 is what ``robx export --int8`` ships: where no int8 is
accurate and not slower, that is fp16 or fp32, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, demo_images, publish, say, shown

from robx.distill.recipes import override, preset
from robx.distill.run import Options
from robx.distill.run_folder import student_preprocessing
from robx.distill.teachers import load_teacher
from robx.distill.train import train
from robx.eval.fidelity import Bank, fidelity, make_bank
from robx.export.build import Options as ExportOptions
from robx.export.build import build
from robx.export.calibration import Splits, open_data, read_splits
from robx.export.gate import Limits
from robx.export.request import ExportTarget
from robx.records import Bundle, Student, Value, describe_file, load_bundle, load_student, save_bundle, to_json
from robx.runtime.compare import interleave
from robx.runtime.latency import paired_ratio
from robx.runtime.session import Session, SessionSettings, open_session
from robx.sources import open_source
from robx.trunk import embedding_width, is_vit, save_trunk

ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
VARIANTS = ("fp32", "fp16", "vendor int8", "robx int8")
Row = dict[str, Any]


def main() -> None:
    """Measure every student and write the table."""
    given = arguments()
    data = given.data or demo_images()
    folders = list(given.runs)
    if given.distil:
        folders += distil(given, data)
    if given.lite0:
        folders.append(save_lite0(given.out / "efficientnet_lite0", given.size))
    rows: list[Row] = []
    for folder in folders:
        rows += measure(folder, data, given)
        write_down(rows, given)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="students' folders")
    parser.add_argument("--distil", nargs="*", default=[], metavar="NAME", help="timm names to distil first")
    parser.add_argument("--lite0", action="store_true", help="EfficientNet-Lite0's real weights as a student")
    parser.add_argument("--epochs", type=int, default=5, help="of --distil")
    parser.add_argument("--size", type=int, default=96, help="of --distil and --lite0, in pixels")
    parser.add_argument("--max-drop", type=float, default=3.0, help="of robx's gate; 867 images cannot prove 1 point")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which robx tries no further rung")
    parser.add_argument("--blocks", type=int, default=20, help="of each model in the interleaved timing")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a block")
    parser.add_argument("--data", type=Path, help="labelled images with train and test; default: the demo's")
    parser.add_argument("--out", type=Path, default=Path("runs/export-table"))
    return parser.parse_args()


# Students


def distil(given: argparse.Namespace, data: Path) -> list[Path]:
    """Students of EfficientNet-Lite0 with fitted prototypes, all in one pass; resumed, and reused when done."""
    source = open_source(data, split="train")
    teacher = load_teacher("efficientnet_lite0", source=source, prototypes=256, objective="msn", image_size=given.size)
    recipe = override(
        preset("msn", "cnn"),
        {"optimizer": "adamw", "lr": 0.002, "lr_batch": None, "epochs": given.epochs, "batch_size": 64,
         "crop_size": given.size, "local_crops": 0, "weight_decay": 0.04, "weight_decay_end": 0.04, "clip_grad": 3.0},
    )  # fmt: skip
    options = Options(device="cpu", workers=1, measure=False, checkpoint_minutes=5)
    out = given.out / "-".join(given.distil)
    return train(recipe, students=given.distil, source=source, out=out, teacher=teacher, options=options, say=say)


def save_lite0(folder: Path, size: int) -> Path:
    """EfficientNet-Lite0's trunk with its real weights and its own normalisation, (x - 127) / 128, as a Student."""
    teacher = load_teacher("efficientnet_lite0", objective="kd", image_size=size)
    trunk: Any = teacher.trunk
    trunk.reset_classifier(0)
    preprocessing = dataclasses.replace(student_preprocessing(size), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    record = Student(
        timm_name="tf_efficientnet_lite0", width=embedding_width(trunk), preprocessing=preprocessing, sha256="",
        teacher=teacher.info, data=None, recipe={},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_trunk(folder, trunk, record)
    return folder


# The vendors' defaults


def onnxruntime_default(fp32: Path, folder: Path, calibration: np.ndarray, student: Student) -> str:
    """onnxruntime.quantization as its manual shows it; returns what has to be said about it."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"pixels": row[None]}

    source, note = fp32 / "model.onnx", ""
    with tempfile.TemporaryDirectory() as name, quiet():
        prepared = Path(name) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared)
        except Exception as error:
            prepared, note = source, f"quant_pre_process failed ({str(error).splitlines()[0][:80]}) and was left out"
        quantize_static(prepared, folder / "model.onnx", Reader())
    return note


def openvino_default(fp32: Path, folder: Path, calibration: np.ndarray, student: Student) -> str:
    """nncf.quantize as its manual shows it."""
    import nncf
    import openvino as ov

    kind = nncf.ModelType.TRANSFORMER if is_vit(student.timm_name) else None
    with quiet():
        model = ov.Core().read_model((fp32 / "model.xml").read_bytes(), (fp32 / "model.bin").read_bytes())
        quantised = nncf.quantize(model, nncf.Dataset([image[None] for image in calibration]), model_type=kind)
        ov.save_model(quantised, folder / "model.xml", compress_to_fp16=False)
    return ""


DEFAULTS: dict[str, Callable[[Path, Path, np.ndarray, Student], str]] = {
    "onnx": onnxruntime_default,
    "openvino": openvino_default,
}


def vendor_bundle(engine: str, fp32: Path, folder: Path, calibration: np.ndarray) -> tuple[Bundle, str]:
    """The vendor's int8 beside the fp32 manifest, so that the same Session opens both."""
    bundle = load_bundle(fp32)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note = DEFAULTS[engine](fp32, folder, calibration, bundle.student)
    files = tuple(describe_file(folder, f.path, f.role) for f in bundle.files if (folder / f.path).is_file())
    bundle = dataclasses.replace(bundle, precision="int8", requested="int8", files=files, rungs=(), parity={})
    save_bundle(bundle, folder)
    return bundle, note


# Measuring


def measure(folder: Path, data: Path, given: argparse.Namespace) -> list[Row]:
    """Eight bundles of one student, judged on the same images and timed in one interleaved run."""
    student = load_student(folder)
    train_source, test_source = open_data(data)
    splits = read_splits(train_source, test_source, student.preprocessing)
    rows = []
    for engine in ENGINES:
        rows += [make(engine, variant, folder, splits, data, given) for variant in VARIANTS]
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(open_session(folder, SessionSettings(threads=torch.get_num_threads())))
        labels = splits.bank.labels
        bank = make_bank(answers(reference, splits.bank, student), labels, classes=len(splits.bank.classes or ()))
        wanted = answers(reference, splits.judging, student)
        sessions = {}
        for row in rows:
            session = stack.enter_context(open_session(row["folder"], SessionSettings(threads=1)))
            judge(row, session, wanted, splits, bank)
            sessions[f"{row['engine']} {row['variant']}"] = session
        say(f"{student.timm_name}: timing {len(sessions)} models, interleaved")
        images = splits.judging.normalised(student.preprocessing, slice(0, 16))
        blocks = interleave(sessions, images, blocks=given.blocks, seconds=given.seconds)
    for row in rows:
        mine, fp32 = blocks[f"{row['engine']} {row['variant']}"], blocks[f"{row['engine']} fp32"]
        row["latency_ms"] = float(np.median(np.concatenate(mine))) / 1e6
        row["latency_ratio"] = paired_ratio(mine, fp32)
        row["folder"] = row["folder"].name
    return rows


def make(engine: str, variant: str, folder: Path, splits: Splits, data: Path, given: argparse.Namespace) -> Row:
    """Build one bundle; a row without its figures."""
    name = load_student(folder).timm_name
    say(f"{name}: {engine}, {variant}")
    out = folder / "table" / f"{engine}-{variant.replace(' ', '-')}"
    note = ""
    if variant == "vendor int8":
        fp32 = out.with_name(f"{engine}-fp32")
        calibration = splits.calibration.normalised(load_student(folder).preprocessing)
        bundle, note = vendor_bundle(engine, fp32, out, calibration)
    else:
        precision: Any = variant.removeprefix("robx ")
        source, held_out = open_data(data)
        options = ExportOptions(limits=Limits(max_drop=given.max_drop), budget=given.budget)
        bundle = build(
            folder, ExportTarget(format=engine, precision=precision), source=source, judge=held_out, out=out,  # type: ignore[arg-type]
            options=options, on_rung=lambda r: say(f"  {r.name}: {r.accuracy} / {r.speed}: {r.reason[:90]}"),
        )  # fmt: skip
    seen = load_student(folder).images_seen
    kept = next((rung.name for rung in bundle.rungs if rung.kept), "")
    return {
        "student": name, "engine": engine, "variant": variant, "ships": bundle.precision, "bytes": bundle.bytes,
        "images_seen": seen, "rung": kept, "rungs": [to_json(rung) for rung in bundle.rungs], "note": note,
        "folder": out,
    }  # fmt: skip


def answers(session: Session, images: Any, student: Student) -> np.ndarray:
    """Embeddings (N, D)."""
    return np.concatenate([session.run(batch) for batch in images.batches(student.preprocessing, 32)])


def judge(row: Row, session: Session, wanted: np.ndarray, splits: Splits, bank: Bank) -> None:
    """Put the fidelity to the fp32 student in torch into the row."""
    found = answers(session, splits.judging, load_student(row["folder"].parents[1]))
    values = fidelity(wanted, found, labels=splits.judging.labels, bank=bank).values
    row["values"] = {
        key: values[key]
        for key in ("cosine_mean", "cosine_p1", "cosine_min", "knn_top1_reference", "knn_drop", "probe_drop")
    }


# Telling


def write_down(rows: list[Row], given: argparse.Namespace) -> None:
    """The table of what is known so far."""
    cells = [
        [
            r["student"], ENGINES[r["engine"]], r["variant"],
            r["ships"] if r["variant"] == "robx int8" else "", f"{r['bytes'] / 1e6:.1f}",
            f"{r['values']['cosine_mean'].value:.4f}", shown(r["values"]["knn_drop"], 1),
            shown(r["values"]["probe_drop"], 1), shown(r["latency_ratio"]),
        ]
        for r in rows
    ]  # fmt: skip
    accuracy: dict[str, Value] = {r["student"]: r["values"]["knn_top1_reference"] for r in rows}
    publish(
        "export-table",
        title="Exports of one student, side by side",
        headings=[
            "student",
            "engine",
            "variant",
            "ships",
            "MB",
            "centred cosine",
            "kNN drop",
            "probe drop",
            "latency / fp32",
        ],
        rows=cells,
        data=to_json(rows),
        notes=[
            "Latency is that of one image, one thread, as a ratio to fp32 in the same engine, all eight models of a "
            f"student interleaved in random order ({given.blocks} blocks of {given.seconds} s); below 1 is faster.",
            "Centred cosine and the drops, in points, are against the fp32 student in PyTorch: kNN with the fp32 bank, "
            "a linear probe trained on fp32 features and frozen.",
            f"robx's gate allows a drop of {given.max_drop:g} points and nothing slower than fp32 or fp16; it took its "
            "first passing rung on the same judged images, which the vendor's default, one candidate, has no use for.",
            *exceptions(rows),
            "kNN top-1 of the fp32 students, in %: "
            + ", ".join(f"{k} {shown(v, 1)}" for k, v in accuracy.items())
            + ".",
            *dict.fromkeys(f"{r['student']}, {r['engine']}: {r['note']}." for r in rows if r["note"]),
            CLIP_ART if given.data is None else "",
            "Images that the students have seen (the table is about exports, not about them): "
            + ", ".join(f"{r['student']} {r['images_seen']:,}" for r in rows[:: len(ENGINES) * len(VARIANTS)])
            + "; those of EfficientNet-Lite0 are ImageNet's.",
            "Where robx ships fp32 its row is the fp32 file once more: how far its ratio is from 1 is this run's "
            "noise, whatever the interval says.",
        ],
        settings={k: str(v) for k, v in vars(given).items() if k not in ("data", "out", "runs")},
    )


def rungs_of(row: Row) -> str:
    """Why each int8 rung did not ship, in a few words."""
    said = []
    for rung in row["rungs"]:
        values = rung["values"]
        if rung["precision"] == "int8" and "probe_drop" in values and "speedup_fp32" in values:
            drop, fast = values["probe_drop"]["value"], values["speedup_fp32"]["value"]
            said.append(f"{rung['name']} {rung['accuracy']}, probe drop {drop:.1f}, {fast:.1f} times as fast as fp32")
    return "; ".join(said) or "none was judged"


def exceptions(rows: list[Row]) -> list[str]:
    """Where the vendor's default beats what robx ships: clearly faster, and within the gate's drop or more accurate."""
    found = []
    pairs = {(r["student"], r["engine"], r["variant"]): r for r in rows}
    for (student, engine, variant), vendor in pairs.items():
        if variant != "vendor int8":
            continue
        ours = pairs[student, engine, "robx int8"]
        faster = ours["latency_ratio"].value / vendor["latency_ratio"].value
        mine, theirs = (r["values"]["cosine_mean"].value for r in (ours, vendor))
        if faster > 1.03:
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is {faster:.2f} times as fast as what robx ships "
                f"({ours['ships']}), at centred cosine {theirs:.4f} against {mine:.4f} and drops of "
                f"{shown(vendor['values']['knn_drop'], 1)} (kNN) and {shown(vendor['values']['probe_drop'], 1)} "
                f"(probe) points. robx's own int8 rungs: {rungs_of(ours)}."
            )
        elif theirs > mine + 0.001:
            found.append(
                f"{student}, {ENGINES[engine]}: the vendor's default is no slower and closer to fp32, centred cosine "
                f"{theirs:.4f} against {mine:.4f}."
            )
    return found or [
        "Nowhere is the vendor's default faster (by 3 %) than what robx ships, or as fast and closer to fp32."
    ]


@contextlib.contextmanager
def quiet() -> Any:
    """The vendors' tools log and draw progress bars of their own."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)


if __name__ == "__main__":
    main()
