from __future__ import annotations

import dataclasses
import re

import pytest

from raycap.report.data import ReportData, report_data
from raycap.report.html import render
from raycap.report.pictures import Picture
from raycap.report.provenance import weights_bytes
from raycap.report.runs import load_run
from raycap.report.sections import pictures, rungs, verdicts
from raycap.report.summary import text_summary


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_the_trials_that_may_be_the_best_are_marked_in_the_table(run_folder):
    data = report_data(load_run(run_folder))
    told = {"best": "t01", "together": ["t01", "t00"], "p": {"t01": 1.0, "t00": 0.31, "t02": 0.001}, "images": 128}
    page = render(dataclasses.replace(data, separation=told))
    rows = {name: look for look, name in re.findall(r'<tr(?: class="([^"]*)")?><th scope="row">(t\d\d)</th>', page)}
    assert rows == {"t01": "win near", "t00": "near", "t02": "dim", "t03": ""}
    assert "not separable from the best (max-T p 0.310)" in text_of(page)
    assert "1 more of 3 scored trials may be as good as t01 on 128 validation images: t00." in text_of(page)


def test_a_best_trial_that_stands_alone_marks_nobody(run_folder):
    data = report_data(load_run(run_folder))
    told = {"best": "t01", "together": ["t01"], "p": {"t01": 1.0, "t00": 0.01}, "images": 128}
    page = text_of(verdicts(dataclasses.replace(data, separation=told)))
    assert "t01 is separated from every other scored trial on 128 validation images." in page
    assert "marked" not in page


def test_a_note_says_what_the_marks_beside_it_do_not(run_folder):
    data = report_data(load_run(run_folder))
    t00, t01, t02, t03 = data.trials
    place = "cider 0.05 at step 111: place 2 of 3 that cannot win, one in 3 goes on"
    many = [
        {**t00, "reason": f"{place}; its captions have collapsed (47% repeat themselves); cannot win: alone it would take 4.00 GB"},
        {**t02, "reason": "cider 0.1 at step 10: place 5 of 12, one in 3 goes on"},
    ]  # fmt: skip
    page = text_of(render(dataclasses.replace(data, trials=[t01, t03, *many])))
    assert "place 2 of 3 that cannot win at step 111; cannot win: alone it would take 4.00 GB" in page
    assert "its captions have" not in page and "t02 stopped" in page
    assert "collapsed 47% repeat themselves (+1); place 5 of 12 at step 10 " in page
    assert "1 collapsed, whatever the score says" in page


def test_the_gate_calls_a_negative_drop_a_gain(run_folder):
    data = report_data(load_run(run_folder))
    page = text_of(render(dataclasses.replace(data, gate={**data.gate, "drop_nf4": -0.0243})))
    assert "-2.43% (a gain)" in page and "+3.85%" not in page


def test_settings_are_judged_over_seeds_and_only_where_seeds_were_run():
    assert "Settings over seeds" not in verdicts(ReportData(name="x"))
    told = {
        "settings": ["t01", "default"], "images": 128, "cider": {"t01": [1.5, 1.7], "default": [1.0, 1.2]},
        "verdicts": {"default": {"difference": 0.5, "low": 0.2, "high": 0.8, "p": 0.01, "p_holm": 0.02}},
        "sentence": "Over 2 other seeds the setting of t01 beats that of default.",
    }  # fmt: skip
    page = verdicts(ReportData(name="x", settings=told))
    said = text_of(page)
    assert told["sentence"] in said and "1.600 1.500, 1.700" in said
    # The verdict says what the first gains over the other; the other's row says what it loses.
    assert "worse -0.500 [-0.800, -0.200] 0.0200" in said
    unsure = {**told, "verdicts": {"default": {**told["verdicts"]["default"], "p_holm": 0.2}}}
    assert "cannot be told apart" in verdicts(ReportData(name="x", settings=unsure))


def test_a_verdict_needs_its_interval_and_its_adjusted_p():
    def pill(**more):
        told = {
            "split": "test",
            "variant": "served",
            "against": "zero-shot",
            "difference": 0.2,
            "low": 0.1,
            "high": 0.3,
        }
        return re.findall(
            r'<span class="pill[^"]*">([^<]*)', verdicts(ReportData(name="x", verdicts=[{**told, **more}]))
        )

    assert pill() == ["better"] and pill(p_holm=0.2) == ["cannot be told apart"]
    assert pill(low=-0.1) == ["cannot be told apart"] and pill(low=-0.3, high=-0.1, p_holm=0.01) == ["worse"]


def test_who_says_the_same_stands_together_with_one_score():
    picture = Picture(image_id="a", image=b"\x89PNG", references=["ref one", "ref two"], kind="worst",
                      captions={"served": "same", "zero-shot": "other", "adapter": "same", "merged-nf4": ""},
                      scores={"served": 0.25, "adapter": 0.25, "zero-shot": 0.5})  # fmt: skip
    said = text_of(pictures(ReportData(name="x", pictures=[picture])))
    assert "adapter, served CIDEr 0.25 same" in said and "zero-shot CIDEr 0.50 other" in said
    assert "merged-nf4 says nothing" in said and "1 more ref two" in said and "where the winner scores lowest" in said


@pytest.mark.parametrize("own", [True, False])
def test_the_rungs_are_quoted_with_their_source(own):
    row = {"step": 111, "share": 0.111, "trials": 12, "going": 4, "kept": False, "lost": 0.123,
           "cider": {"spearman": 0.87, "low": 0.5, "high": 0.97}}  # fmt: skip
    found = {"source": "results/reference-shapes-git.json", "own": own, "commit": "abcdef0123456789", "steps": 333,
             "eta": 3, "rows": [row]}  # fmt: skip
    said = text_of(rungs(ReportData(name="x", reference=found, steps=999)))
    assert "0.87 [0.50, 0.97]" in said and "4 of 12 go on: loses the best trial, CIDEr −0.123" in said
    assert ("commit abcdef012345" in said) is not own and ("A trial of this run has 999 steps" in said) is not own
    assert rungs(ReportData(name="x")) == ""


def test_weights_are_what_lies_on_disk(tmp_path):
    for name, size in (("merged", 4_000_000), ("merged-nf4", 1_000_000), ("adapter", 70_000)):
        (tmp_path / "best" / name).mkdir(parents=True)
        (tmp_path / "best" / name / "model.safetensors").write_bytes(b"\0" * size)
    nf4 = {"model": {"quantisation": "nf4"}, "export": {"promote": "merged"}}
    found = weights_bytes(tmp_path, nf4)
    assert found == {"merged": 4_000_000, "merged-nf4": 1_000_000, "zero-shot": 1_000_000, "adapter": 1_070_000,
                     "served": 4_000_000}  # fmt: skip
    assert weights_bytes(tmp_path, {"model": {"quantisation": "none"}, "export": {}})["adapter"] == 4_070_000
    assert weights_bytes(tmp_path / "best", nf4) == {}


def test_trials_stand_over_their_memory_where_it_is_known(run_folder):
    from raycap.report.charts import figures

    data = report_data(load_run(run_folder))
    weighed = [{**t, "memory_bytes": (n + 1) * 2**30} for n, t in enumerate(data.trials)]
    data = dataclasses.replace(data, trials=[{**t, "memory_bytes": None} for t in data.trials])
    assert "trials-over-memory" not in figures(data)
    caption, svg = figures(dataclasses.replace(data, trials=weighed))["trials-over-memory"]
    assert caption == "Trials: CIDEr over memory" and svg.count('class="trial"') == 3  # t03 has no score
    page = render(dataclasses.replace(data, trials=weighed))
    assert caption in page and "2.00 GiB" in page and ">memory<" in page and ">memory<" not in render(data)


def test_the_terminal_calls_a_negative_drop_a_gain_too(run_folder):
    run = load_run(run_folder)
    assert "merged +0.77%, nf4 +3.85%" in text_summary(run)
    gain = dataclasses.replace(run, gate={**run.gate, "drop_merged": -0.0542})
    assert "merged -5.42% (a gain), nf4 +3.85%" in text_summary(gain)
