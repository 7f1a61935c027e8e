from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from raycap.report.data import ReportData, headline, report_data
from raycap.report.html import render, write_report
from raycap.report.livetable import number, sci
from raycap.report.runs import load_run

VOID = {"meta", "img", "br", "use"}


class Page(HTMLParser):
    """Elements are closed in the order they were opened; text and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.wrong = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report(run_folder):
    return write_report(run_folder).read_text(encoding="utf-8")


def test_the_page_loads_nothing(report):
    page = Page(report)
    assert not page.wrong and not page.open
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<object|<base", report)
    assert not re.search(r"url\((?!#)", report)
    assert "default-src 'none'" in report


def test_every_number_of_the_tables_is_on_the_page(report, run_folder, trials):
    text = " ".join(Page(report).texts)
    run = load_run(run_folder)
    for variant, scores in run.metrics["test"].items():
        assert variant in text
        for found in scores.values():
            assert number(found["score"]) in text
    for trial in trials:
        assert trial["trial_id"] in text and sci(trial["lr"]) in text and trial["state"] in text
        if trial["cider"] is not None:
            assert number(trial["cider"]) in text and number(trial["val_loss"]) in text
        assert trial["reason"] in text
    for key in ("adapter", "merged", "merged_dequantised", "merged_nf4"):
        assert f"{run.gate[key]:.4f}" in text
    assert "+3.85%" in text and "+0.77%" in text and "+0.901" in text and "[0.800, 1.000]" in text
    for expected in ("winner", "worst", "47% repeat themselves (+1)", "3.00 GiB", "cider|served",
                     "raycap sweep shapes-git train.steps=90", "d" * 64, "e" * 64):  # fmt: skip
        assert expected in text, expected


def test_what_people_wrote_stays_text(report):
    assert "<script>" not in report.replace("<script>\n", "", 1)
    text = " ".join(Page(report).texts)
    assert "赤い円 <script>" in text and "a & b" in text and "says nothing" in text


def test_figures_take_the_pages_colours(report):
    figures = re.findall(r"<svg.*?</svg>", report, re.DOTALL)
    assert len(figures) >= 5
    for figure in figures:
        assert "currentColor" in figure or "var(--" in figure
        assert not re.search(r"#[0-9a-f]{6}\b(?![0-9a-z])", figure.replace("#000000", "")), (
            "a colour that no theme swaps"
        )
        assert 'viewBox="' in figure and not re.search(r"<svg[^>]* width=", figure)
    assert 'data-trial="t01"' in report


def test_the_report_can_be_made_again_from_the_folder_alone(report, run_folder):
    assert write_report(run_folder).read_text(encoding="utf-8") == report
    assert {p.name for p in (run_folder / "plots").glob("*.svg")} >= {"cider-by-step.svg", "effect-lr.svg"}


def test_a_run_with_nothing_yet_still_has_a_page():
    page = Page(render(ReportData(name="empty", status="failed")))
    assert not page.wrong and "empty " in page.texts


@pytest.mark.parametrize("count", [1, 200])
def test_any_number_of_trials(run_folder, trials, count):
    data = report_data(load_run(run_folder))
    many = [{**trials[n % 4], "trial_id": f"t{n:03d}"} for n in range(count)]
    text = render(dataclasses.replace(data, trials=many, best_trial="t000"))
    assert len(re.findall(r'<th scope="row">t\d{3}</th>', text)) == count
    assert len(text) < 3_000_000


def test_a_trial_without_a_curve_and_a_gate_that_did_not_pass(run_folder):
    data = report_data(load_run(run_folder))
    gate = {**data.gate, "merged_dequantised": None, "drop_nf4": None, "passed": False}
    text = render(dataclasses.replace(data, gate=gate, trials=[{**t, "curve": []} for t in data.trials]))
    assert "nothing is served" in text


def test_the_sentence_says_what_the_interval_says():
    def verdict(low, high, **more):
        of = {"split": "test", "variant": "served", "against": "zero-shot"}
        return {**of, "difference": (low + high) / 2, "low": low, "high": high, **more}

    assert "beats zero-shot" in headline({}, [verdict(0.1, 0.3)], "t01")
    assert "cannot be told apart from zero-shot" in headline({}, [verdict(-0.1, 0.3)], "t01")
    assert "is worse than zero-shot" in headline({}, [verdict(-0.3, -0.1)], "t01")
    rival = verdict(-0.1, 0.2, split="val", variant="t01", against="t02")
    assert headline({}, [verdict(0.1, 0.3), rival], "t01").endswith(
        "on val it cannot be told apart from the runner-up t02."
    )
    assert "not tested" in headline({"test": {"served": {"cider": {"score": 1.0}}}}, [])
    assert headline({}, []) == ""
