"""Whatever a name contains, a message is one line that is safe on a terminal."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robx.errors import MissingExtra, counted, did_you_mean, duration, first_line, one_line, shortened, visible

# Lone surrogates too: they stand for the bytes of a name that is not UTF-8.
ANY = st.text(st.characters() | st.characters(categories=("Cs", "Cc", "Cf", "Zl", "Zp")))


@given(ANY)
def test_what_is_shown_is_printable_and_can_be_told_apart(text: str) -> None:
    shown = visible(text)
    shown.encode()  # no byte as it is
    assert shown.isprintable()
    if "\\" not in text and "'" not in text:
        assert ast.literal_eval(f"'{shown}'") == text  # the escapes are Python's


@given(ANY)
def test_a_message_is_one_line(text: str) -> None:
    line = one_line(f"robx: {text}")
    assert line.isprintable() and line.startswith("robx:") and one_line(line) == line
    assert one_line("plain words, é and 漢字: say so") == "plain words, é and 漢字: say so"


@given(st.text("ab .", max_size=40), st.integers(6, 30))
def test_a_message_is_cut_between_words(text: str, limit: int) -> None:
    short = shortened(text, limit)
    assert len(short) <= limit and (short == text) == (len(text) <= limit)
    kept = short.removesuffix(" ...")
    if short != text and " " in text[: limit - 3].strip():
        assert text.startswith(kept) and text[len(kept)] == " "


def test_a_long_error_is_cut_between_words() -> None:
    error = RuntimeError("cannot reach the host, try again later\nand more")
    assert first_line(error, limit=31) == "cannot reach the host, try ..."
    assert first_line(error, limit=32) == "cannot reach the host, try ..."
    assert first_line(error, limit=38) == first_line(error) == "cannot reach the host, try again later"
    assert shortened("x" * 200, 20) == "x" * 16 + " ..."


def test_a_missing_package_is_named_with_its_extra_and_its_cause() -> None:
    error = MissingExtra("openvino", "openvino", purpose="the export", cause=ImportError("no module"))
    assert str(error) == "the export needs the package openvino (no module): pip install 'robx[openvino]'"
    assert error.exit_status == 2


def test_a_similar_name_is_suggested_whatever_its_case() -> None:
    formats = ("onnx", "openvino", "ncnn")
    assert did_you_mean("ONNX", formats, otherwise="") == "did you mean onnx?"
    assert did_you_mean("onnxx", formats, otherwise="") == "did you mean onnx?"
    assert did_you_mean("OpenVIN", formats, otherwise="", prefix="--") == "did you mean --openvino, --onnx?"
    assert did_you_mean("tflite", ("ONNX",), otherwise="known are ONNX") == "known are ONNX"


def test_a_count_and_its_noun_agree() -> None:
    found = [counted(n, "epoch") for n in (0, 1, 2)] + [counted(n, "batch", "batches") for n in (1, 3)]
    assert found == ["0 epochs", "1 epoch", "2 epochs", "1 batch", "3 batches"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "1 second"), (36, "36 seconds"), (1800, "30 minutes"), (11556, "3.2 hours")]
)
def test_a_duration_is_in_a_unit_that_can_be_read(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
