"""Names of files, folders and labels that a shell, a terminal, a page or a parser could take for something else."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from robx.images.scenes import make_scene, render
from robx.records import load_bundle, load_student

MARKUP = "<img src=x onerror=alert(1)>"
LABELS = (
    "-rf",
    "$(touch pwned)`touch pwned`;touch pwned",
    "a 'single' \"double\" name",
    MARKUP,
    "{{7*7}}|[x](javascript:alert(1))",
    "two\nlines\r\x1b[31mred\x07",
    "\u202eright to left",
    os.fsdecode(b"caf\xe9"),
    "\N{LATIN SMALL LETTER E WITH ACUTE}" * 120,
)
ODD = f"-rf 'q' \"$(touch pwned)\" {MARKUP} two\nlines \x1b[2J " + os.fsdecode(b"\xff")
TINY = (
    *("--teacher", "ema", "--student", "test_resnet", "--crop-size", 32, "--local-crops", 0, "--batch-size", 8),
    *("--epochs", 1, "--prototypes", 8, "--workers", 0),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder to work in, beside images whose folders and files have every odd name."""
    root = tmp_path_factory.mktemp("names")
    (root / "work").mkdir()
    for part, count in (("train", 3), ("test", 2)):
        for number, label in enumerate(LABELS):
            folder = root / ODD / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                scene = make_scene(number, i + 10 * count)
                render(scene, size=32).save(folder / f"{i}{LABELS[(number + i) % len(LABELS)][:100]}.png")
    (root / ODD / "train" / "-rf" / "broken\n\x1b[31m.png").write_bytes(b"none")
    (root / ODD / "licence.txt").write_text(f"CC0 {MARKUP}\n")
    return root


class Page(HTMLParser):
    """The elements of a page that a hostile name would add, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.hostile: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if any(name.startswith("on") or (value or "").startswith("javascript") for name, value in attrs):
            self.hostile.append(f"{tag} {attrs}")

    def handle_data(self, data: str) -> None:
        self.text += data


def clean(said: tuple[int, str, str], *, status: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of a command that ended as it should, if a terminal may show them."""
    ended, out, errors = said
    assert ended == status, out + errors
    assert "Traceback" not in errors
    for text in (out, errors):
        text.encode()  # no byte of a name as it is
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text), text
    return out, errors


def test_every_command_with_odd_names(place: Path, shell: Any) -> None:
    work, data, run = place / "work", place / ODD, place / f"run {ODD[:-1]}"  # engines open UTF-8 names only
    _, said = clean(shell(work, "distill", *TINY, "--data", data, "--out", run, "--corrupt-budget", 0.1))
    assert "broken\\n\\x1b[31m.png" in said  # named, and shown as it is
    student = load_student(run)
    assert student.data is not None and student.data.licence == f"CC0 {MARKUP}"

    out, _ = clean(shell(work, "eval", run, "--data", data, "--knn", "--linear", "--cached", "--cache", place / "c"))
    assert "knn" in out
    head, weight = run / f"head {ODD[:-1]}", np.random.default_rng(0).normal(size=(len(LABELS), student.width))
    tensors = {"weight": weight.astype(np.float32), "bias": np.zeros(len(LABELS), np.float32)}
    head.write_bytes(save(tensors, metadata={"classes": json.dumps(sorted(LABELS))}))
    clean(shell(work, "export", run, "--format", "onnx", "--data", data, "--head", head))
    bundle = run / "onnx-fp32"
    assert load_bundle(bundle).labels == tuple(sorted(LABELS))
    clean(shell(work, "inspect", bundle))
    clean(shell(work, "eval", run, bundle, "--data", data, "--fidelity", "--no-cache"))
    clean(shell(work, "bench", bundle, "--profile", "rapid", "--processes", 1, "--retries", 0, "--data", data))

    out, errors = clean(shell(work, "run", bundle, data / "train"))
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 3 * len(LABELS)
    assert {Path(answer["image"]).parent.name for answer in answers} == set(LABELS)
    assert {best["label"] for answer in answers for best in answer["labels"]} <= set(LABELS)
    assert len(errors.splitlines()) == 1 and "skipped" in errors

    page = place / "report.html"
    clean(shell(work, "report", place, "-o", page))
    html = Page(page.read_text())
    assert not html.hostile and MARKUP in html.text
    markdown = page.with_suffix(".md").read_text()
    assert MARKUP not in markdown and "\x1b" not in markdown
    assert json.loads(page.with_suffix(".json").read_text())["rows"]

    assert not list(work.iterdir()) and not list(place.rglob("pwned"))


@pytest.mark.parametrize(
    "command",
    [
        ("distill", *TINY, "--out", "{odd}", "--data", "{odd}"),
        ("distill", *TINY, "--out", "{odd}", "--data", "{images}", "--recipe", "{odd}"),
        ("eval", "{odd}", "--data", "{images}"),
        ("export", "{odd}", "--format", "onnx"),
        ("inspect", "{odd}"),
        ("bench", "{odd}"),
        ("run", "{odd}", "{images}"),
        ("report", "{odd}"),
        ("distill", "--teacher", "{odd}", "--student", "test_resnet", "--data", "{images}", "--out", "{odd}"),
        ("distill", "--teacher", "ema", "--student", "{odd}", "--data", "{images}", "--out", "{odd}"),
    ],
    ids=lambda command: " ".join(command[:1]),
)
@pytest.mark.parametrize("odd", ["none " + ODD, "x" * 5000, "a/" * 3000], ids=["odd", "long", "deep"])
def test_an_error_about_an_odd_name_is_one_line(place: Path, shell: Any, command: tuple[object, ...], odd: str) -> None:
    filled = [str(a).format(odd=odd, images=place / ODD) for a in command]
    out, errors = clean(shell(place / "work", *filled), status=2)
    assert out == "" and len(errors.splitlines()) == 1 and errors.startswith("robx: "), errors
    assert not list((place / "work").iterdir())


def test_an_option_or_command_of_odd_characters(place: Path, shell: Any) -> None:
    for arguments in (("e\x1b[31mval\n",), ("eval", "--\x1b[31m\n"), ("export", "x", "--format", "\x1b[2J\n")):
        clean(shell(place / "work", *arguments), status=2)
