"""What a killed benchmark leaves: its runner ends by itself, and the next benchmark removes its folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robx.errors import InputError
from robx.runtime.bench import ab
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.workspace import workspace
from robx.runtime.device import watch


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def runners(folder):
    """Processes whose working folder is below `folder`, including the telemetry process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(str(folder)):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_bench_leaves_no_runner_and_no_folder(make_bundle, temporary, short_profile, number):
    bundle = make_bundle()
    command = [sys.executable, "-m", "robx.cli", "bench", str(bundle), "--profile", "quick", "--processes", "1"]
    bench_process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})
    wait_until(lambda: list(temporary.glob("robx-bench-*/b0/telemetry.jsonl")))
    assert runners(temporary)
    bench_process.send_signal(number)
    bench_process.wait(timeout=30)
    wait_until(lambda: not runners(temporary), seconds=10)
    bench(BenchSettings(bundles=[bundle], profile="rapid", processes=1))
    assert list(temporary.iterdir()) == []


def test_a_live_benchmark_keeps_its_folder(temporary):
    with workspace() as first, workspace() as second:
        assert first.is_dir() and second.is_dir() and first != second
        assert oct(first.stat().st_mode & 0o777) == "0o700"
        code = "from robx.runtime.bench.workspace import workspace\nwith workspace(): pass"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(temporary)}, check=True)
        assert first.is_dir() and second.is_dir()
    assert list(temporary.iterdir()) == []


def test_only_folders_of_benchmarks_are_removed(temporary):
    kept = [temporary / "robx-bench-file", temporary / "robx-photos", temporary / "robx-bench-link"]
    kept[0].write_text("mine")
    kept[1].mkdir()
    kept[2].symlink_to(kept[1])
    (temporary / "robx-bench-dead").mkdir()
    with workspace():
        assert not (temporary / "robx-bench-dead").exists()
    assert sorted(temporary.iterdir()) == sorted(kept)


def test_the_parent_of_a_process():
    assert watch.parent_of(os.getpid()) == os.getppid()
    assert watch.parent_of(2**22 + 1) is None


def test_a_read_only_bundle_is_refused_before_it_is_measured(make_bundle, monkeypatch):
    first, second = make_bundle("a"), make_bundle("b")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != second)
    monkeypatch.setattr("robx.runtime.bench.bench.open_transport", lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr("robx.runtime.bench.ab.interleave", lambda *a, **k: pytest.fail("measured"))
    settings = BenchSettings(bundles=[first, second], profile="rapid")
    for measure in (bench, ab.compare):
        with pytest.raises(InputError, match="b is read-only: copy the model elsewhere"):
            measure(settings)
