"""What a sweep says of its winner, and what it says of settings once other seeds were trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raycap.config import load_config
from raycap.files import write_json
from raycap.pipeline import confirm as module
from raycap.pipeline.confirm import compare_settings, confirm
from raycap.pipeline.verdicts import _sentence, separation, verdicts

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")
WORDS = [f"{colour} {thing}" for colour in ("red", "blue", "green", "black") for thing in ("car", "dog", "cat", "bus")]
IMAGES = [f"i{n:02d}" for n in range(48)]
REFERENCES = {i: [f"a {WORDS[n % 16]} in place {n}", f"one {WORDS[n % 16]} stands"] for n, i in enumerate(IMAGES)}


class Shards:
    folder = Path("shards")

    def references(self, split):
        return REFERENCES

    def groups(self, split):
        return {i: f"g{n // 2}" for n, i in enumerate(IMAGES)}


def said(right, seed=0):
    """Captions of which about `right` of all name the right thing."""
    rng = np.random.default_rng(seed)
    return {i: (REFERENCES[i][0] if rng.random() < right else "a picture of something") for i in IMAGES}


@pytest.fixture
def config():
    return load_config("shapes-git", ["tune.trials=3", "evaluate.resamples=500"])


def found(tmp_path, shares):
    trials, adapters = [], {}
    for trial_id, (right, seed) in shares.items():
        adapters[trial_id] = tmp_path / trial_id
        write_json(adapters[trial_id] / "val_captions.json", said(right, seed))
        trials.append(SimpleNamespace(trial_id=trial_id, score=lambda by, right=right: right))
    return SimpleNamespace(trials=trials, adapters=adapters, best=max(shares, key=lambda t: shares[t][0]))


def test_the_best_and_those_like_it(config, tmp_path):
    result = found(tmp_path, {"t00": (0.9, 1), "t01": (0.9, 2), "t02": (0.1, 3), "default": (0.3, 4)})
    told = separation(config, Shards(), result)
    assert set(told["together"]) == {"t00", "t01"} and told["best"] in told["together"] and told["images"] == 48


def test_winner_against_zero_shot_and_the_default(config, tmp_path):
    result = found(tmp_path, {"t00": (0.9, 1), "t01": (0.8, 2), "default": (0.3, 4)})
    rng = np.random.default_rng(0)
    scores = {
        "served": dict(zip(IMAGES, rng.normal(1.0, 0.2, 48))),
        "default": dict(zip(IMAGES, rng.normal(0.6, 0.2, 48))),
        "zero-shot": dict(zip(IMAGES, rng.normal(1.0, 0.2, 48))),
        "constant": dict(zip(IMAGES, rng.normal(0.1, 0.1, 48))),
    }
    told = verdicts(config, Shards(), {"test": scores, "val": {"adapter": {"a": 1.5}}}, result)
    assert told["trials"] == 3 and told["scores"]["val"] == 1.5
    assert told["default"]["p_holm"] == pytest.approx(2 * told["default"]["p"]) and "p_holm" not in told["constant"]
    text = told["sentence"]
    assert (
        "the adapter of t00, the best of 3 trials on validation," in text and "beats the preset's default trial" in text
    )
    assert "cannot be told apart from zero-shot" in text and "setting" not in text


def test_holm_can_take_a_verdict_back():
    told = {
        "trials": 5,
        "zero-shot": {"difference": 0.1, "low": 0.001, "high": 0.2, "p_holm": 0.06},
        "default": {"difference": 0.3, "low": 0.1, "high": 0.5, "p_holm": 0.01},
    }
    text = _sentence("t03", told)
    assert "cannot be told apart from zero-shot" in text and "beats the preset's default trial" in text


def test_settings_are_compared_over_seeds(config):
    captions = {
        "t00": [said(0.9, 1), said(0.88, 2), said(0.92, 3)],
        "t01": [said(0.2, 4), said(0.25, 5), said(0.2, 6)],
        "default": [said(0.9, 7), said(0.85, 8), said(0.9, 9)],
        "t02": [said(0.5, 9)],
    }
    told = compare_settings(config, Shards(), captions)
    assert told["settings"] == ["t00", "t01", "default"] and told["left_out"] == ["t02"]
    assert len(told["cider"]["t00"]) == 3 and "variant:D" in told["signature"]
    text = told["sentence"]
    assert text.startswith("Over 3 other seeds, on validation, the setting of t00 beats that of t01: CIDEr +")
    assert "cannot be told apart from that of default" in text


def test_confirming_trains_the_best_settings_with_other_seeds(config, tmp_path, monkeypatch):
    import raycap.tune.sweep

    calls = []

    def run_sweep(config, folder, shards_folder, resume=False, *, trials):
        calls.append((config, Path(folder), resume, trials))
        adapters = {}
        for trial in trials:
            adapters[trial.trial_id] = Path(folder) / trial.trial_id
            right = {"t01": 0.9, "t00": 0.3, "default": 0.1}[trial.trial_id]
            write_json(adapters[trial.trial_id] / "val_captions.json", said(right, trial.seed))
        return SimpleNamespace(adapters=adapters)

    monkeypatch.setattr(raycap.tune.sweep, "run_sweep", run_sweep)
    config = load_config(
        "shapes-git", ["tune.trials=3", "tune.confirm_seeds=3", "evaluate.resamples=500", "run.seed=7"]
    )
    told = confirm(config, tmp_path, Shards(), None, ["t01", "t00", "t02"])
    assert [c[0].run.seed for c in calls] == [1007, 2007, 3007]  # the sample order changes too
    for settings, folder, _, trials in calls:
        assert [t.trial_id for t in trials] == ["t01", "t00", "default"]
        assert {t.seed for t in trials} == {settings.run.seed} and settings.tune.scheduler == "none"
        assert folder.parent == tmp_path / module.FOLDER
    assert told["settings"] == ["t01", "t00", "default"] and told["verdicts"]["t00"]["low"] > 0
