"""Fixtures for all tests. Nothing here needs the network."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import robx  # noqa: F401 (switches telemetry off before any engine is imported)
from tests.preloaded import Preloaded

# torch is imported in the fixtures alone: pytest-xdist's controlling process runs no test, and its workers wait for it.

# Files and folders of tests that train, export, measure or start processes for more than a few seconds each. They are
# marked `slow`: make test-unit leaves them out, make test runs everything.
SLOW = (
    "demo/test_demo.py",
    "distill/objectives/test_objectives_in_processes.py",
    "distill/objectives/test_rob_dino.py",
    "distill/students/test_sizes.py",
    "distill/students/test_student.py",
    "distill/test_crop_shapes.py",
    "distill/teachers/test_foreign_files.py",
    "distill/teachers/test_write_checkpoint.py",
    "distill/test_student_kinds.py",
    "distill/test_train.py",
    "distill/training/test_on_cuda.py",
    "distill/training/test_processes.py",
    "docs/test_pages.py::test_the_",
    "eval/report/test_render.py",
    "eval/report/test_report_browser.py",
    "eval/test_evaluate.py",
    "export/formats",
    "export/gate/test_gate.py",
    "export/gate/test_half.py",
    "export/gate/test_judge.py",
    "export/heal",
    "export/test_build.py",
    "export/test_odd_inputs.py",
    "faults",
    "runtime/bench/test_adb.py",
    "runtime/bench/test_bench.py",
    "runtime/bench/test_retries.py",
    "runtime/bench/test_ssh_faults.py",
    "runtime/bench/test_transports.py",
    "runtime/device/test_native.py",
    "runtime/test_runtime_commands.py",
    "ship",
    "test_checkout_without_links.py",
    "test_end_to_end.py",
    "test_named_students.py",
    "test_packaging.py",
)

# More of what other tests check already: make test leaves them out, make test-slow runs them.
SOAK = (
    *(
        f"test_named_students.py::test_a_listed_student_works_end_to_end[{name}]"
        for name in (
            *("resnet18", "resnet34", "resnet50", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0"),
            *("vit_tiny_patch16_224", "vit_small_patch16_224"),
        )
    ),
    "distill/training/test_processes.py::test_a_run_of_one_process_goes_on_in_two",
    "distill/training/test_processes.py::test_killed_then_asked_to_end_then_resumed_it_is_the_unbroken_run",
    "eval/test_evaluate.py::test_a_limit_of_memory_ends_in_one_line[4.0]",
    "eval/test_evaluate.py::test_two_processes_write_what_one_does_and_so_does_their_cache",
    "export/formats/test_network.py::test_a_size_has_a_folder_of_its_own",
    "export/formats/test_network.py::test_a_student_is_exported_at_another_size[size0",  # square; the other is not
    "export/formats/test_network.py::test_the_manifest_says_that_a_student_was_fused_and_the_bundle_is_faster",
    "export/test_readme.py::test_the_kotlin_code_compiles",
    "export/gate/test_judge.py::test_a_re_parameterisable_student_is_judged_fused",
    "faults/test_signals.py::test_sigterm_ends_a_run_that_waits_for_an_image",
    "runtime/bench/test_record.py::test_bench_reports_the_other_cpu",
    "test_checkout_without_links.py::test_its_tests_run",
    "test_end_to_end.py::test_the_whole_pipeline",
    "export/formats/test_network.py::test_a_channels_last_network_exports_what_timm_computes",
    "export/heal/test_heal.py::test_an_export_tries_plain_and_healed_weights_and_records_both",
    "faults/test_elastic.py",
    "faults/test_kill.py::test_killed_at_any_rename",
    "faults/test_names.py::test_every_command_with_odd_names",
    "faults/test_space.py",
    "runtime/test_hostile_bundles.py::test_a_loop_without_end_obeys_signals",
    "distill/test_train.py::test_a_compiled_run_is_the_plain_one",
    "distill/test_crop_shapes.py::test_an_exported_student_gives_the_embeddings_of_the_manifests_preprocessing[cnn]",
    "runtime/device/test_native.py::test_the_sanitizers_find_nothing_in_a_run",
)


def pytest_configure(config: pytest.Config) -> None:
    """No deadline for an example of hypothesis: on a busy machine it waits for as long as others compute."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # pytest-xdist's controlling process
    with contextlib.suppress(ImportError):  # a machine with a GPU may lack it
        from hypothesis import settings

        settings.register_profile("robx", parent=settings.default, deadline=None)
        settings.load_profile("robx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of SLOW and SOAK, and begin with the former, so that no process ends long after the others."""
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if name.startswith(SOAK):
            item.add_marker(pytest.mark.soak)
    items.sort(key=lambda item: "faults/test_kill" not in item.nodeid)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Ctrl-C raises KeyboardInterrupt here and in all processes, as it does not in a shell's background job."""
    with contextlib.suppress(ValueError):  # only a process's main thread may
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """fsync returns at once in this process: no test cuts the power, and the suite makes some ten thousand calls.

    On an ordinary disk each takes ten milliseconds and more.
    """

    def fsync(file: int | IO[Any]) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """Starts Python processes that have imported torch and robx: where a test needs a process, but not its imports."""
    server = Preloaded()
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def _export_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """torch.onnx.export exports a network once for all tests of a run; yields the real one."""
    import torch

    from tests.once_exported import OnceExported

    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "onnx"
    real = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPORTED_ONCE", str(shared))  # for processes that export too
        patch.setattr(torch.onnx, "export", OnceExported(real, shared))
        yield real


@pytest.fixture
def real_exporter(_export_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of torch.onnx.export itself: every call exports."""
    import torch

    monkeypatch.setattr(torch.onnx, "export", _export_once)


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tar shards of 96 training and 48 test scenes, 64 px, labelled by their number of objects."""
    from robx.images.scenes import write_scenes

    folder = tmp_path_factory.mktemp("shards") / "scenes"
    write_scenes(folder, train=96, test=48, size=64)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of scenes as image files: train/<label>/x.png (64) and test/<label>/x.png (32), 64 px."""
    from robx.images.scenes import make_scene, render

    root = tmp_path_factory.mktemp("scenes")
    for index in range(96):
        scene = make_scene(1, index)
        path = root / ("train" if index < 64 else "test") / str(scene.count_label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene, size=64).save(path)
    return root
