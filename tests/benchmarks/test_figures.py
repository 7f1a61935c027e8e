"""What the benchmark's figures mean, on numbers small enough to check by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import sweep_vs_trainer  # noqa: E402
from benchmarks.peers import figures  # noqa: E402
from raycap.tune.schedule import rungs  # noqa: E402


def test_a_peers_lane_seconds_sum_to_its_lanes_times_the_wall():
    trials = [
        {"began": 110.0, "ended": 140.0, "train_s": 20.0, "vision_s": 4.0, "eval_s": 5.0},
        {"began": 112.0, "ended": 130.0, "train_s": 10.0, "vision_s": 2.0, "eval_s": 3.0},
    ]
    spent = figures.peer_seconds(trials, lanes=2, began=100.0, wall_s=50.0)
    assert spent["vision"] == 6 and spent["forward_backward"] == 24 and spent["evaluation"] == 8
    assert spent["start_up"] == 2 * 10 + 5 + 5  # both lanes until the first trial, then imports and loading
    assert sum(spent.values()) == pytest.approx(100)
    assert sum(figures.shares(spent).values()) == pytest.approx(1, abs=1e-3)


def test_a_trial_that_died_before_training_is_start_up():
    spent = figures.peer_seconds([{"began": 1.0, "ended": 3.0}], lanes=1, began=0.0, wall_s=4.0)
    assert spent["start_up"] == 3 and spent["idle"] == 1


def test_a_packs_lane_seconds_sum_to_the_wall():
    pack = {"first_step": 110.5, "vision_before": 0.5, "vision": 1.0, "step": 20.0, "evaluate": 4.0}
    spent = figures.pack_seconds([pack], began=100.0, wall_s=40.0)
    assert spent == {"start_up": 10, "vision": 1, "forward_backward": 20, "evaluation": 4, "idle": 5}


def test_ratio_is_halving_times_what_is_left():
    peer, ours = {"seconds": 600.0, "steps": 12_000}, {"seconds": 60.0, "steps": 4_000}
    found = figures.ratios(peer, ours, "trainer")
    assert found["total"] == 10 and found["halving"] == 3
    assert found["without_halving"] == pytest.approx(10 / 3)
    assert found["floor"] == 8 and found["floor_met"]
    assert not figures.ratios({**peer, "seconds": 400.0}, ours, "trainer")["floor_met"]


def test_the_median_round_is_reported_whole():
    rounds = [{"seconds": s, "best": {"cider": c}, "steps": 1} for s, c in ((30.0, 0.3), (10.0, 0.1), (20.0, 0.2))]
    found = figures.median_side(rounds)
    assert found["seconds"] == 20 and found["best"] == {"cider": 0.2}
    assert found["seconds_by_round"] == [30, 10, 20]


def test_non_inferiority_can_fail_and_says_whether_the_images_suffice():
    objects = [f"a {c} {t}" for c in ("red", "blue", "green", "black") for t in ("dog", "cat", "car", "tree", "boat")]
    references = {f"i{n}": [text, text + " here"] for n, text in enumerate(objects * 6)}
    good = {image: texts[0] for image, texts in references.items()}
    bad = {image: ("a dog" if n % 2 else text) for n, (image, text) in enumerate(good.items())}
    same = figures.non_inferior(good, good, references, None, resamples=500, seed=0)
    worse = figures.non_inferior(bad, good, references, None, resamples=500, seed=0)
    better = figures.non_inferior(good, bad, references, None, resamples=500, seed=0)
    assert same["non_inferior"] and same["difference"] == 0 and same["can_fail"]
    assert not worse["non_inferior"] and worse["difference"] < 0
    assert better["non_inferior"] and better["difference"] == pytest.approx(-worse["difference"])
    assert better["images"] == len(references)


def test_an_unknown_side_and_no_rounds_are_refused(capsys):
    for arguments, said in ((["--sides", "traner"], "traner"), (["--rounds", "0"], "--rounds")):
        with pytest.raises(SystemExit) as stop:
            sweep_vs_trainer.parse(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_quick_runs_all_sides_and_prints_nothing_but_json(tmp_path):
    """The whole benchmark at a size that only says that it works."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/sweep_vs_trainer.py"), "--quick", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert set(report["sides"]) == {"trainer", "asha", "raycap"}
    for name, side in report["sides"].items():
        assert sum(side["shares"].values()) == pytest.approx(1, abs=0.01), name
        assert min(side["shares"].values()) >= -0.01, name
        assert side["best"]["cider"] >= 0 and side["seconds"] > 0 and side["cpu_seconds"] > 0
    assert report["sides"]["trainer"]["steps"] == report["trials"] * report["steps"]
    # Ray's ASHA lets the first trial at a rung pass and judges each other by those before it, so with trials this few it
    # may stop none. Each that it stops it stops at a rung.
    stops = set(rungs(report["steps"], 0, 3))
    assert {t["steps"] for t in report["sides"]["asha"]["trials"]} <= stops
    assert {t["steps"] for t in report["sides"]["raycap"]["trials"]} <= stops
    assert report["sides"]["raycap"]["steps"] < report["sides"]["trainer"]["steps"], (
        "a cohort is halved whatever its order"
    )
    for split in ("val", "test"):
        assert set(report[split]) == {"trainer", "asha"}
    # The same trial on the same samples: the loss at the full budget agrees as far as bf16 and dropout let it.
    last = {s: {t["trial_id"]: t for t in report["sides"][s]["trials"]} for s in ("trainer", "raycap")}
    full = [t for t, trial in last["raycap"].items() if trial["steps"] == report["steps"]]
    assert full
    for trial in full:
        assert last["raycap"][trial]["loss"] == pytest.approx(last["trainer"][trial]["loss"], rel=0.05)
