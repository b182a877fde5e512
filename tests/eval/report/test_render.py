"""The report as a whole, on folders in the shape that robx writes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robx import api
from robx.cli import main
from robx.errors import InputError
from robx.eval.report import collect as collecting
from robx.eval.report.collect import ReportData, Run, collect
from robx.eval.report.figures import latency_figures
from robx.eval.report.plots import longest
from robx.eval.report.recommend import Budget
from robx.eval.report.render import make_pages, render
from robx.eval.report.rows import build_rows, precision_pairs
from robx.eval.report.text import at_most, clean, number
from robx.records import Latency, TensorSpec, Value, append_measurements, save_bundle

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as nested tags: fails on what does not close, and keeps text, headings, ids and tables."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] != ["style"]:
            self.words.append(data)
            if "td" in self.stack or "th" in self.stack:
                self.cells[-1] += f" {data} "

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def tags(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.attributes if tag in names]


@pytest.fixture(scope="module")
def runs(records: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "runs"
    records.write_everything(root)
    return root


@pytest.fixture(scope="module")
def data(runs: Path) -> ReportData:
    return collect([runs])


@pytest.fixture(scope="module")
def pages(data: ReportData):
    return make_pages(data)


def test_everything_under_a_folder_is_found_once(runs, data):
    assert [Path(run.folder).name for run in data.runs] == ["r18", "vit"]
    assert len(data.bundles) == 6 and data.problems == ()
    latencies = [m for m in data.measurements if isinstance(m.record, Latency)]
    assert len(latencies) == 9 and len(data.samples) == 9
    twice = collect([runs, runs / "r18", runs / "r18" / "openvino-int8"])
    assert len(twice.bundles) == 6 and len(twice.measurements) == len(data.measurements)
    alone = collect([runs / "r18" / "openvino-int8"])
    assert [p.bundle.precision for p in alone.bundles] == ["int8"] and alone.runs == ()


def test_a_bundle_of_another_student_than_its_runs_is_left_out(runs: Path, tmp_path: Path) -> None:
    """As after `robx distill --fresh`, which does not remove the bundles."""
    shutil.copytree(runs, tmp_path / "runs")
    place = tmp_path / "runs" / "r18" / "openvino-int8"
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["student"]["sha256"] = "0" * 64
    (place / "manifest.json").write_text(json.dumps(manifest))
    found = collect([tmp_path / "runs"])
    assert str(place) not in {packed.folder for packed in found.bundles} and len(found.bundles) == 5
    assert not any(measurement.file.startswith(str(place)) for measurement in found.measurements)
    (problem,) = found.problems
    assert (problem.where, problem.kind) == (str(place), "EXCLUDED") and "an earlier student" in problem.what
    assert "EXCLUDED" in make_pages(found).markdown
    with pytest.raises(InputError, match=r"no run or bundle that can be read .*openvino-int8: left out"):
        render([place], out=tmp_path / "report.html")


def test_the_same_records_give_the_same_bytes(runs, pages):
    assert make_pages(collect([runs])) == pages


def test_html_is_well_formed_with_headings_in_order_and_ids_once(pages):
    page = Page(pages.html)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    ids = [a["id"] for _, a in page.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in page.tags("a", "use")]
    targets += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", pages.html)]
    assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)


def test_figures_and_tables_speak_to_a_screen_reader(pages):
    page = Page(pages.html)
    ids = {a["id"] for _, a in page.attributes if "id" in a}
    pictures = page.tags("svg")
    assert len(pictures) == 2 + 2 + 1 + 2  # Pareto and latency a device, pairs, curves a run
    assert all(p["role"] == "img" and set(p["aria-labelledby"].split()) <= ids for p in pictures)
    assert not page.tags("img")
    tables = [tag for tag, _ in page.attributes if tag in ("table", "caption")]
    assert tables[::2] == ["table"] * (len(tables) // 2) and tables[1::2] == ["caption"] * (len(tables) // 2)
    assert all(a.get("scope") in ("row", "col") for a in page.tags("th"))
    assert all(a.get("aria-label") for a in page.tags("div") if a.get("tabindex") == "0")
    assert page.tags("html")[0]["lang"] == "en"


def test_nothing_is_loaded_from_anywhere(pages):
    page = Page(pages.html)
    assert not page.tags("script", "iframe", "object", "embed", "form")
    for _, attributes in page.attributes:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert name not in attributes or re.match("#|data:", attributes[name] or "")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in pages.html and not re.search(r"url\((?!#)", pages.html)
    assert "default-src 'none'" in pages.html


def test_light_dark_and_print_have_every_colour_that_figures_use(pages):
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", pages.html))
    themes = re.findall(r":root \{(.*?)\}", pages.html, re.DOTALL)
    assert len(themes) == 3 and all(used <= set(re.findall(r"(--[a-z0-9]+):", theme)) for theme in themes)
    assert not re.search("#0[1-7]0[1-7]0[1-7]", pages.html)


def test_every_latency_a_reader_compares_is_shown_as_recorded_in_its_column(data, pages):
    heads, rows = _markdown_table(pages.markdown, "All latencies")
    columns = {"p50": "p50 (ms)", "p90": "p90 (ms)", "load": "Load (ms)", "first": "First call (ms)"}
    columns["peak_memory"] = "Peak memory (MB)"
    assert heads == ["Model", *(columns[k] for k in ("p50", "p90", "first", "load", "peak_memory"))]
    for m in data.measurements:
        if isinstance(m.record, Latency):
            for key, value in m.record.values.items():
                cells = [row[heads.index(columns[key])] for row in rows]
                near = [float(re.search(r"[\d.]+", cell)[0]) for cell in cells]
                assert min(abs(x / value.value - 1) for x in near) < 0.005, (key, value)
    page = " ".join(Page(pages.html).cells)
    assert all(head in page for head in heads)


def test_what_no_reader_compares_is_in_the_machine_form_alone(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900, rungs=records.rungs_of(0.2, kept=True))
    latency = records.write_latency(place, bundle.id, 5.0)
    more = {"cov": Value(value=4.321, unit="%"), "throughput": Value(value=198.7, unit="images/s")}
    late = replace(latency, values=latency.values | more, started="2026-11-21T00:00:00Z")
    append_measurements(place / "measurements.jsonl", [late])
    pages = make_pages(collect([tmp_path]))
    heads, rows = _markdown_table(pages.markdown, "All latencies")
    assert heads[-1] == "Throughput (images/s)" and rows[0][-1] == "199"
    assert "4.32" not in Page(pages.html).text and "4.32" not in pages.markdown
    (row,) = [r for r in json.loads(pages.json)["rows"] if r["device"]]
    assert row["latency"]["cov"]["value"]["value"] == 4.321


def test_a_rung_shows_what_decides_and_its_reason_below_its_row(pages):
    heads, rows = _markdown_table(pages.markdown, "resnet18 · openvino int8: requested int8, shipped int8, gate PASS")
    shown = ["Probe drop", "Mean cosine", "p1 cosine", "Speed-up vs fp32", "Size"]
    assert heads == ["Candidate", "Accuracy", "Speed", *shown]
    assert rows[0][:3] == ["plain per-channel", "FAIL", "PASS"] and rows[0][-1] == "11.3 MB"
    assert rows[0][3] == "5.22 pt (4.82 to 5.67)" and rows[0][6] == "2.13 × (2.08 to 2.17)"
    assert "- **plain per-channel**: images 300, preset performance; loses more than 1 point" in pages.markdown


def test_a_rung_without_a_verdict_on_the_judged_images_says_so(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    judged, other = records.rungs_of(0.2, kept=True)
    look = {"screened": Value(value=400.0)}
    rungs = (replace(judged, accuracy="FAIL", values=judged.values | look), replace(other, accuracy="INCONCLUSIVE"))
    rungs = (*rungs, replace(rungs[1], name="third", kept=False, values=other.values | look))
    rungs = (*rungs, replace(rungs[1], name="fourth", kept=False, values={}))
    records.write_bundle(tmp_path / "r" / "openvino-int8", student, "int8", 900, rungs=rungs)
    markdown = make_pages(collect([tmp_path])).markdown
    heading = re.search(r"^.*: requested int8, shipped int8.*$", markdown, re.MULTILINE)
    assert heading is not None
    _, rows = _markdown_table(markdown, heading[0].strip("*"))
    assert [row[1] for row in rows] == ["screened out", "INCONCLUSIVE", "not judged", "not tried"]
    assert [row[2] in ("PASS", "INCONCLUSIVE") for row in rows] == [True, True, True, False]


def test_a_full_width_line_spans_its_table_and_belongs_to_its_row(data, pages):
    heads = {a["id"] for a in Page(pages.html).tags("th") if "id" in a}
    lines = [a for a in Page(pages.html).tags("td") if "colspan" in a]
    # Each latency, two rungs of two bundles, four comparisons; two students, six bundles, two devices, every record.
    assert len(lines) == 9 + 2 * 2 + 4 + 2 + 6 + 2 + len(data.measurements)
    assert {a["headers"] for a in lines} == heads and len(heads) == len(lines)
    for table in re.findall(r"<table.*?</table>", pages.html, re.DOTALL):
        width = len(re.findall('scope="col"', table))
        assert all(int(n) == width for n in re.findall(r'colspan="(\d+)"', table))


def test_each_protocol_is_one_row_and_each_comparison_one_with_its_reasons_below(data, pages):
    heads, rows = _markdown_table(pages.markdown, "Accuracy by protocol")
    assert heads == ["Model and protocol", "Top-1", "Top-5", "Evaluated", "Test set"]
    assert len(rows) == sum(m.record.kind == "accuracy" for m in data.measurements)
    assert ["resnet18 · torch fp32 (knn)", "61.3 % (58.1 to 64.4)", "81.3 % (79.0 to 83.4)", "905"] in [
        row[:4] for row in rows
    ]
    heads, rows = _markdown_table(pages.markdown, "Bundles vs their fp32 student, on the same images")
    shown = ["Probe drop", "kNN drop", "Mean cosine", "CKA", "Rank correlation", "Repeat difference"]
    assert heads == ["Bundle", *shown] and len(rows) == 4
    (int8,) = [row for row in rows if row[0] == "resnet18 · openvino int8"]
    assert int8[1] == "0.22 pt (−0.19 to 0.74)" and int8[4:] == ["0.9874", "0.9752", "0"]
    assert (
        "**vit\\_tiny\\_patch16\\_224 · openvino int8**: INCONCLUSIVE, margin 1 pt; frozen probe: drop 1.9"
        in pages.markdown
    )


def test_equal_reasons_are_one_note_below_the_table_of_all_figures(data, pages):
    heads, rows = _markdown_table(pages.markdown, "All accuracy figures")
    assert len(rows) == sum(len(m.record.values) for m in data.measurements if m.record.kind != "latency")
    below = pages.markdown[pages.markdown.index("**All accuracy figures**") : pages.markdown.index("## Provenance")]
    notes = re.findall(r"^(\d+)\. (.*)$", below, re.MULTILINE)
    assert [int(n) for n, _ in notes] == list(range(1, len(notes) + 1)) and len({text for _, text in notes}) == len(
        notes
    )
    said = {n: text.replace("\\", "") for n, text in notes}
    by_record = {}
    for row in rows:
        by_record.setdefault(row[0], set()).add(row[heads.index("Note")])
    (number,) = by_record["vit_tiny_patch16_224 · openvino int8 (vs fp32)"]
    assert said[number] == "INCONCLUSIVE, margin 1 pt; frozen probe: drop 1.9 of at most 1 point"
    (number,) = by_record["resnet18 · torch fp32 (knn)"]
    assert said[number] == "openclipart-png test, 905 images"
    assert pages.html.count("frozen probe: drop 1.9 of at most 1 point") <= 5  # two tables, the first screen, doubts
    folded = pages.html[pages.html.index("<details>") : pages.html.index("</details>")]
    assert f"All accuracy figures ({len(rows)})" in folded and '<ol class="footnotes">' in folded


def test_doubles_between_training_and_test_are_told_before_anybody_relies_on_it(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    found = {"images": 905, "identical": 2, "near": 5}
    late = records.accuracy(student.sha256[:16], "knn", 60.0, settings={"look_alikes": found})
    append_measurements(tmp_path / "r" / "measurements.jsonl", [late, late])
    text = Page(make_pages(collect([tmp_path])).html).text
    assert text.count("7 of 905 test images look like a training image (2 with the same pixels)") == 1


def test_the_same_images_are_told_of_once_with_their_counts(pages):
    assert Page(pages.html).text.count("openclipart-png (2110 images) is clip art") == 1


def test_students_of_one_name_are_told_apart_wherever_they_lie(records, tmp_path):
    for seed, place in enumerate(("a/student", "b/student", "c/other")):
        records.write_run(tmp_path / place, seed=seed)
    names = [row.name for row in build_rows(collect([tmp_path]))]
    assert len(set(names)) == 3 and "resnet18 (other)" in names


def test_two_bundles_of_one_kind_are_told_apart_by_their_folders_everywhere(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    for place in ("a/int8", "b/int8"):
        bundle = records.write_bundle(tmp_path / "r" / place, student, "int8", 900 + len(place) * ord(place[0]))
        records.write_latency(tmp_path / "r" / place, bundle.id, 7.31 + ord(place[0]))
    data = collect([tmp_path])
    labels = [label for label in data.labels.values() if "int8" in label]
    assert sorted(labels) == ["resnet18 · openvino int8 (a/int8)", "resnet18 · openvino int8 (b/int8)"]
    pages = make_pages(data)
    page = Page(pages.html)
    assert sorted({row.label for row in build_rows(data) if row.device}) == sorted(labels)
    for words in ("resnet18 · openvino int8 (a/int8)", "openvino int8 (b/int8)"):
        assert words in page.text and words in pages.markdown.replace("\\", "")
    assert not re.search(r"openvino int8(?! \()", page.text)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>|<desc[^>]*>([^<]*)</desc>", pages.html)
    assert any("(a/int8)" in "".join(words) for words in drawn)


def test_two_machines_of_one_kind_are_two_devices(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    for host, ms in (("kitchen", 7.0), ("garage", 9.0)):
        records.write_latency(place, bundle.id, ms, device=records.PI | {"host": host})
    devices = {row.device for row in build_rows(collect([tmp_path])) if row.device}
    assert devices == {f"Raspberry Pi 5 Model B, 4 threads ({host})" for host in ("kitchen", "garage")}


def test_the_first_lines_say_what_to_deploy_what_it_gains_and_loses_and_how_sure(records, data, pages):
    (pi,) = json.loads(pages.json)["summaries"]
    text = pi["text"]
    (row,) = [r for r in build_rows(data) if r.device == pi["device"] and r.label in text]
    assert text.startswith(f"On {row.device}, deploy {row.label}.")
    speedup, drop = row.speedup.value, row.drop.value
    assert f"{speedup.value:.2f} times as fast as fp32 ({speedup.low:.2f} to {speedup.high:.2f})" in text
    assert "2.0 times smaller" in text and "loses no measurable part of linear-probe accuracy" in text
    assert f"at most {drop.high:.2f} points, on 905 images" in text
    assert f"within {at_most(row.bound.value.value)} ms, with 99 % confidence (1500 calls): VALID" in text
    assert text in Page(pages.html).text and text in pages.markdown.replace("\\", "")


def test_a_recommended_fp32_model_is_not_said_to_gain_or_lose(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900_000)
    records.write_latency(place, bundle.id, 7.0)
    (one,) = json.loads(make_pages(collect([tmp_path])).json)["summaries"]
    assert "It is the fp32 model (0.9 MB): no smaller precision qualifies here" in one["text"]
    assert "Its outputs are the student's. Its kNN top-1 is 61.3 %." in one["text"] and "loses" not in one["text"]


def test_a_column_of_linear_accuracy_is_there_only_when_a_model_has_one(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    assert "Linear top-1" in make_pages(collect([tmp_path])).html
    (tmp_path / "r" / "measurements.jsonl").unlink()
    append_measurements(tmp_path / "r" / "measurements.jsonl", [records.accuracy(student.sha256[:16], "knn", 61.3)])
    pages = make_pages(collect([tmp_path]))
    assert "kNN top-1" in pages.html and "Linear top-1" not in pages.html + pages.markdown


def test_the_table_of_a_device_holds_the_records_figures(data, pages):
    form = json.loads(pages.json)
    rows = {(r["model_id"], r["device"]): r for r in form["rows"]}
    for m in data.measurements:
        if isinstance(m.record, Latency):
            found = [r for (model, _), r in rows.items() if model == m.record.bundle_id]
            (row,) = [r for r in found if r["latency"]["p50"]["source"].startswith(f"{m.place} ")]
            for key, value in m.record.values.items():
                got = row["latency"][key]["value"]
                assert (got["value"], got["low"], got["high"], got["n"]) == (
                    value.value,
                    value.low,
                    value.high,
                    value.n,
                )
            assert row["bound"]["value"]["value"] == m.record.values["p90"].high
            assert row["validity"] == m.record.verdict


def test_every_figure_of_the_machine_form_says_where_it_was_read(pages):
    form = json.loads(pages.json)
    for row in form["rows"]:
        for figure in [row["drop"], row["bound"], row["speedup"], *row["accuracy"].values(), *row["latency"].values()]:
            if figure is None or figure["how"] == "derived":
                continue
            file, line, field = re.fullmatch(r"(.*):(\d+) values\.(.*)", figure["source"]).groups()
            value = json.loads(Path(file).read_text().splitlines()[int(line) - 1])["values"]
            key, _, end = field.partition(".")
            assert figure["value"]["value"] == (value[key][end] if end else value[key]["value"])


def test_speed_up_is_the_ratio_of_medians_with_the_widest_interval(data):
    rows = [r for r in build_rows(data) if r.name == "resnet18" and r.device.startswith("Raspberry")]
    by = {r.precision: r for r in rows}
    slow, fast = by["fp32"].latency["p50"].value, by["int8"].latency["p50"].value
    got = by["int8"].speedup.value
    assert (got.value, got.low, got.high) == pytest.approx(
        (slow.value / fast.value, slow.low / fast.high, slow.high / fast.low)
    )


def test_the_decision_is_the_first_thing_and_agrees_in_all_three_forms(pages):
    page, form = Page(pages.html), json.loads(pages.json)
    assert page.text.startswith("What to deploy on 1 of 2 devices")
    (pi,) = [d for d in form["devices"] if d["device"].startswith("Raspberry Pi 5 Model B, 4 threads")]
    chosen = next(r for r in form["rows"] if r["model_id"] == pi["recommended"])
    assert (chosen["name"], chosen["precision"]) == ("vit_tiny_patch16_224", "fp16")
    assert "vit_tiny_patch16_224 openvino fp16" in page.text
    assert "**vit\\_tiny\\_patch16\\_224**, openvino fp16" in pages.markdown
    small = [b for b in pi["budgets"] if b["model_id"] and b["model_id"] != pi["recommended"]]
    (r18,) = [r for r in form["rows"] if r["model_id"] == small[0]["model_id"] and r["device"] == pi["device"]]
    assert (r18["name"], r18["precision"]) == ("resnet18", "int8")
    assert small[0]["from_ms"] == r18["bound"]["value"]["value"]


def test_a_device_of_unstable_figures_gets_a_page_that_says_so_and_shows_them_marked(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    bundle = records.write_bundle(tmp_path / "r" / "openvino-fp32", student, "fp32", 900)
    reasons = ("background_load: other processes took 80 % of a core",)
    latency = records.write_latency(
        tmp_path / "r" / "openvino-fp32", bundle.id, 7.31, verdict="UNSTABLE", reasons=reasons
    )
    pages = make_pages(collect([tmp_path]))
    page = Page(pages.html)
    bound = at_most(latency.values["p90"].high)
    assert page.text.startswith("Nothing to recommend yet: no latency is VALID")
    would = (
        f"If the UNSTABLE measurements hold, resnet18 · openvino fp32 would be recommended (p90 at most {bound} ms)."
    )
    command = f"robx bench {tmp_path / 'r' / 'openvino-fp32'} --profile standard"
    for form in (page.text, " ".join(pages.markdown.replace("\\", "").split())):
        assert would in form and command in form and "governor" in form
    assert "Not a recommendation" in page.text and reasons[0] in page.text
    assert re.search(rf'class="n shaky"[^>]*>\s*<span class="v">{latency.values["p50"].value:.2f} ms', pages.html)
    assert json.loads(pages.json)["devices"][0]["recommended"] is None
    assert f"UNSTABLE {latency.values['p50'].value:.2f} ms" in pages.markdown
    asked = make_pages(collect([tmp_path]), budgets=[Budget(ms=12)])
    assert "12 ms (requested) no recommendation" in " ".join(Page(asked.html).text.split())
    assert "| 12 ms (requested) | no recommendation |" in asked.markdown


def test_an_invalid_latency_is_struck_and_in_no_figure(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    records.write_latency(place, bundle.id, 7.31, verdict="INVALID", reasons=("output_mismatch: cosine 0.2",))
    pages = make_pages(collect([tmp_path]))
    assert 'class="n void"' in pages.html and "output_mismatch: cosine 0.2" in pages.html
    assert 'id="pareto-0' not in pages.html and 'id="latency-0' not in pages.html
    assert json.loads(pages.json)["devices"][0]["provisional"] == []
    assert "no model would qualify if one were" in pages.html and "would be recommended" not in pages.html


def test_the_latest_latency_counts_even_when_it_is_worse(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    records.write_latency(place, bundle.id, 5.0, started="2026-11-20T13:00:00Z", verdict="UNSTABLE", reasons=("drift",))
    records.write_latency(place, bundle.id, 3.0, started="2026-11-20T12:00:00Z")
    (row,) = [r for r in build_rows(collect([tmp_path])) if r.device]
    assert row.validity == "UNSTABLE" and row.latency["load"].value.value == 155.0


def test_figures_on_other_images_are_kept_out_of_the_comparison(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    other = replace(records.JUDGED, name="another set", fingerprint="9" * 64)
    late = records.accuracy(student.sha256[:16], "knn", 99.0, data=other, started="2026-11-21T00:00:00Z")
    append_measurements(tmp_path / "r" / "measurements.jsonl", [late])
    data = collect([tmp_path])
    bundle = records.write_bundle(tmp_path / "r" / "openvino-fp32", student, "fp32", 900)
    append_measurements(
        tmp_path / "r" / "openvino-fp32" / "measurements.jsonl", [records.accuracy(bundle.id, "knn", 61.2)]
    )
    data = collect([tmp_path])
    assert {r.model_id: r.accuracy["knn"].value.value for r in build_rows(data)} == {
        student.sha256[:16]: 61.3,
        bundle.id: 61.2,
    }
    assert "another set" in make_pages(data).html


def test_what_is_damaged_or_missing_is_named_and_the_rest_is_shown(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    good, bad = tmp_path / "r" / "openvino-fp32", tmp_path / "r" / "openvino-int8"
    bundle = records.write_bundle(good, student, "fp32", 900)
    records.write_bundle(bad, student, "int8", 800)
    (bad / "model.bin").write_bytes(b"changed")
    latency = records.write_latency(good, bundle.id, 4.0)
    (good / latency.samples).write_bytes(b"changed")
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnot json\n{"step": 2, "loss": 1.0}\n{"st')
    data = collect([tmp_path])
    assert sorted(Path(p.where.split(":")[0]).name for p in data.problems) == [
        "measurements.jsonl",
        "metrics.jsonl",
        "openvino-int8",
    ]
    assert data.samples == {} and len(data.runs[0].curves) == 2
    text = Page(make_pages(data).html).text
    assert "its SHA-256 differs" in text and "its latency distribution cannot be checked" in text
    assert "Deploy resnet18 · openvino fp32" in text


def test_what_cannot_be_opened_is_a_problem_and_no_end(records, tmp_path, monkeypatch):
    records.write_run(tmp_path / "r")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "measurements.jsonl").symlink_to(tmp_path / "nowhere")
    lines = ['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 1%s}' % ("0" * 400)]
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(lines))
    data = collect([tmp_path])
    assert [Path(p.where).parent.name for p in data.problems] == ["lost"]
    assert data.runs[0].curves == ({"step": 1, "loss": 2.5}, {"step": 2}, {"step": 3})

    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(collecting, "load_student", refused)
    data = collect([tmp_path])
    assert data.runs == () and any("Permission denied" in problem.what for problem in data.problems)
    assert "Permission denied" in make_pages(data).html


def test_samples_outside_of_the_folder_or_pickled_are_not_read(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    place = tmp_path / "r" / "openvino-fp32"
    bundle = records.write_bundle(place, student, "fp32", 900)
    latency = records.write_latency(place, bundle.id, 4.0)
    (place / latency.samples).rename(tmp_path / "outside.npz")
    np.savez(place / "bad.npz", process_0=np.array([{"a": 1}], dtype=object))
    digest = hashlib.sha256((place / "bad.npz").read_bytes()).hexdigest()
    outside = replace(latency, samples="../../outside.npz")
    pickled = replace(latency, samples="bad.npz", samples_sha256=digest)
    (place / "measurements.jsonl").unlink()
    append_measurements(place / "measurements.jsonl", [outside, pickled])
    data = collect([tmp_path])
    assert data.samples == {} and len(data.problems) == 2


def test_licences_and_images_are_said_plainly(pages):
    text = Page(pages.html).text
    assert "licensed CC-BY-NC 4.0: non-commercial use only" in text
    assert "clip art: drawings, not natural photographs, and not ImageNet" in text
    assert "candidates" in text.lower() and "loses more than 1 point" in text
    assert "the device has no energy counter (RAPL)" in text


def test_the_licences_of_teacher_and_images_are_listed_even_if_they_forbid_nothing(records):
    student = records.student_of("resnet18", b"x")
    student = replace(student, teacher=replace(student.teacher, name="t", licence="Apache-2.0"))
    student = replace(student, data=replace(student.data, name="pets", licence=""))
    text = Page(make_pages(ReportData(runs=(Run(folder="r", student=student),))).html).text
    assert "was made from the teacher t (licence: Apache-2.0) and the images pets (licence: unknown)." in text


@pytest.mark.parametrize(
    ("licence", "warned"),
    [("CC BY-NC-SA 4.0", True), ("non-commercial research", True), ("Apache-2.0", False), ("CNCF", False)],
)
def test_only_non_commercial_licences_warn(records, licence, warned):
    student = records.student_of("resnet18", b"x")
    student = replace(student, teacher=replace(student.teacher, licence=licence))
    html = make_pages(ReportData(runs=(Run(folder="r", student=student),))).html
    assert ("non-commercial use only" in html) is warned


hostile = st.one_of(
    st.text(min_size=1, max_size=40),
    st.sampled_from(
        [
            "</title><script>alert(1)</script>",
            ":",
            '"><img src=x onerror=alert(1)>',
            "</svg></style><b>x",
            "$\\frac{a}{b}$ _{x} ^ ${",
            "{{ 7*7 }}{% raw %}",
            "| a | b |\n---\n[x](javascript:1) `c` <!--",
            'url(#x) id="y" #010101',
            "\ud800\u202e\x00\x1b[31m",
            "]]><![CDATA[",
            "&lt;script&gt;&#x0;",
        ]
    ),
)


@pytest.fixture(scope="module")
def plain(data: ReportData) -> list[str]:
    return _tags(Page(make_pages(_renamed(data, "N")).html))


@settings(max_examples=16, deadline=None)
@given(text=hostile)
@example(text=":")
def test_whatever_a_name_says_it_stays_text(text, data, plain):
    html = make_pages(_renamed(data, text)).html
    page = Page(html)
    assert _tags(page) == plain
    assert not page.tags("script", "img", "b") and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    html.encode()
    if text.isascii() and text.isprintable():
        assert " ".join(text.split()) in page.text


def test_whatever_a_name_says_every_figure_holds(data):
    text = '</svg><script>$x_{1}^ id="a" url(#b) #010101'
    everything = replace(_renamed(data, text), samples=data.samples, runs=data.runs)
    page = Page(make_pages(everything).html)
    assert not page.tags("script") and len(page.tags("svg")) == 4  # Pareto, latency, two runs' curves
    assert '</svg><script>$x_{1}^ id="a" url(#b) #0101' in page.text  # the label, as it was written


@given(st.floats(1e-4, 1e5))
def test_a_bound_is_never_rounded_down(x):
    assert float(at_most(x)) >= x * (1 - 1e-9) and float(at_most(x)) <= x * 1.0101
    assert float(number(x)) == pytest.approx(x, rel=0.0051)


@given(st.text())
def test_clean_text_can_be_written_and_is_otherwise_kept(text):
    cleaned = clean(text)
    assert len(cleaned) == len(text) and clean(cleaned) == cleaned
    assert cleaned.encode().decode() == cleaned
    assert all(a == b or b == "\ufffd" for a, b in zip(text, cleaned, strict=True))


def _tags(page: Page) -> list[str]:
    """Every tag outside of the figures, whose marks vary with the room that a label takes."""
    return [tag for tag, _ in page.attributes if tag not in _DRAWN]


_DRAWN = {"svg", "g", "path", "use", "text", "tspan", "defs", "clippath", "rect", "title", "desc"}


def _markdown_table(text: str, caption: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table below `caption`."""
    lines = text[text.index(f"**{caption}**") :].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    cells = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines[:end]]
    return cells[0], cells[2:]


def _renamed(data: ReportData, text: str) -> ReportData:
    """One run, one bundle and one device of `data`, with every free text replaced."""
    run = data.runs[0]
    teacher = replace(run.student.teacher, name=text, licence=f"{text} NC", prototypes=text)
    info = replace(run.student.data, name=text, licence=text)
    student = replace(run.student, timm_name=text, teacher=teacher, data=info, recipe={text: text})
    packed = next(p for p in data.bundles if p.bundle.precision == "int8" and p.bundle.student == run.student)
    rungs = tuple(replace(r, name=text, reason=text, settings={text: text}) for r in packed.bundle.rungs)
    bundle = replace(packed.bundle, student=student, rungs=rungs, reason=text, target=text, versions={text: text})
    kept = []
    for m in data.measurements:
        record = m.record
        if isinstance(record, Latency) and record.bundle_id == bundle.id:
            device = {"name": text, text: {text: [text]}}
            missing, reasons = {text: text}, (text,)
            values = record.values | {text: Value(value=1.0, unit=text)}
            settings_ = {"profile": text, "threads": 4, text: text}
            record = replace(record, device=device, missing=missing, reasons=reasons, values=values, settings=settings_)
            kept.append(replace(m, record=record, file=text))
        elif not isinstance(record, Latency) and m.file.startswith(packed.folder):
            kept.append(replace(m, file=text))
    return replace(
        data,
        samples={},
        runs=(replace(run, student=student, folder=text, curves=()),),
        bundles=(replace(packed, bundle=bundle, folder=text),),
        measurements=tuple(kept),
    )


def test_markdown_tables_keep_their_columns_and_no_tag_lives(data):
    text = make_pages(_renamed(data, "| a | <b>x</b>\n`q` [l](javascript:1)")).markdown
    assert "<b>" not in text and not re.search(r"(?<!\\)\[l(?<!\\)\]", text)
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        columns = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, columns), line
        width = columns


def test_folders_without_anything_are_refused_and_a_lone_student_is_not(records, tmp_path):
    with pytest.raises(InputError, match="holds no student, bundle or measurement"):
        collect([tmp_path])
    with pytest.raises(InputError, match="is not a folder"):
        collect([tmp_path / "nowhere"])
    records.write_run(tmp_path / "r")
    page = Page(make_pages(collect([tmp_path])).html)
    assert "no latency was measured" in page.text and "61.3 %" in page.text


def test_the_command_writes_three_files_and_says_the_decision(runs, tmp_path):
    out = tmp_path / "out" / "page.html"
    done = CliRunner().invoke(main, ["report", str(runs), "-o", str(out), "--budget", "12"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("What to deploy on 1 of 2 devices: ")
    assert sorted(p.name for p in out.parent.iterdir()) == ["page.html", "page.json", "page.md"]
    asked = json.loads(out.with_suffix(".json").read_text())["devices"]
    assert [a["budget_ms"] for d in asked for a in d["asked"]] == [12, 12]
    for wrong, word in ((["report", str(tmp_path / "no")], "no"), (["report", str(runs), "-o", "x.pdf"], "x.pdf")):
        refused = CliRunner().invoke(main, wrong)
        assert refused.exit_code == 2 and refused.output.count("\n") == 1 and word in refused.output


def test_a_speed_up_over_an_fp32_that_is_not_valid_decides_nothing(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    for precision, size, ms, verdict in (("fp32", 900, 60.0, "UNSTABLE"), ("int8", 300, 10.0, "VALID")):
        place = tmp_path / "r" / f"openvino-{precision}"
        bundle = records.write_bundle(place, student, precision, size)
        records.write_latency(place, bundle.id, ms, verdict=verdict, reasons=("drift",) if verdict != "VALID" else ())
    pages = make_pages(collect([tmp_path]))
    assert "speed-up vs fp32" not in pages.markdown.split("##")[0]
    row = next(row for row in build_rows(collect([tmp_path])) if row.precision == "int8")
    assert row.speedup is None and row.speedup_shaky


@pytest.mark.parametrize("unstable", ["fp32", "int8"])
def test_a_ratio_of_latencies_that_are_not_both_valid_is_not_given(records, tmp_path, unstable):
    """A busy machine may multiply it: here 600, where the truth is 2."""
    student = records.write_run(tmp_path / "r")
    for precision, size, ms in (("fp32", 900, 3000.0 if unstable == "fp32" else 10.0), ("int8", 300, 5.0)):
        place = tmp_path / "r" / f"openvino-{precision}"
        bundle = records.write_bundle(place, student, precision, size)
        verdict = "UNSTABLE" if precision == unstable else "VALID"
        records.write_latency(place, bundle.id, ms, verdict=verdict, reasons=("drift",) if verdict != "VALID" else ())
    data = collect([tmp_path])
    pages = make_pages(data)
    (row,) = (row for row in json.loads(pages.json)["rows"] if row["precision"] == "int8")
    assert row["speedup"] is None and row["speedup_shaky"] is True
    # In the table of the device and in that of the pairs; and in no figure or sentence.
    assert pages.markdown.count("not reliable") == pages.html.count("not reliable") == 2
    assert "times as fast" not in pages.markdown + pages.html and precision_pairs(build_rows(data))[0][2] is None
    if unstable == "fp32":
        said = json.loads(pages.json)["summaries"][0]["text"]
        assert "How much faster is not known: the latency of its fp32 model is UNSTABLE." in said


def test_the_speed_of_a_candidate_that_was_timed_on_a_busy_machine_is_not_given(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    bundle = records.write_bundle(tmp_path / "r" / "openvino-int8", student, "int8", 300)
    assert "2.13 ×" in make_pages(collect([tmp_path])).markdown
    rungs = tuple(replace(rung, speed="INCONCLUSIVE") for rung in bundle.rungs)
    save_bundle(replace(bundle, rungs=rungs), tmp_path / "r" / "openvino-int8")
    pages = make_pages(collect([tmp_path]))
    assert "2.13 ×" not in pages.markdown + pages.html and "not reliable" in pages.markdown


def test_figures_by_other_training_images_are_kept_out_of_the_comparison(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    bundle = records.write_bundle(tmp_path / "r" / "openvino-fp32", student, "fp32", 900)
    for folder, model, top1, bank in (("r", student.sha256[:16], 61.3, "a"), ("r/openvino-fp32", bundle.id, 33.3, "b")):
        by = {"k": 20, "bank": {"name": bank, "images": 9, "fingerprint": bank * 64, "licence": "x"}}
        late = records.accuracy(model, "knn", top1, settings=by, started="2026-11-22T00:00:00Z")
        append_measurements(tmp_path / folder / "measurements.jsonl", [late])
    values = {
        r.precision: r.accuracy["knn"].value.value for r in build_rows(collect([tmp_path])) if "knn" in r.accuracy
    }
    assert 33.3 not in values.values() or 61.3 not in values.values()


def test_a_verdict_is_never_shown_without_the_margin_that_it_was_given_at(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    wide = tmp_path / "r" / "openvino-int8"
    bundle = records.write_bundle(wide, student, "int8", 900)
    compared = replace(records.fidelity(bundle.id, 0.0), settings={"margin": 10.0})
    append_measurements(wide / "measurements.jsonl", [compared])
    records.write_latency(wide, bundle.id, 4.0)
    gated = tmp_path / "r" / "openvino-int8-gated"
    rungs = records.rungs_of(0.0, kept=True)
    rungs = (rungs[0], replace(rungs[1], values=rungs[1].values | {"margin": Value(value=2.5, unit="%")}))
    records.write_latency(gated, records.write_bundle(gated, student, "int8", 800, rungs=rungs).id, 4.0)
    bare = tmp_path / "r" / "openvino-int8-bare"
    records.write_latency(bare, records.write_bundle(bare, student, "int8", 700).id, 4.0)
    pages = make_pages(collect([tmp_path]), margin=1.0)
    shown = " ".join(pages.markdown.replace("\\", "").split())
    for margin in ("margin 10 pt", "margin 2.5 pt", "margin not recorded"):
        assert f"PASS, {margin})" in shown, margin
    assert "PASS, margin 10 pt" in Page(pages.html).text
    assert not re.search(r"PASS\)", shown)


@pytest.mark.parametrize(
    ("margin", "budgets"), [(-1, ()), (float("nan"), ()), (float("inf"), ()), (1, (0,)), (1, (float("nan"),))]
)
def test_a_margin_or_a_budget_that_is_none_is_refused_before_anything_is_written(runs, tmp_path, margin, budgets):
    with pytest.raises(InputError, match=r"margin|budget"):
        render([runs], out=tmp_path / "r.html", margin=margin, budgets=budgets)
    assert list(tmp_path.iterdir()) == []


def test_a_report_leaves_nothing_in_the_home_folder(runs, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL", "ROBX_"))} | {
        "HOME": str(home)
    }
    command = [sys.executable, "-m", "robx.cli", "report", str(runs), "-o", str(tmp_path / "r.html")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == [] and (tmp_path / "r.html").is_file()


def test_a_bundle_says_on_which_processor_it_was_selected_and_what_was_rewritten(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    seen = {"arch": "x86_64", "model": "Some Core i7", "flags": ["avx2"]}
    records.write_bundle(
        tmp_path / "r" / "openvino-int8", student, "int8", 900, chosen_on=seen, rewrites=("re-parameterised",)
    )
    pages = make_pages(collect([tmp_path]))
    for form in (Page(pages.html).text, pages.markdown.replace("\\", "")):
        assert "Selected by its speed on Some Core i7." in form and "Rewritten before export: re-parameterised." in form


@pytest.mark.parametrize("name", ["page.html", "page.md", "page.json"])
def test_a_file_that_robx_did_not_write_is_not_replaced_by_a_report(records, tmp_path, name):
    records.write_run(tmp_path / "r")
    (tmp_path / name).write_text('{"schema": 1, "title": "mine"}' if name.endswith("json") else "# Mine\n")
    before = (tmp_path / name).read_bytes()
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r"), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"{tmp_path / name} exists and is not a robx report" in result.stderr
    assert (tmp_path / name).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "r"])


def test_a_report_replaces_an_earlier_report(runs, records, tmp_path):
    records.write_run(tmp_path / "r")
    render([tmp_path / "r"], out=tmp_path / "page.html")
    pages = render([runs], out=tmp_path / "page.html")  # with measurements: another start of each page
    assert render([runs], out=tmp_path / "page.html") == pages
    assert (tmp_path / "page.html").read_text() == pages.html


@pytest.mark.parametrize("name", ["manifest.json", "student.json", "measurements.jsonl", "cat.png"])
def test_a_folder_without_a_run_or_bundle_gives_no_report(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_text("{}")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "images"), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_what_is_damaged_is_said_on_stderr_with_its_path_once(records, tmp_path, caplog):
    student = records.write_run(tmp_path / "r")
    bundle = records.write_bundle(tmp_path / "r" / "openvino-fp32", student, "fp32", 900)
    latency = records.write_latency(tmp_path / "r" / "openvino-fp32", bundle.id, 4.0)
    (tmp_path / "r" / "openvino-fp32" / latency.samples).write_bytes(b"changed")
    (tmp_path / "r" / "measurements.jsonl").write_text("{]\n")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r"), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "warning: " in line]
    assert len(lines) == 2 and "its SHA-256 differs" in result.stderr
    assert [line.count(str(tmp_path)) for line in lines] == [1, 1]
    api.report(tmp_path / "r", out=tmp_path / "again.html")
    assert [record.message for record in caplog.records] == lines
    assert all(problem.where not in problem.what for problem in collect([tmp_path]).problems)


def test_the_test_set_of_the_accuracy_is_named_where_there_are_several(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    for images, fingerprint, top1 in ((20, "1" * 64, 99.0), (5000, "9" * 64, 55.0), (40, "2" * 64, 98.0)):
        info = replace(records.JUDGED, name="val", images=images, fingerprint=fingerprint)
        record = records.accuracy(student.sha256[:16], "knn", top1, data=info)
        append_measurements(tmp_path / "r" / "measurements.jsonl", [record])
    data = collect([tmp_path])
    (row,) = build_rows(data)
    assert row.accuracy["knn"].value.value == 55.0  # of the largest set, not of the last or of the first fingerprint
    (caveat,) = [doubt for doubt in json.loads(make_pages(data).json)["doubts"] if doubt[0] == "TEST SET"]
    assert "val (5000 images, fingerprint 999999999999)" in caveat[1] and "4 test sets" in caveat[2]
    assert "val (20 images" in caveat[2] and "905 images" in caveat[2]


def test_one_test_set_needs_no_caveat(pages):
    assert not [doubt for doubt in json.loads(pages.json)["doubts"] if doubt[0] == "TEST SET"]


def test_bundles_of_another_input_size_have_a_name_of_their_own_and_are_no_pair(records, tmp_path):
    student = records.write_run(tmp_path / "r")
    small = replace(student.preprocessing, crop=160)
    places = {"fp32": 9.0, "int8": 4.0, "int8-160": 2.0}
    for name, ms in places.items():
        changes = {"preprocessing": small} if name.endswith("160") else {}
        if changes:
            changes["inputs"] = (TensorSpec(name="pixels", dtype="float32", shape=(None, 3, 160, 160)),)
        bundle = records.write_bundle(tmp_path / "r" / name, student, name[:4], int(100 * ms), **changes)
        records.write_latency(tmp_path / "r" / name, bundle.id, ms)
    data = collect([tmp_path])
    rows = {Path(row.folder).name: row for row in build_rows(data) if row.device}
    assert rows["int8-160"].label == "resnet18 at 160x160 · openvino int8"
    assert rows["int8"].label == "resnet18 · openvino int8" and rows["int8"].speedup is not None
    assert rows["int8-160"].speedup is None  # the fp32 bundle has another input size
    assert len(set(data.labels.values())) == len(data.labels)


def test_a_few_very_slow_calls_do_not_set_the_axis_of_the_latencies():
    quiet = np.linspace(10.0, 11.0, 1000)
    assert longest(quiet) == pytest.approx(np.quantile(quiet, 0.99))
    loaded = np.concatenate([quiet[:960], np.full(40, 900.0)])
    assert longest(loaded) <= 2 * np.quantile(loaded, 0.9) < 30


def test_the_caption_of_the_latencies_counts_what_is_not_drawn(data):
    rows = [row for row in build_rows(data) if row.device]
    for picture in latency_figures(rows, data.samples):
        here = [r for r in rows if picture.caption.startswith(f"{r.device}:") and r.samples in data.samples]
        pooled = [np.concatenate(data.samples[row.samples]) for row in here]
        beyond = sum(int((ms > min(np.quantile(ms, 0.99), 2 * np.quantile(ms, 0.9))).sum()) for ms in pooled)
        assert beyond > 0 and f"without the {beyond} above each model's 99th percentile" in picture.caption
