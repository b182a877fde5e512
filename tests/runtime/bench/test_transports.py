"""Reaching devices over SSH: a real sshd on the loopback interface if installed, and shims for forced failures."""

import getpass
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robx.errors import DeviceError, InputError
from robx.runtime.bench import over_ssh
from robx.runtime.bench.bench import BenchSettings, bench
from robx.runtime.bench.transports import open_transport
from robx.runtime.doctor import examine
from robx.store.files import sha256_file


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_bench_over_ssh(ssh_device, make_bundle, short_profile, monkeypatch):
    folders, trusted = [], over_ssh.folder_in
    monkeypatch.setattr(over_ssh, "folder_in", lambda *a: folders.append(trusted(*a)) or folders[-1])
    (record,) = bench(BenchSettings(bundles=[make_bundle()], device=ssh_device, profile="rapid", python=sys.executable))
    assert record.device["kind"] == "ssh"
    assert record.values["p50"].value > 0 and record.values["output_cosine"].value > 0.9999
    assert "do not apply to the device" in record.missing["preprocess"]
    assert not {r.split(":")[0] for r in record.reasons} & {"failed", "incomplete", "output_mismatch"}
    assert len(folders) == 1 and not Path(folders[0]).exists(), "cleaned up"


def test_the_doctor_over_ssh(ssh_device):
    facts, findings = examine(ssh_device, python=sys.executable)
    assert facts["arch"] == os.uname().machine
    assert next(f for f in findings if f.name == "onnxruntime").version


def test_a_rejected_key_is_one_line_and_no_prompt(ssh_device):
    refused = ssh_device.replace(getpass.getuser(), "nobody")
    with pytest.raises(DeviceError, match="reaching ssh://nobody@") as caught, open_transport(refused):
        pass
    assert "\n" not in str(caught.value)


def test_files_with_hostile_names_arrive(ssh_device, tmp_path):
    names = ["-rf", "a b", "$(touch owned)", "x;y", "quote'\"", "semi:colon", "tab\there", "ünï"]
    files = {}
    for i, name in enumerate(names):
        (tmp_path / "from").mkdir(exist_ok=True)
        (tmp_path / "from" / name).write_text(str(i))
        files[f"deep/{name}"] = tmp_path / "from" / name
    (tmp_path / "back").mkdir()
    code = "import os,json; json.dump({n: open('deep/'+n).read() for n in os.listdir('deep')}, open('out.json','w'))"
    with open_transport(ssh_device) as transport:
        transport.push(files, "b0")
        assert transport.run("b0", [sys.executable, "-c", code], timeout=30)[0] == 0
        got = json.loads(transport.pull("b0", "out.json", tmp_path / "back").read_text())
        status, text = transport.run(
            "b0", [sys.executable, "-c", "import sys; print(sys.argv[1:])", *names], timeout=30
        )
    assert got == {name: str(i) for i, name in enumerate(names)}
    assert status == 0 and text == str(names)


def test_a_hung_run_is_ended_and_cleaned_up(ssh_device, tmp_path):
    with open_transport(ssh_device) as transport:
        (tmp_path / "x").write_text("1")
        transport.push({"x": tmp_path / "x"}, "b0")
        root = Path(transport._root)
        assert root.is_dir()
        with pytest.raises(DeviceError, match="did not answer within 1 s"):
            transport.run("b0", [sys.executable, "-c", "import time; time.sleep(5)"], timeout=1)
    assert not root.exists()


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("echo 'ssh: connect to host x port 22: No route to host' >&2; exit 255", "No route to host"),
        ("echo 'Welcome! / ; rm -rf ~'", "where a folder name was expected"),
        ("echo /tmp/../robx-aaaaaaaaaa", "where a folder name was expected"),
        ("echo '/tmp/x y/robx-aaaaaaaaaa'", "where a folder name was expected"),
        ("exit 0", "where a folder name was expected"),
        ("head -c 100000 /dev/urandom", "where a folder name was expected"),
    ],
)
def test_a_device_that_sends_nonsense(shims, behaviour, line):
    script(shims / "ssh", behaviour)
    with pytest.raises(DeviceError, match=line) as caught, open_transport("ssh://box"):
        pass
    assert "\n" not in str(caught.value)


def test_a_device_that_never_answers(shims, monkeypatch):
    monkeypatch.setattr(over_ssh, "CONNECT_SECONDS", 0.2)
    script(shims / "ssh", "exec sleep 30")
    start = time.monotonic()
    with pytest.raises(DeviceError, match="did not answer"), open_transport("ssh://box"):
        pass
    assert time.monotonic() - start < 5


LOCAL_SSH = 'for last; do :; done; exec sh -c "$last"'
# Copies within this machine; the host's name before the colon is cut off.
LOCAL_SCP = 'for to; do from=$last; last=$to; done; exec cp -r -- "${from#box:}" "${to#box:}"'


@pytest.fixture
def loopback(shims, temporary):
    """ssh and scp that reach this machine without a network; tests below break them."""
    script(shims / "ssh", LOCAL_SSH)
    script(shims / "scp", LOCAL_SCP)
    return shims


def left_over(folder):
    return [p for p in folder.iterdir() if p.name.startswith("robx-")]


def test_the_loopback_shims_work(loopback, temporary, make_bundle, short_profile):
    (record,) = bench(
        BenchSettings(bundles=[make_bundle()], device="ssh://box", profile="rapid", python=sys.executable, processes=1)
    )
    assert "failed" not in {r.split(":")[0] for r in record.reasons}
    assert left_over(temporary) == []


def test_a_connection_that_drops_midway_leaves_an_invalid_record(loopback, temporary, make_bundle, short_profile):
    # The second run of the runner is cut off, as by a lost link; the first one's samples are kept.
    count = temporary / "count"
    drop = f'case "$last" in *job.json*) echo x >> {count}; [ $(wc -l < {count}) -gt 1 ] && exit 255;; esac'
    script(loopback / "ssh", f'for last; do :; done; {drop}; exec sh -c "$last"')
    folder = make_bundle()
    (record,) = bench(BenchSettings(bundles=[folder], device="ssh://box", profile="rapid", python=sys.executable))
    assert record.verdict == "INVALID"
    assert {r.split(":")[0] for r in record.reasons} >= {"failed", "incomplete"}
    assert "was lost" in record.reasons[0]
    assert (folder / record.samples).is_file() and (folder / "measurements.jsonl").is_file()
    assert left_over(temporary) == []


@pytest.mark.parametrize(
    ("scp", "line"),
    [
        ('case "$*" in *result.zip*) echo garbage > "${to#box:}/result.zip"; exit 0;; esac', "damaged result"),
        ('case "$*" in *result.zip*) exit 0;; esac', "sent no result.zip"),
        ('case "$*" in *result.zip*) echo "disk full" >&2; exit 1;; esac', "disk full"),
    ],
)
def test_a_result_that_is_damaged_or_lost(loopback, temporary, make_bundle, short_profile, scp, line):
    script(loopback / "scp", f"for to; do :; done; {scp}; last=; {LOCAL_SCP}")
    folder = make_bundle()
    with pytest.raises(DeviceError, match=line):
        bench(BenchSettings(bundles=[folder], device="ssh://box", profile="rapid", python=sys.executable, processes=1))
    assert not (folder / "measurements.jsonl").exists()
    assert left_over(temporary) == []


def test_a_file_damaged_in_transit(loopback, temporary, make_bundle, short_profile):
    folder = make_bundle()
    damaged = f'"${{to#box:}}files/{sha256_file(folder / "model.onnx")}"'
    text = 'for to; do from=$last; last=$to; done; cp -r -- "${from#box:}" "${to#box:}" || exit 1; '
    script(loopback / "scp", f"{text} [ ! -e {damaged} ] || {{ rm {damaged}; echo x > {damaged}; }}")
    with pytest.raises(DeviceError, match="arrived damaged"):
        bench(BenchSettings(bundles=[folder], device="ssh://box", profile="rapid", python=sys.executable))
    assert left_over(temporary) == []


def test_a_device_without_a_runtime_or_a_python(loopback, temporary, make_bundle, short_profile):
    with pytest.raises(DeviceError, match="No module named"):
        bench(
            BenchSettings(
                bundles=[make_bundle()], device="ssh://box", profile="rapid", python=f"{sys.executable} -S", processes=1
            )
        )
    with pytest.raises(DeviceError, match="nopython"):
        bench(BenchSettings(bundles=[make_bundle("b")], device="ssh://box", profile="rapid", python="nopython3"))
    assert left_over(temporary) == []


def test_an_invalid_python_command(tmp_path):
    with pytest.raises(InputError, match="close its quotes"):
        examine("local", python="python3 'x")
    (tmp_path / "python").write_text("no program")
    with open_transport("local") as transport, pytest.raises(DeviceError, match="Permission denied"):
        transport.push({"x": tmp_path / "python"}, "b0")
        transport.run("b0", [str(tmp_path / "python"), "-c", "1"], timeout=5)


def test_the_users_own_file_size_limit_is_kept(shims):
    script(shims / "ssh", 'echo "$(ulimit -Hf)" >&2; exit 1')
    code = "import robx.runtime.bench.transports as t; t.open_transport('ssh://box').__enter__()"
    lower = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=lower)
    assert done.stderr.strip().endswith("failed: 1953"), "in blocks of 512 bytes"


def test_adb_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="needs the command 'adb'"), open_transport("adb://x"):
        pass


@pytest.mark.parametrize(
    "address",
    [
        "ssh://-oProxyCommand=touch",
        "ssh://",
        "ssh://user:password@host",
        "ssh://host/folder",
        "ssh://host:port",
        "ssh://host:99999",
        "ssh://ho st",
        "ssh://ho`st",
        "ssh://$(x)@host",
        "ssh://-l@host",
        "ssh://[::1",
        "ssh://host?x",
        "adb://-x",
        "adb://a b",
        "ssh://h\nx",
        "ssh://h\tx",
        "ssh://h\rx",
        "\nssh://h",
        "ssh://h\x00",
        "ssh://h\x1b[31m",
        "adb://a\nb",
        "ssh://h:0",
        "ssh://u@h:00",
        "telnet://host",
        "host",
        "",
    ],
)
def test_invalid_addresses(address):
    with pytest.raises(InputError, match="device"):
        open_transport(address)


def test_valid_addresses():
    for address, destination, port in (
        ("ssh://pi@raspberrypi", "pi@raspberrypi", None),
        ("ssh://Jetson-Nano:2222", "Jetson-Nano", 2222),
        ("ssh://u@[fe80::1]:22", "u@fe80::1", 22),
    ):
        transport = open_transport(address)
        assert (transport._destination, "-p" in transport._ssh) == (destination, port is not None)
        assert "BatchMode=yes" in transport._ssh and "BatchMode=yes" in transport._scp
