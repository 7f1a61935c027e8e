"""What follows a run, on a real one: its settings with other seeds, `evaluate` in all its ways, `compare`. No stand-ins."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycoco import cider

from raycap.cli import main
from raycap.files import read_json, read_jsonl, write_jsonl

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies"),
]  # fmt: skip
MINI = Path(__file__).resolve().parents[1] / "fixtures" / "mini"


def asked(capsys, *arguments) -> dict:
    """What a verb answers with --json."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def scores(metrics: dict) -> dict[str, float]:
    return {name: found["score"] for name, found in metrics.items()}


def test_settings_are_confirmed_by_other_seeds(run):
    entry = read_json(run / "run.json")
    told = entry["settings"]
    trials = {row["trial_id"] for row in csv.DictReader((run / "trials.csv").open())}
    assert set(told["settings"]) <= trials and len(told["settings"]) >= 2 and not told["left_out"]
    assert entry["best_trial"] == told["settings"][0]
    seeds = sorted((run / "confirm").glob("*-seed-*"))
    assert len(seeds) == 2 and told["images"] == 24
    plans = [{t["trial_id"]: t for t in read_json(s / "checkpoints" / "plan.json")["trials"]} for s in seeds]
    for trial in told["settings"]:
        found = [read_json(s / "checkpoints" / "adapters" / trial / "val_captions.json") for s in seeds]
        adapters = [s / "checkpoints" / "adapters" / trial / "adapter_model.safetensors" for s in (run, *seeds)]
        assert len({a.read_bytes() for a in adapters}) == 3, "each seed trains an adapter of its own"
        assert len({p[trial]["seed"] for p in plans}) == 2 and len({p[trial]["lr"] for p in plans}) == 1
        references = {r["image_id"]: r["references"] for r in read_jsonl(run / "predictions" / "val.adapter.jsonl")}
        for said, score in zip(found, told["cider"][trial]):
            rows = [{"image_id": i, "caption": c, "references": references[i]} for i, c in said.items()]
            assert score == pytest.approx(cider(rows)[0], abs=1e-6)
    for other, verdict in told["verdicts"].items():
        means = [float(np.mean(told["cider"][t])) for t in (told["settings"][0], other)]
        assert verdict["difference"] == pytest.approx(means[0] - means[1], abs=1e-9)
        assert verdict["low"] <= verdict["difference"] <= verdict["high"] and verdict["p"] <= verdict["p_holm"] <= 1
    assert (
        entry["sentence"].endswith(told["sentence"])
        and "Over 2 other seeds, on validation, the setting of" in told["sentence"]
    )


def test_evaluate_scores_what_the_run_scored_and_a_set_out_of_domain(run, tmp_path, capsys):
    """The same captions through the same endpoint: the run's own figures again, for its winner and the base."""
    entry = read_json(run / "run.json")
    found = asked(
        capsys, "evaluate", run, "--split", "test", "--also", MINI, "--zero-shot", "--out", tmp_path / "scored", "--plain",
        "evaluate.metrics=bleu,rouge_l,cider",
    )  # fmt: skip
    rows = {(r["model"], r["source"]): r for r in found["sets"]}
    assert list(rows) == [(m, s) for m in ("zero-shot", "small/merged") for s in ("shapes", str(MINI))]
    wanted = scores(entry["metrics"]["test"]["served"])
    for row in (found, rows["small/merged", "shapes"]):
        assert row["images"] == 60
        assert scores(row["metrics"]) == {n: pytest.approx(wanted[n], abs=1e-9) for n in scores(row["metrics"])}
        for name, metric in row["metrics"].items():
            assert metric["signature"] == entry["metrics"]["test"]["served"][name]["signature"]
    assert rows["small/merged", str(MINI)]["images"] == rows["zero-shot", str(MINI)]["images"] < 10
    for row in rows.values():
        assert (
            row["parameters"] > 1e6 and row["peak_memory_bytes"] > 1e8 and set(row["metrics"]) == set(found["metrics"])
        )
    # Its captions are files that `score` takes, and come to the same.
    predictions = read_jsonl(found["predictions"])
    assert predictions == read_jsonl(run / "predictions" / "test.served.jsonl")
    again = asked(capsys, "score", found["predictions"], found["predictions"], "--metrics", "bleu,rouge_l,cider")
    assert scores(again["metrics"]) == pytest.approx(scores(found["metrics"]), abs=1e-9)
    assert read_json(tmp_path / "scored" / "metrics.json")["metrics"] == found["metrics"]


def test_a_person_reviews_what_was_flagged_and_the_rest_is_scored(run, tmp_path, capsys):
    """Captions of two tokens are far too short, so all are flagged; a person keeps every third one."""
    ask = ("evaluate", run, "--split", "test", "--plain", "decode.max_new_tokens=2")
    found = asked(capsys, *ask, "--out", tmp_path / "scored", "evaluate.metrics=cider,perplexity")
    flagged = read_jsonl(found["flagged"])
    assert len(flagged) > 30 and all(r["exclude"] is True and r["reasons"] for r in flagged)
    perplexity = found["metrics"]["perplexity"]
    assert 1 < perplexity["score"] < math.inf and perplexity["signature"].startswith("perplexity|")
    reviewed = [{**row, "exclude": n % 3 > 0} for n, row in enumerate(flagged)]
    out = {row["image_id"] for row in reviewed if row["exclude"]}
    write_jsonl(tmp_path / "reviewed.jsonl", reviewed)
    again = asked(capsys, *ask, "--exclude", tmp_path / "reviewed.jsonl", "evaluate.metrics=cider")
    assert again["images"] == 60 - len(out) and again["excluded"]["images"] == len(out)
    assert again["excluded"]["whole"]["metrics"]["cider"] == found["metrics"]["cider"]
    each = cider(read_jsonl(found["predictions"]))[1]  # one scale: document frequencies of all images
    kept = [score for image, score in each.items() if image not in out]
    assert again["metrics"]["cider"]["score"] == pytest.approx(np.mean(kept), abs=1e-6)
    signatures = [m["cider"]["signature"].split("|df:")[1].split("|")[0] for m in (again["metrics"], found["metrics"])]
    assert signatures[0] == signatures[1]


def test_a_grid_of_prompts_and_decodings(run, capsys):
    axes = ("--grid", "prompts=none,there", "decode=greedy,beam", "evaluate.prompts={there: there is a}")
    found = asked(capsys, "evaluate", run, "--split", "val", "--plain", "evaluate.metrics=cider", *axes)
    assert found["images"] == 60
    rows = {(r["prompt"], r["decode"]): r for r in found["rows"]}
    assert list(rows) == [(p, d) for p in ("none", "there") for d in ("greedy", "beam")]
    captions = {cell: read_jsonl(row["captions"]) for cell, row in rows.items()}
    for cell, row in rows.items():
        assert row["metrics"]["cider"]["score"] == pytest.approx(cider(captions[cell])[0], abs=1e-6)
    assert len({tuple(r["caption"] for r in said) for said in captions.values()}) == 4
    assert "num_beams:4" in rows["none", "beam"]["decoding"] and "there is a" in rows["there", "greedy"]["decoding"]
    # Without prompt and greedily: what the merged model says everywhere else.
    entry = read_json(run / "run.json")
    merged = entry["metrics"]["val"].get("merged") or entry["metrics"]["val"]["adapter"]
    assert rows["none", "greedy"]["metrics"]["cider"]["score"] == pytest.approx(merged["cider"]["score"], abs=0.05)
    table = list(csv.DictReader((run / "grid" / "val" / "grid.csv").open()))
    assert [float(r["cider"]) for r in table] == [r["metrics"]["cider"]["score"] for r in found["rows"]]
    assert (run / "grid" / "val" / "plots" / "grid-cider.svg").is_file()


def test_three_runs_are_compared_with_holm(run, other, tmp_path, capsys):
    """Two runs, and the first once more: it cannot be told apart from itself, whatever the other is."""
    from raycap.evaluate.comparisons import holm

    options = ("--resamples", 500)
    found = asked(capsys, "compare", run, other, run, *options)
    assert (found["images"], found["variant"], found["metric"]) == (60, "served", "cider")
    first, second, third = found["runs"]
    for row, folder in ((first, run), (second, other), (third, run)):
        entry = read_json(folder / "run.json")
        assert row["run"].startswith(str(folder))
        assert row["cider"] == pytest.approx(entry["metrics"]["test"]["served"]["cider"]["score"], abs=1e-6)
    each = [cider(read_jsonl(f / "predictions" / "test.served.jsonl"))[1] for f in (run, other)]
    assert second["difference"] == pytest.approx(np.mean([each[1][i] - each[0][i] for i in each[0]]), abs=1e-6)
    assert second["low"] <= second["difference"] <= second["high"]
    assert third["difference"] == 0 and third["p"] == 1 and third["verdict"] == "cannot be told apart at this size"
    assert [second["p_holm"], third["p_holm"]] == holm([second["p"], third["p"]])
    assert not any("document frequencies" in w or "different data" in w for w in found["warnings"])
    for metric in ("bleu4", "meteor"):
        wanted = read_json(run / "run.json")["metrics"]["test"]["served"][metric]["score"]
        told = asked(capsys, "compare", run, other, "--metric", metric, *options)["runs"]
        assert told[0]["score"] == pytest.approx(wanted, abs=1e-6) and told[1]["sentence"]
    assert main(["compare", str(run), str(other), "--resamples", "500"]) == 0
    said = capsys.readouterr().out
    assert second["sentence"].split(":")[-1].split(";")[0] in said and "Holm" in said and "signature: cider|" in said
