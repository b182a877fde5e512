"""Defaults by device, decided from stand-in facts: no GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import PIL
import pytest
import torch

from robx.distill.resolve import DistillSettings, resolve_recipe
from robx.distill.training import compute
from robx.distill.training.compute import DeviceFacts, cuda_settings, decide, facts_of
from robx.distill.training.processes import Processes
from robx.distill.training.run import require_same_recipe
from robx.errors import InputError
from robx.images.sources import open_source

CPU = DeviceFacts(kind="cpu", cores=24)
V100 = DeviceFacts(kind="cuda", name="Tesla V100", cores=12)
H200 = DeviceFacts(kind="cuda", name="NVIDIA H200", bf16=True, tf32=True, cores=12)


@pytest.mark.parametrize(
    ("facts", "given", "precision", "tf32", "augment"),
    [
        (CPU, {}, "fp32", False, "pillow"),
        (CPU, {"precision": "bf16"}, "bf16", False, "pillow"),
        (V100, {}, "fp16", False, "device"),
        (H200, {}, "bf16", True, "device"),
        (H200, {"precision": "fp32"}, "fp32", False, "device"),
        (H200, {"precision": "fp32", "tf32": True}, "fp32", True, "device"),
        (H200, {"precision": "fp16", "augment": "pillow"}, "fp16", True, "pillow"),
        (H200, {"tf32": False}, "bf16", False, "device"),
    ],
)
def test_what_is_left_open_follows_the_device(
    facts: DeviceFacts, given: dict[str, Any], precision: str, tf32: bool, augment: str
) -> None:
    found = decide(facts, given)
    assert (found.precision, found.tf32, found.augment) == (precision, tf32, augment)
    assert found.cudnn_benchmark == (facts.kind == "cuda")


@pytest.mark.parametrize(("facts", "expected"), [(CPU, [1, 1, 2, 8]), (H200, [1, 2, 4, 95])])
def test_workers_are_the_cores_less_one_or_half_on_a_cpu(facts: DeviceFacts, expected: list[int]) -> None:
    found = [decide(DeviceFacts(kind=facts.kind, cores=cores), {}).workers for cores in (1, 3, 5, 96)]
    assert found == expected
    assert decide(facts, {}, workers=0).workers == 0


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert facts_of("cpu") == DeviceFacts(kind="cpu", bf16=compute.cpu_has_bf16(), cores=12)
    assert decide(facts_of("cuda"), {}).workers == 11


@pytest.mark.parametrize(("major", "precision"), [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_the_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = SimpleNamespace(name="a GPU", major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {1: found}[index])
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cuda", "cuda:1", None):
        assert decide(facts_of(name), {}).precision == precision
    assert facts_of("cuda:7").name == facts_of("cuda:x").name == ""  # refused later, with its own message


def test_the_user_sees_it_in_one_line() -> None:
    assert decide(H200, {}).line == (
        "computing on NVIDIA H200: bf16, TF32 for float32 products, cuDNN autotuning, crops made on the device, large "
        f"JPEGs decoded at reduced size, JPEG decoder Pillow {PIL.__version__}, 11 loader workers"
    )
    assert decide(CPU, {}, workers=1).line == "computing on cpu: fp32, crops made by the workers, 1 loader worker"


def test_the_decoder_is_recorded_where_the_device_makes_the_crops(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "jpeg_decoder", lambda: "simplejpeg 1.9")
    for augment, expected in (("device", "simplejpeg 1.9"), ("pillow", f"Pillow {PIL.__version__}")):
        recipe = tiny.tiny_recipe(augment=augment)
        assert compute.compute_of(recipe, torch.device("cpu"), workers=1).jpeg_decoder == expected


def test_options_recipe_file_and_earlier_run_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robx.distill.resolve.facts_of", lambda device: H200 if device == "cuda" else CPU)

    def resolved(**more: object) -> tuple[object, ...]:
        settings = {"student": "test_resnet", "data": tmp_path, "teacher": "ema", "objective": "dino"} | more
        recipe = resolve_recipe(DistillSettings.of(**settings))
        return recipe.precision, recipe.tf32, recipe.augment, recipe.decode

    assert resolved(device="cpu") == ("fp32", False, "pillow", "full")
    assert resolved(device="cuda") == ("bf16", True, "device", "scaled")
    assert resolved(device="cuda", precision="fp32") == ("fp32", False, "device", "scaled")
    (tmp_path / "mine.toml").write_text('precision = "fp16"\ntf32 = false\n')
    assert resolved(device="cuda", recipe=tmp_path / "mine.toml") == ("fp16", False, "device", "scaled")
    run = tmp_path / "run"
    run.mkdir()
    record = run / "recipe.json"
    record.write_text('{"recipe": {"precision": "fp32"}}')  # of a version without the other keys
    assert resolved(device="cuda", out=run) == ("fp32", False, "pillow", "full")
    record.write_text('{"recipe": {"precision": "bf16", "tf32": true, "augment": "device", "decode": "scaled"}}')
    assert resolved(device="cpu", out=run) == ("bf16", True, "device", "scaled")  # begun on a GPU
    assert resolved(device="cpu", out=run, fresh=True) == ("fp32", False, "pillow", "full")
    for damaged in ("{}", "[]", '{"recipe": 3}', "{"):
        record.write_text(damaged)
        assert resolved(device="cuda", out=run) == ("bf16", True, "device", "scaled")


def test_torchs_settings_hold_inside_the_block_alone() -> None:
    cudnn: Any = torch.backends.cudnn

    def settings() -> tuple[bool, str, str]:
        return cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision

    before = settings()
    for given, expected in (({}, "tf32"), ({"precision": "fp32"}, "ieee")):
        with cuda_settings(decide(H200, given)):
            assert settings() == (True, expected, expected)
        assert settings() == before
    with cuda_settings(decide(CPU, {})):
        assert settings() == before


def test_a_run_records_how_it_computes_and_resumes_with_another_number_of_workers(
    tiny: ModuleType, scenes: Path, tmp_path: Path
) -> None:
    source = open_source(scenes)
    tiny.tiny_run(source, tmp_path)
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["compute"] == {
        "device": "cpu", "precision": "fp32", "tf32": False, "augment": "pillow", "decode": "full",
        "cudnn_benchmark": False, "channels_last": True, "workers": 0, "jpeg_decoder": f"Pillow {PIL.__version__}",
    }  # fmt: skip
    said: list[str] = []
    tiny.tiny_run(source, tmp_path, options={"workers": 1}, say=said.append)
    assert any("already holds the complete run" in text for text in said)
    with pytest.raises(InputError, match=r"recipe\.precision: fp32 -> bf16"):
        tiny.tiny_run(source, tmp_path, recipe=tiny.tiny_recipe(precision="bf16"))


def test_ranks_with_other_recipes_are_refused_by_key(tiny: ModuleType) -> None:
    recipe = tiny.tiny_recipe()
    processes: Any = SimpleNamespace(gather=lambda mine: [mine, mine | {"precision": "fp16"}])
    with pytest.raises(InputError, match="precision is fp32 in process 0 and fp16 in process 1: set precision with"):
        require_same_recipe(recipe, processes)
    require_same_recipe(recipe, Processes(0, 1, torch.device("cpu")))
