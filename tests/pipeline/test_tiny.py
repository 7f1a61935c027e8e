"""`--tiny`: what stays of a preset and what is shrunk; and all five presets' whole way, shortened."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from raycap.config import load_config, parse_value
from raycap.data.drawn import KINDS, draw
from raycap.data.drawn.sets import SIZES, write_set
from raycap.errors import ConfigError
from raycap.files import read_json, read_jsonl
from raycap.pipeline.tiny import CONFIGURATIONS, tiny_plan

PRESETS = ("pokemon-git", "iu-xray-blip", "stair-qwen2vl", "flickr30k-clip-tinyllama", "risc-paligemma")
SHORT = ("train.steps=9", "tune.trials=2", "tune.slots=2", "evaluate.resamples=200")
SHRUNK = {
    "run": {"name"},
    "data": {"source", "images", "max_text_tokens", "splits", "clip_model"},
    "model": {"path", "min_pixels", "max_pixels", "vision_path"},
    "lora": {"layers"},
    "train": {"steps", "lr", "val_images", "warmup_steps"},
    "tune": {"trials", "slots", "grace_steps", "space"},
    "decode": {"max_new_tokens"},
    "evaluate": {"resamples", "clip"},
    "export": {"max_drop"},
}
"""All that --tiny may change."""


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_is_about_stays(preset):
    own, tiny = load_config(preset).to_dict(), tiny_plan(load_config(preset)).config.to_dict()
    for section, values in own.items():
        changed = {name for name, value in values.items() if tiny[section][name] != value}
        assert changed <= SHRUNK.get(section, set()), section
    assert set(tiny["tune"]["space"]) == set(own["tune"]["space"])
    for key, dimension in own["tune"]["space"].items():
        if key not in ("train.lr", "train.warmup_steps", "lora.layers"):
            assert tiny["tune"]["space"][key] == dimension, key


def test_settings_of_the_user_come_last():
    config = tiny_plan(load_config("iu-xray-blip"), ["train.steps=7", "train.lr=1e-4", "data.source=mine"]).config
    assert (config.train.steps, config.train.lr, config.data.source) == (7, 1e-4, "mine")
    assert not tiny_plan(load_config("iu-xray-blip"), ["model.path=mine"]).fitted
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        tiny_plan(load_config("iu-xray-blip"), ["train.stepz=7"])


def test_what_is_tiny_already_is_told_so():
    with pytest.raises(ConfigError, match=r"builtin:tiny-git is tiny as it is"):
        tiny_plan(load_config("shapes-git"))


@pytest.mark.parametrize(("lang", "stands_in"), [("en", "flickr30k"), ("ja", "stair")])
def test_a_preset_of_ones_own_gets_photographs(lang, stands_in, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"extends: flickr30k-clip-tinyllama\ndata: {{source: my-set, columns: {{image: x}}}}\nevaluate: {{lang: {lang}}}\n"
    )
    plan = tiny_plan(load_config(str(tmp_path / "mine.yaml"), ["model.family=generic", "lora.full="]))
    assert plan.set_name == stands_in and not plan.config.data.columns
    assert bool(plan.outside) == (lang == "ja")


def test_configuration_2_is_that_of_the_seeds_page():
    page = (Path(__file__).parents[2] / "docs" / "seeds.md").read_text(encoding="utf-8")
    command = re.search(r"^\| configuration 2: .*`(raycap train risc-paligemma [^`]+)`", page, re.MULTILINE)[1]
    said = dict(word.partition("=")[::2] for word in shlex.split(command)[3:])
    mine = CONFIGURATIONS["risc-paligemma"]["configuration-2"]
    assert set(said) == set(mine) | {"train.lr"}  # a twin's learning rate is its own, and so is its warm-up
    for key in ("lora.r", "lora.alpha", "lora.dropout"):
        assert parse_value(key, said[key]) == mine[key]


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    from raycap.cli import main

    monkeypatch.setenv("RAYCAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "risc-paligemma", "--tiny", "--dry-run"]) == 0
    assert "tiny-random-paligemma-RISCM" in capsys.readouterr().out
    assert main(["sweep", "risc-paligemma", "--tiny", "--resume"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_functions_of_their_number(kind):
    one, again, other = draw(kind, 0, 3), draw(kind, 0, 3), draw(kind, 0, 4)
    assert one.captions == again.captions and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()
    said = {draw(kind, 0, n).captions for n in range(40)}
    assert len(said) > 12
    if kind == "aerial":
        assert one.image.size == (224, 224) and len(one.captions) == 5
    if kind == "xray":
        assert one.image.mode == one.views[0].mode == "L" and len(one.captions) == 1
    if kind.endswith("-ja"):
        assert all(re.search("[぀-ヿ]", caption) for caption in one.captions)


LAYOUTS = dict(zip(PRESETS, ("parquet", "iu_xray", "coco", "karpathy", "risc")))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_set_is_read_by_its_own_source(preset, tmp_path):
    """In its published layout: all rows kept, splits of the wanted sizes, no copy of a picture and no leak."""
    from raycap.data.shards import open_shards, prepare
    from raycap.data.sources import detect

    plan = tiny_plan(load_config(preset, [f"run.cache_dir={tmp_path}"]), ["data.captions=all"])
    write_set(plan.set_name, plan.place)
    assert detect(plan.config.data.source) == LAYOUTS[preset]
    prepare(plan.config, tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")
    assert dict(shards.counts) == SIZES
    assert shards.languages == {split: {plan.config.evaluate.lang: n} for split, n in SIZES.items()}
    assert {r["reason"] for r in read_jsonl(tmp_path / "shards" / "rejected.jsonl")} <= {"beyond_limit"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_way(preset, ray_session, tmp_path, capsys):
    """prepare, sweep, gate, serve, report, verdict, and what the preset is for beyond them."""
    from raycap.cli import main

    run = tmp_path / preset
    code = main(["sweep", preset, "--tiny", "--json", *SHORT, *SHORTER.get(preset, ()), f"run.dir={run}"])
    said = capsys.readouterr().out
    assert code == 0, said
    told = json.loads(said)
    entry, gate = read_json(run / "run.json"), read_json(run / "gate.json")
    config = load_config(str(run / "config.yaml"))
    assert entry["status"] == told["status"] == "finished" and gate["passed"]
    assert entry["sentence"].startswith("Tiny random twin of ") and "the scores mean nothing" in told["sentence"]
    assert "the scores mean nothing" in (run / "report.html").read_text(encoding="utf-8")
    test = entry["metrics"]["test"]
    assert {"zero-shot", "constant", "adapter", "merged", "merged-nf4", "served"} <= set(test)
    assert all(test["served"][name] == test[config.export.promote][name] for name in test["served"])
    assert entry["served_equals_local"]["different"] == 0
    assert gate["adapter"] > 0 and (gate["merged_dequantised"] is None) == (config.model.quantisation == "none")
    rows = list(csv.DictReader((run / "trials.csv").open()))
    assert len(rows) == 2 and {r["state"] for r in rows} <= {"finished", "stopped"}
    assert (run / "best" / "merged-nf4" / "config.json").is_file()
    assert entry["verdicts"]["zero-shot"]["images"] == SIZES["test"]
    assert set(entry["features"]) == {"train", "val"} and all(
        f["kept_s"] and f["live_s"] for f in entry["features"].values()
    )
    assert read_json(run / "checkpoints" / "features.json") == entry["features"]
    assert "vision features" in (run / "report.html").read_text(encoding="utf-8")
    BEYOND.get(preset, lambda run, told: None)(run, told)


def outside_of_stair(run, told):
    inside, outside = told["outside"]["sets"]
    assert inside["images"] == SIZES["test"] and outside["images"] > 10
    assert Path(outside["source"]).name == "yj" and set(outside["metrics"]) == set(inside["metrics"]) >= {"cider"}
    said = [row["references"][0] for row in read_jsonl(next((run / "outside").rglob("*.1.test.jsonl")))]
    assert len(said) == outside["images"] and all(text.endswith("。") for text in said)


def twelve_runs(run, told):
    rows = told["grid"]["rows"]
    assert len(rows) == 12
    assert {r["model"] for r in rows} == {"configuration-1", "configuration-2"}
    assert {(r["prompt"], r["decode"]) for r in rows} == {(p, d) for p in "ABC" for d in ("greedy", "beam-sample")}
    table = list(csv.DictReader((run / "grid" / "test" / "grid.csv").open(encoding="utf-8")))
    assert len(table) == 12 and all(float(row["cider"]) >= 0 and row["clip_cosine"] for row in table)
    assert {
        read_json(run / "configurations" / c / "manifest.json")["onto"] for c in CONFIGURATIONS["risc-paligemma"]
    } == {"dequantised"}


SHORTER = {"risc-paligemma": ("evaluate.metrics=bleu,rouge_l,cider,clipscore",)}
"""METEOR's Java takes seconds for each of the twelve runs; the metric has tests of its own."""
BEYOND = {"stair-qwen2vl": outside_of_stair, "risc-paligemma": twelve_runs}
