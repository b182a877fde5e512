"""robx check on files as other programs write them, and on files that are none."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from robx.cli import main
from robx.golden.sample import GoldenSample, write_sample
from robx.records import SUPERSEDED, Bundle, describe_file, save_bundle
from tests.test_golden_sample import BUNDLES, sample_of


def write(folder: Path, bundle: Bundle) -> GoldenSample:
    """A bundle's folder with a golden sample and a model file that nothing opens."""
    folder.mkdir()
    sample = sample_of(bundle)
    (folder / "model.onnx").write_bytes(b"model")
    files = (describe_file(folder, "model.onnx", "model"), *write_sample(sample, folder))
    save_bundle(dataclasses.replace(bundle, files=files), folder)
    return sample


@pytest.fixture
def sample(tmp_path: Path) -> GoldenSample:
    return write(tmp_path / "b", BUNDLES["float"])


def check(tmp_path: Path, name: str, content: bytes | None = None, *options: str) -> Result:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    return CliRunner().invoke(main, ["check", str(tmp_path / "b"), str(tmp_path / name), *options])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_may_begin_with_a_byte_order_mark(encoding: str, sample: GoldenSample, tmp_path: Path) -> None:
    text = "\r\n".join(map(str, sample.outputs["embedding"][0]))
    found = check(tmp_path, "a.txt", text.encode(encoding))
    assert found.exit_code == 0 and "matches the golden sample" in found.stdout, found.output


def test_a_bundle_in_whose_place_an_export_was_refused_is_named(sample: GoldenSample, tmp_path: Path) -> None:
    output = sample.outputs["embedding"][0].astype("<f4").tobytes()
    assert check(tmp_path, "a.bin", output).stderr == ""
    (tmp_path / "b" / SUPERSEDED).touch()
    found = check(tmp_path, "a.bin", output, "--json")
    assert f"warning: {tmp_path / 'b'}: a later export in its place was refused" in found.stderr
    assert json.loads(found.stdout)["passes"]


def test_raw_numbers_of_other_types_are_read_or_named(sample: GoldenSample, tmp_path: Path) -> None:
    output = sample.outputs["embedding"][0]
    found = check(tmp_path, "a.bin", output.astype("<f8").tobytes())
    assert found.exit_code == 0 and "read as float64" in found.stdout
    found = check(tmp_path, "a.bin", output.astype(">f4").tobytes())
    assert found.exit_code == 3 and "the values are big-endian: write little-endian float32" in found.stderr
    for half in (output, sample.inputs):
        found = check(tmp_path, "a.bin", half.astype("<f2").tobytes())
        assert found.exit_code == 0 and "read as float16" in found.stdout, found.output
    frame = np.zeros((40, 40, 3), np.uint8)
    assert "read as uint8" in check(tmp_path, "a.bin", frame.tobytes()).stdout
    assert check(tmp_path, "a.bin", sample.inputs.astype("<f4").tobytes()).exit_code == 0


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_nan_is_a_difference(options: tuple[str, ...], sample: GoldenSample, tmp_path: Path) -> None:
    output = sample.outputs["embedding"][0].copy()
    output[2] = np.nan
    found = check(tmp_path, "a.bin", output.tobytes(), *options)
    assert found.exit_code == 3 and "it is not finite (1 values are NaN or infinity): try an fp32" in found.stderr
    assert not options or json.loads(found.stdout)["difference"] is None
    inputs = np.full(sample.inputs.shape, np.inf, np.float32)
    found = check(tmp_path, "x.bin", inputs.tobytes())
    assert found.exit_code == 3 and "fp32" not in found.stderr and "how the pixels are computed" in found.stderr


def test_a_mistake_that_does_not_explain_everything_is_called_the_closest(sample: GoldenSample, tmp_path: Path) -> None:
    names = [mistake.name for mistake in sample.record.mistakes]
    correct, mirrored = (sample.outputs["embedding"][i] for i in (0, names.index("mirrored") + 1))
    found = check(tmp_path, "a.bin", (mirrored + 0.2 * (correct - mirrored)).astype("<f4").tobytes())
    assert found.exit_code == 3
    said = (
        "no common mistake of preprocessing explains it (the closest known one leaves 25% of it: the image is mirrored)"
    )
    assert said in found.stderr and found.stderr.count("\n") == 1
    told = json.loads(check(tmp_path, "a.bin", None, "--json").stdout)
    assert told["said"] is None and told["fits"][0]["mistake"] == "mirrored"


def test_numbers_as_python_prints_them_are_read_and_rounded_ones_are_told(sample: GoldenSample, tmp_path: Path) -> None:
    output = sample.outputs["embedding"][0]
    for text in (str(output.tolist()), str([output.tolist()]), "; ".join(map(str, output))):
        assert check(tmp_path, "a.txt", text.encode()).exit_code == 0, text
    found = check(tmp_path, "a.txt", " ".join(f"{value:.1e}" for value in output).encode())
    assert found.exit_code == 3 and "no mistake is closer: write all digits" in found.stderr, found.stderr


def test_a_pass_that_is_not_exact_is_said(tmp_path: Path) -> None:
    sample = write(tmp_path / "b", dataclasses.replace(BUNDLES["float"], precision="int8", requested="int8"))
    output = sample.outputs["embedding"][0]
    found = check(tmp_path, "a.bin", (1.046 * output).astype("<f4").tobytes())
    assert found.exit_code == 0
    assert "within the tolerance of int8 (0.1), but not exactly: 4.6e-02 off" in found.stdout
    assert "not exactly" not in check(tmp_path, "a.bin", output.tobytes()).stdout


def test_what_is_no_array_of_the_user_is_said_in_words_for_the_user(sample: GoldenSample, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    with (tmp_path / "big.npy").open("wb") as file:
        file.truncate(5 * 10**9)  # a hole: it takes no space
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }".ljust(117) + "\n"
    claim = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    said = {
        "none.npy": (None, "does not exist: give the file that your program wrote"),
        "pipe.npy": (None, "is not a regular file: give a file that holds the array"),
        "big.npy": (None, "has 5.0 GB: give the output or the input tensor of one image"),
        "claim.npy": (claim, "is not an .npy file of numbers (its header says 100000000000 values"),
    }
    for name, (content, line) in said.items():
        found = check(tmp_path, name, content)
        assert found.exit_code == 2 and line in found.stderr and found.stderr.count("\n") == 1, found.output
    file = CliRunner().invoke(main, ["check", str(tmp_path / "b" / "model.onnx"), str(tmp_path / "claim.npy")])
    assert file.exit_code == 2 and "model.onnx is a file: give the folder of the bundle" in file.stderr
