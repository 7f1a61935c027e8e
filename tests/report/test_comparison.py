from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil

import pytest

from raycap.cli import main
from raycap.cli.compare import compare
from raycap.errors import RunError
from raycap.files import write_json, write_jsonl
from raycap.report.comparison import labels, write_comparison
from raycap.report.runs import load_run

WORDS = ["red", "green", "blue", "small", "large", "round", "square", "spotted", "striped", "plain"]


def spoil(folder, *, lr=None, share=0.0, signature=None, name="second"):
    """A copy of a run, with other captions for a share of its pictures."""
    other = folder.parent / name
    shutil.copytree(folder, other)
    entry = json.loads((other / "run.json").read_text())
    for scores in entry["metrics"]["test"].values():
        if signature:
            scores["cider"]["signature"] = signature
    write_json(other / "run.json", {**entry, "seconds": 77.0, "command": f"raycap sweep {name}"})
    if lr:
        config = (other / "config.yaml").read_text()
        (other / "config.yaml").write_text(re.sub(r"\n  lr: \S+", f"\n  lr: {lr}", config))
    rows = [json.loads(line) for line in (other / "predictions" / "test.served.jsonl").read_text().splitlines()]
    cut = int(share * len(rows))
    write_jsonl(other / "predictions" / "test.served.jsonl",
                [{**r, "caption": "nothing like it"} if n < cut else r for n, r in enumerate(rows)])  # fmt: skip
    return other


@pytest.fixture
def first(run_folder):
    """The made-up run with sixty pictures that have captions of their own."""
    entry = json.loads((run_folder / "run.json").read_text())
    for scores in entry["metrics"]["test"].values():
        scores["cider"]["signature"] = "cider|variant:D|tok:ptb|v:0.1.0"
    write_json(run_folder / "run.json", entry)
    said = [f"a {a} {b} thing number {n} <b>" for n, (a, b) in
            enumerate((a, b) for a in WORDS for b in WORDS if a != b)][:60]  # fmt: skip
    rows = [
        {"image_id": f"p{n:02d}", "caption": text, "references": [text, f"{text} again"]} for n, text in enumerate(said)
    ]
    write_jsonl(run_folder / "predictions" / "test.served.jsonl", rows)
    return run_folder


def compared(*folders, out=None, **more):
    runs = [load_run(f) for f in folders]
    found = compare(runs, "test", None, 500, 0, **more)
    return found, write_comparison(out, runs, found, "raycap compare").read_text() if out else ""


def test_the_report_says_what_compare_found(first, tmp_path):
    other = spoil(first, lr="5e-4", share=0.5)
    found, page = compared(first, other, out=tmp_path / "out")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    row = found["runs"][1]
    assert row["verdict"] == "worse" and f"{row['difference']:+.3f}" in text and f"{row['score']:.4f}" in text
    assert f"[{row['low']:.3f}, {row['high']:.3f}]" in text
    assert (
        "run against second" in text
        and "second is worse" in text
        and str(first) not in text.rsplit("How to reproduce", 1)[0]
    )
    assert "train.lr" in text and "5e-4" in text.replace("0.0005", "5e-4")
    assert "train.batch" not in text  # the same in both
    assert "1 min 17 s" in text and "raycap sweep second" in text and found["signature"] in text
    assert not re.search(r"https?:|<link|@import", page) and "thing number 3 <b>" not in page
    assert page.count("<svg") >= 3


def test_figures_lie_beside_the_report_as_svg_and_png(first, tmp_path):
    other = spoil(first, share=0.5)
    compared(first, other, out=tmp_path / "out")
    plots = {p.name for p in (tmp_path / "out" / "plots").iterdir()}
    assert {"differences.svg", "differences.png", "winners-by-step.svg", "winners-by-step.png"} <= plots
    from PIL import Image

    with Image.open(tmp_path / "out" / "plots" / "differences.png") as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 5
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    own = load_run(first).metrics
    assert len(rows) == 2 * sum(len(scores) for of in own.values() for scores in of.values())
    assert {r["run"] for r in rows} == {"run", "second"}
    told = [r["score"] for r in rows if (r["run"], r["variant"], r["metric"]) == ("run", "served", "cider")]
    assert told == [repr(own["test"]["served"]["cider"]["score"])]


def test_scores_of_another_scale_do_not_stand_side_by_side(first, tmp_path):
    other = spoil(first, signature="cider|variant:D|tok:char|v:0.1.0")
    found, page = compared(first, other, out=tmp_path / "out")
    assert page.count(">other scale<") == 2  # its zero-shot and its served captions
    assert any("not on the scale" in w for w in found["warnings"])
    assert "other scale" not in compared(first, first, out=tmp_path / "same")[1]


def test_pictures_are_those_where_the_runs_differ_most(first, tmp_path):
    from raycap.config import load_config
    from raycap.data.parquet import open_shards
    from raycap.data.shards import prepare

    folder = tmp_path / "shards"
    prepare(load_config("shapes-git", ["data.limit=60", "data.source=shapes"]), folder)
    references = open_shards(folder).references("test")
    ids = list(references)
    other = spoil(first)
    for run, wrong in ((first, ids[0]), (other, ids[1])):
        rows = [{"image_id": i, "caption": "nothing like it" if i == wrong else references[i][0], "references": references[i]}
                for i in ids]  # fmt: skip
        write_jsonl(run / "predictions" / "test.served.jsonl", rows)
        entry = json.loads((run / "run.json").read_text())
        write_json(run / "run.json", {**entry, "data": {"folder": str(folder)}})
    _, page = compared(first, other, out=tmp_path / "out")
    best, rest = page.split("where second gains most over run")[1].split("where half of the pictures gain more")
    assert ids[0] in best and ids[1] in rest.split("where second loses most against run")[1]
    assert "data:image/png;base64," in best and "nothing like it" in best


def test_many_runs_have_names_that_tell_them_apart(first, tmp_path):
    others = [spoil(first, share=n / 10, name=f"run-{n}") for n in range(1, 7)]
    _, page = compared(first, *others, out=tmp_path / "out")
    assert "7 runs" in page and "And 3 more runs." in page and "run-6" in page
    runs = [dataclasses.replace(load_run(first), folder=tmp_path / n / "run") for n in "ab"]
    assert labels(runs) == ["a/run", "b/run"]
    assert labels([runs[0], runs[0]]) == ["run (1)", "run (2)"]


def test_a_runs_own_report_is_not_overwritten(first):
    with pytest.raises(RunError, match="holds a run"):
        compared(first, first, out=first)


def test_the_verb_writes_it(first, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(first), str(first), "--resamples", "500", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == (out / "report.html").as_posix()
    assert json.loads((out / "comparison.json").read_text())["command"].startswith("raycap compare")
