from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from robx.cli import main
from robx.distill.resolve import DistillSettings, resolve_recipe, unused_options
from robx.distill.targets.stored import read_info
from robx.distill.train import _warnings
from robx.distill.training import compute
from robx.errors import InputError
from robx.images.sources import open_source
from robx.records import load_student

TINY = (
    *("--student", "test_resnet", "--crop-size", "32", "--local-crop-size", "16", "--local-crops", "1"),
    *("--batch-size", "16", "--epochs", "1", "--prototypes", "8", "--workers", "0", "--device", "cpu"),
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('head = "mlp"\noptimizer = "adamw"\n')
    return path


def robx(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_from_the_command_to_the_student_and_again(scenes: Path, tmp_path: Path, recipe: Path) -> None:
    command = ("distill", "--teacher", "ema", *TINY, "--data", scenes, "--out", tmp_path / "run", "--recipe", recipe)
    first = robx(*command, "--json")
    assert first.exit_code == 0, first.output
    line = json.loads(first.stdout.splitlines()[-1])
    assert line["timm_name"] == "test_resnet" and line["images_seen"] == 64
    student = load_student(tmp_path / "run")
    assert student.recipe["head"] == "mlp" and student.recipe["base"] and student.recipe["objective"] == "dino"
    again = robx(*command)
    assert again.exit_code == 0 and "already holds the complete run" in again.stderr
    changed = robx(*command, "--seed", "4")
    assert changed.exit_code == 2 and "recipe.seed: 0 -> 4" in changed.stderr and "Traceback" not in changed.output


def test_options_win_over_the_file_and_the_file_over_the_preset(scenes: Path, tmp_path: Path, recipe: Path) -> None:
    recipe.write_text('objective = "swav"\nepochs = 9\nlr = 0.5\nqueue = 8\n')
    found = robx("distill", "--teacher", "ema", *TINY, "--data", scenes, "--recipe", recipe, "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    resolved = json.loads(found.stdout)["recipe"]
    assert (resolved["objective"], resolved["epochs"], resolved["lr"], resolved["queue"]) == ("swav", 1, 0.5, 8)
    assert resolved["lr_batch"] == 4096 and resolved["optimizer"] == "larc"
    given = robx(
        *("distill", "--teacher", "ema", *TINY, "--data", scenes, "--recipe", recipe, "--dry-run", "--json"),
        *("--lr", "0.25"),
    )
    resolved = json.loads(given.stdout)["recipe"]
    assert resolved["lr"] == 0.25 and resolved["lr_batch"] is None
    assert resolved["final_lr"] == pytest.approx(0.25 * 4.8e-3 / 0.5)  # the share of the peak that the recipe ends at


def test_a_dry_run_counts_and_writes_nothing(scenes: Path, tmp_path: Path) -> None:
    command = ("distill", "--teacher", "timm:test_resnet", *TINY, "--data", scenes, "--out", tmp_path / "run")
    found = robx(*command, "--dry-run", "--gpu-memory", "24", "--json")
    assert found.exit_code == 0, found.output
    cost = json.loads(found.stdout)["cost"]
    assert cost["steps"] == 4 and cost["images"] == 64 and cost["teacher"]["name"] == "timm:test_resnet"
    # Teacher and student are the same network: two 32-px crops forward against those and one of 16 px, three times.
    ratio = cost["students"][0]["flops_per_image"] / cost["teacher"]["flops_per_image"]
    assert 3 * (2 + 0.25) / 2 * 0.8 < ratio < 3 * (2 + 0.25) / 2 * 1.4
    bound = 1 / (1 / cost["teacher_images_per_s"] + 1 / cost["student_images_per_s"])
    assert cost["bound_images_per_s"] == pytest.approx(bound)
    used = cost["fixed_bytes"] + cost["gpu_batch"] * cost["image_bytes"]
    assert 20e9 < used < 24e9 and not (tmp_path / "run").exists()
    words = robx(*command, "--dry-run", "--gpu-memory", "0.5").stdout
    assert "64 images x 1 epoch, batch 16: 4 steps" in words and "not even a micro-batch of 1" in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--student NAME is missing"),
        (("--student", "resnet18"), "--data DIR is missing"),
        (("--student", "resnet18", "--data", "DATA"), "give one of --teacher NAME"),
        (("--student", "resnet81", "--data", "DATA", "--teacher", "ema"), "unknown student 'resnet81': did you mean"),
        (
            (*TINY, "--student", "test_resnte", "--data", "DATA", "--teacher", "ema"),
            "unknown student 'test_resnte': did you mean",
        ),
        (("--student", "resnet18", "--data", "DATA", "--teacher", "dino_vits61"), "did you mean dino_vits16"),
        (("--student", "resnet18", "--data", "DATA", "--teacher", "ema"), "fewer than one batch of 1024"),
        (("--student", "resnet18", "--data", "nowhere", "--teacher", "ema"), "nowhere does not exist"),
        (("--student", "resnet18", "--data", "DATA", "--targets", "nowhere"), "nowhere does not exist"),
        (
            ("--student", "resnet18", "--data", "DATA", "--targets", "nowhere", "--teacher-weights", "f.pth"),
            "drop --teacher-weights",
        ),
        (
            ("--student", "resnet18", "--data", "DATA", "--teacher", "ema", "--teacher-weights", "f.pth"),
            "--teacher ema is the base method",
        ),
        (("--student", "resnet18", "--data", "DATA", "--teacher", "ema", "--device", "abacus"), "--device abacus"),
        (("--student", "resnet18", "--data", "DATA", "--teacher", "ema", "--device", "cuda:99"), "--device cuda:99"),
        (
            ("--student", "resnet18", "--data", "DATA", "--teacher", "timm:resnet18", "--objective", "dino"),
            "published without a head",
        ),
        (
            ("--student", "test_vit", "--data", "DATA", "--teacher", "ema", "--batch-size", "8", "--crop-size", "100"),
            "test_vit cannot process crops of 100 pixels",
        ),
        (
            (
                "--student",
                "resnet18",
                "--data",
                "DATA",
                "--teacher",
                "timm:test_vit",
                "--crop-size",
                "100",
                "--dry-run",
            ),
            "teacher timm:test_vit cannot process crops of 100 pixels",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    scenes: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [str(scenes) if argument == "DATA" else argument for argument in arguments]
    if "--data" in given:
        given += ["--out", str(tmp_path / "run")]
    found = robx("distill", *given)
    assert found.exit_code == 2 and said in found.stderr, found.output
    assert found.stderr.startswith("robx: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "student.json").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--log-every", "0"), ("--store-k", "0"), ("--probe-every", "-1"), ("--checkpoint-minutes", "0")),
        *(("--checkpoint-steps", "-1"), ("--corrupt-budget", "2"), ("--gpu-memory", "0"), ("--lr", "0")),
        ("--lr", "nan"),
    ],
)
def test_a_number_that_cannot_work_is_refused_before_anything_is_read(option: str, value: str) -> None:
    found = robx("distill", option, value)
    assert found.exit_code == 2 and f"invalid value for '{option}'" in found.stderr, found.output


@pytest.mark.parametrize(
    ("given", "missing"), [(("--gpu-memory", "24"), "give --dry-run too"), (("--store-k", "4"), "give --store-targets")]
)
def test_an_option_without_what_it_is_for_is_refused(given: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    found = robx("distill", "--teacher", "ema", *TINY, "--data", tmp_path, "--out", tmp_path / "run", *given)
    assert found.exit_code == 2 and missing in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_torchrun_did_not_start_are_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    found = robx("distill", "--teacher", "ema", *TINY, "--data", scenes, "--out", tmp_path / "run")
    assert found.exit_code == 2 and "start the processes with torchrun" in found.stderr


def test_a_recipe_that_contradicts_the_teacher_is_refused(scenes: Path, recipe: Path) -> None:
    recipe.write_text("base = true\n")
    command = ("distill", *TINY, "--data", scenes, "--recipe", recipe, "--dry-run")
    found = robx(*command, "--teacher", "timm:test_resnet")
    assert found.exit_code == 2 and "base = true contradicts --teacher timm:test_resnet" in found.stderr


def test_the_lists() -> None:
    rows = json.loads(robx("teachers", "--json").stdout)
    assert {"dino_vits16", "msn_vitl", "swav_rn50"} <= {row["name"] for row in rows}
    text = robx("teachers").stdout
    assert "CC-BY-NC-4.0 *" in text and "* non-commercial use only" in text and "vitl16_600ep" not in text
    assert "msn_vitl: 1024 prototypes, msn/vitl16_600ep.pth.tar" in robx("teachers", "--long").stdout
    assert {"resnet18", "mobilenetv3_large_100"} <= {
        row["name"] for row in json.loads(robx("students", "--json").stdout)
    }
    assert "vit_tiny_patch16_224" in robx("students").stdout


def test_the_help_has_examples_and_needs_no_torch() -> None:
    text = robx("distill", "--help").stdout
    for part in ("robx distill --teacher dino_vits16", "torchrun", "--dry-run", "exit status 75"):
        assert part in " ".join(text.split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--out DIR is missing"),
        (("--out", f"{__file__}/run"), "test_distill_commands.py is not a folder: give --out in another folder"),
        (("--out", "run", "--store-targets", f"{__file__}/t"), "is not a folder: give --store-targets another folder"),
        (("--out", "run", "--init", "nowhere"), "--init nowhere does not exist"),
        (("--out", "run", "--batch-size", "1000"), "fewer than one batch"),
    ],
)
def test_what_needs_no_teacher_is_refused_before_it_is_downloaded(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], said: str
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the teacher was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robx.distill.train.load_teacher", load)
    tiny = TINY[: TINY.index("--batch-size")] if "--batch-size" in more else TINY
    found = robx("distill", "--teacher", "dino_vits16", *tiny, "--data", scenes, *more)
    assert found.exit_code == 2 and said in found.stderr, found.output


def test_a_recipe_is_printed_for_a_student() -> None:
    found = robx("recipe", "msn", "--student", "vit_tiny_patch16_224")
    assert found.exit_code == 0 and 'objective = "msn"' in found.stdout and "patch_drop = 0.1 " in found.stdout
    assert 'optimizer = "larc"' in robx("recipe", "dino", "--student", "resnet18").stdout
    assert "centering = true" in robx("recipe", "dino", "--student", "resnet18", "--base").stdout
    unknown = robx("recipe", "dino", "--student", "resnet81")
    assert unknown.exit_code == 2 and "did you mean" in unknown.stderr


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("teacher", ["dino_vits16", "ema"])
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("option", ["--out", "--store-targets"])
def test_a_folder_of_anothers_files_is_refused_before_anything_is_loaded_or_written(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, dry: bool, teacher: str
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the teacher was loaded")

    monkeypatch.setattr("robx.distill.train.load_teacher", load)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("student.json", "teacher.json", "epoch-00000.npy"):
        (theirs / name).write_text("mine")
    before = _contents(tmp_path)
    folders = {"--out": tmp_path / "run", "--store-targets": tmp_path / "targets"} | {option: theirs}
    if teacher == "ema":
        del folders["--store-targets"]
        folders["--out"] = theirs
    given = (str(value) for pair in folders.items() for value in pair)
    found = robx("distill", "--teacher", teacher, *TINY, "--data", scenes, *given, *["--dry-run"] * dry)
    assert found.exit_code == 2 and "was not written by robx" in found.stderr, found.output
    errors = [line for line in found.stderr.splitlines() if not line.startswith("warning: --prototypes 8 is not used")]
    assert len(errors) == 1 and _contents(tmp_path) == before


@pytest.mark.parametrize("option", ["--out", "--store-targets"])
@pytest.mark.parametrize("inside", [".", "train"])
def test_nothing_is_written_among_the_images(scenes: Path, tmp_path: Path, option: str, inside: str) -> None:
    before = _contents(scenes)
    folders = {"--out": tmp_path / "run"} | {option: scenes / inside}
    given = (str(value) for pair in folders.items() for value in pair)
    found = robx("distill", "--teacher", "timm:test_resnet", *TINY, "--data", scenes, *given)
    assert found.exit_code == 2 and f"{option} {scenes / inside} is a folder of the images" in found.stderr, (
        found.output
    )
    assert _contents(scenes) == before and not (tmp_path / "run").exists()


def test_force_and_fresh_are_refused_together(scenes: Path, tmp_path: Path) -> None:
    found = robx("distill", "--teacher", "ema", *TINY, "--data", scenes, "--out", tmp_path / "r", "--force", "--fresh")
    assert found.exit_code == 2 and "--fresh starts over: give one of them" in found.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "ema", "teacher_mean": (0.5, 0.5, 0.5)}, "--teacher-mean and --teacher-std are not used"),
        ({"teacher": "ema", "local_crop_size": 16, "local_crops": 0}, "--local-crop-size is not used"),
        ({"teacher": "dino_vits16", "prototypes": 8}, "--prototypes 8 is not used: teacher dino_vits16 has prototypes"),
        ({"teacher": "timm:test_resnet", "objective": "kd", "prototypes": 8}, "teacher timm:test_resnet has classes"),
        ({"teacher": "timm:test_resnet", "prototypes": 8, "local_crop_size": 16}, None),
        ({"teacher": "ema", "prototypes": 8}, None),
    ],
)
def test_options_of_the_recipe_that_nothing_reads_are_named(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    settings = DistillSettings.of(student="test_resnet", data=tmp_path, **given)
    found = unused_options(settings, resolve_recipe(settings))
    assert (len(found) == 1 and said in found[0]) if said else not found


@pytest.mark.parametrize(("bf16", "faster"), [(True, "bf16"), (False, "fp32")])
def test_fp16_on_a_cpu_is_named_with_what_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, faster: str
) -> None:
    monkeypatch.setattr(compute, "cpu_has_bf16", lambda: bf16)
    given = {"student": "test_resnet", "teacher": "timm:test_resnet", "data": tmp_path, "device": "cpu"}
    for precision in ("fp32", "bf16", "fp16"):
        settings = DistillSettings.of(**given, precision=precision)
        found = _warnings(settings, resolve_recipe(settings))
        line = f"warning: fp16 is several times slower than {faster} on this CPU: give --precision {faster}"
        assert found == ([line] if precision == "fp16" else [])


def test_rates_beside_a_given_lr_are_used_as_they_are(tmp_path: Path) -> None:
    given = {"student": "test_resnet", "teacher": "timm:test_resnet", "data": tmp_path, "lr": 0.1}
    recipe = resolve_recipe(DistillSettings.of(**given, warmup_lr=0.02, lr_batch=64))
    assert (recipe.lr, recipe.warmup_lr, recipe.lr_batch) == (0.1, 0.02, 64)
    with pytest.raises(InputError, match="lr must be a number, got 'fast'"):
        resolve_recipe(DistillSettings.of(**given | {"lr": "fast"}))


def test_like_is_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        DistillSettings.of(student="test_resnet", teacher="timm:test_resnet", data=tmp_path, like="quick")
    said = "distill() has no argument 'like': it is a line of a recipe file: give recipe=\"quick\""
    assert str(caught.value) == said


def test_a_number_of_prototypes_that_stored_targets_lack_is_named(scenes: Path, tmp_path: Path, tiny: Any) -> None:
    tiny.tiny_run(open_source(scenes), tmp_path, store=tmp_path / "t")
    stored = read_info(tmp_path / "t").prototypes
    for prototypes, said in (
        (stored + 1, [f"--prototypes {stored + 1} is not used: the stored targets have {stored}"]),
        (stored, []),
    ):
        settings = DistillSettings.of(
            student="test_resnet", data=scenes, targets=tmp_path / "t", prototypes=prototypes, objective="msn"
        )
        assert unused_options(settings, resolve_recipe(settings)) == said


def test_a_new_folder_below_the_images_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    settings = {"student": "test_resnet", "teacher": "timm:test_resnet", "data": tmp_path, "out": out}
    DistillSettings.of(**settings)
    out.mkdir(parents=True)
    (out / "recipe.json").write_text("{}")
    assert DistillSettings.of(**settings).out == out  # the next start resumes it


def test_targets_beside_the_student_survive_fresh(scenes: Path, tmp_path: Path, tiny: ModuleType) -> None:
    for fresh in (False, True):
        tiny.tiny_run(open_source(scenes), tmp_path, store=tmp_path, options={"fresh": fresh})
    assert {"targets.json", "teacher.json", "epoch-00000.npy", "epoch-00000.json", "student.json"} <= set(
        _contents(tmp_path)
    )


@pytest.mark.parametrize(("option", "value"), [("--lr", "1e9"), ("--target-epochs", "1000000")])
def test_a_value_out_of_range_is_named_by_its_option(scenes: Path, option: str, value: str) -> None:
    found = robx("distill", "--teacher", "ema", *TINY, "--data", scenes, option, value, "--dry-run")
    assert found.exit_code == 2 and found.stderr.startswith(f"robx: {option}"), found.output
    assert "options." not in found.stderr


def test_a_changed_lr_is_listed_without_what_follows_from_it(scenes: Path, tmp_path: Path, recipe: Path) -> None:
    command = ("distill", "--teacher", "ema", *TINY, "--data", scenes, "--out", tmp_path / "run", "--recipe", recipe)
    assert robx(*command).exit_code == 0
    changed = robx(*command, "--lr", "0.5")
    assert changed.exit_code == 2 and "recipe.lr: " in changed.stderr
    assert "lr_batch" not in changed.stderr and "final_lr" not in changed.stderr
