"""English and Japanese in one set, from files to a served model: a prompt for each, a final run on train and val."""

import json

import numpy as np
import pytest
from PIL import Image

from raycap.cli import main
from raycap.files import read_json, read_jsonl

COLOURS = {"red": ("赤い", (220, 40, 40)), "green": ("緑の", (40, 180, 60)), "blue": ("青い", (40, 60, 220))}
SETTINGS = [
    "data.prompt={en: a photo of, ja: 写真：}", "data.train_splits=train,val", "train.steps=12", "train.batch=8",
    "train.warmup_steps=2", "train.val_images=12", "evaluate.metrics=cider,bleu", "evaluate.resamples=200",
    "decode.max_new_tokens=10", "data.max_text_tokens=32",
]  # fmt: skip


def draw(folder):
    """48 pictures of a coloured disc, each told in English or in Japanese by turns: 24 train, 12 val, 12 test."""
    chance, lines = np.random.default_rng(0), []
    y, x = np.mgrid[:48, :48]
    (folder / "images").mkdir(parents=True)
    for number in range(48):
        english, (japanese, colour) = list(COLOURS.items())[number // 2 % 3]
        pixels = chance.integers(0, 60, (48, 48, 3)).astype(np.uint8)
        place, size = chance.integers(14, 34, 2), chance.integers(6, 13)
        pixels[(x - place[0]) ** 2 + (y - place[1]) ** 2 < size**2] = colour
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        ja = number % 2 == 1
        captions = (
            [f"{japanese}丸がある", f"丸は{japanese}色"] if ja else [f"a {english} disc", f"the disc is {english}"]
        )
        split = ("train", "train", "val", "test")[number // 2 % 4]
        lines.append({"image": f"{number}.png", "captions": captions, "split": split, "lang": "ja" if ja else "en"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_then_train_then_score_the_other_language(tmp_path, ray_session, capsys):
    draw(tmp_path / "set")
    shards, run = tmp_path / "shards", tmp_path / "run"
    prompts = SETTINGS[0]
    assert main(["prepare", str(tmp_path / "set"), "--out", str(shards), "--plain", "data.leaks=allow",
                 "model.path=builtin:tiny-git", prompts]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "builtin:tiny-git, en: 0 of 48 captions cut" in said and "builtin:tiny-git, ja: 0 of 48 captions cut" in said

    assert main(["train", "photos-git-tiny", f"data.source={shards}", f"run.dir={run}", "--plain", *SETTINGS]) == 0
    printed = capsys.readouterr()
    entry = read_json(run / "run.json")
    assert entry["status"] == "finished" and entry["data"]["languages"]["train"] == {"en": 12, "ja": 12}
    # Both splits are trained on, in both languages; one rung, and the last checkpoint is the one exported.
    tokens = entry["data"]["tokens"]
    assert tokens["train+val"]["captions"] == 72 and tokens["val"]["captions"] == 24
    assert tokens["val"]["captions_cut"] == 0 and tokens["val"]["limit"] == 32
    assert "train+val: 0 of 72 captions cut at 32 tokens" in printed.err
    assert "0 of 72 captions cut at 32 tokens" in (run / "report.html").read_text()
    (trial,) = read_json(run / "checkpoints" / "trials.json")["trials"]
    assert trial["best_step"] == trial["steps"] == 12 and len(trial["curve"]) == 1
    # English alone is scored.
    rows = read_jsonl(run / "predictions" / "test.served.jsonl")
    assert len(rows) == 6 and all(r["references"][0].startswith("a ") for r in rows)
    assert "rows left aside: {'ja': 12}" in printed.err

    # The same model speaks Japanese for the other half, under its own prompt.
    assert main(["evaluate", str(run), "evaluate.lang=ja", "evaluate.metrics=cider", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["images"] == 6 and "ja" in other["metrics"]["cider"]["signature"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_both_languages_is_pruned_and_scored_in_one(tmp_path, ray_session, capsys):
    """Its trials train on English and Japanese; rungs, gate and test are of evaluate.lang."""
    draw(tmp_path / "set")
    run, cache = tmp_path / "run", tmp_path / "cache"
    settings = [s for s in SETTINGS if not s.startswith(("data.train_splits", "train.steps"))]
    sweep = [
        f"data.source={tmp_path / 'set'}", "data.leaks=allow", f"run.dir={run}", f"run.cache_dir={cache}", "--plain",
        "train.steps=12", "tune.trials=2", "tune.slots=2", "tune.default_trial=false",
    ]  # fmt: skip
    assert main(["sweep", "photos-git-tiny", *sweep, *settings]) == 0
    printed = capsys.readouterr()
    assert "val and test are scored in en alone; rows left aside: {'ja': 12}" in printed.err
    entry = read_json(run / "run.json")
    assert entry["status"] == "finished"
    assert entry["data"]["languages"] == {split: {"en": 12, "ja": 12} if split == "train" else {"en": 6, "ja": 6}
                                          for split in ("train", "val", "test")}  # fmt: skip
    tokens = entry["data"]["tokens"]
    assert tokens["train"]["captions"] == 48 and tokens["train"]["captions_cut"] == 0  # both languages are trained on
    for split in ("val", "test"):
        for metric in entry["metrics"][split]["adapter"].values():
            assert "|lang:en|" in metric["signature"] and "|n:6|" in metric["signature"]
    trials = read_json(run / "checkpoints" / "trials.json")["trials"]
    assert len(trials) == 2 and all(trial["curve"] for trial in trials)
    # What was pruned by: captions of the six pictures with English captions.
    for name in ("val.adapter", "test.served"):
        rows = read_jsonl(run / "predictions" / f"{name}.jsonl")
        assert len(rows) == 6 and all("disc" in reference for row in rows for reference in row["references"])
