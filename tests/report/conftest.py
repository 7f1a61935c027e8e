"""A made-up run: what a sweep of four trials would leave, written by the ledger itself."""

from __future__ import annotations

import io

import pytest

from raycap.config import load_config
from raycap.report.ledger import Ledger
from raycap.report.pictures import Picture, write_pictures

GATE = {
    "split": "val", "metric": "cider", "adapter": 1.3, "merged": 1.28, "merged_dequantised": 1.29, "merged_nf4": 1.25,
    "drop_merged": 0.0077, "drop_nf4": 0.0385, "max_drop": 0.05, "passed": True,
}  # fmt: skip


def made_up_trials():
    settings = [("t00", 4, 8.0, 1e-3, "finished"), ("t01", 8, 16.0, 2.15e-3, "finished"),
                ("t02", 16, 16.0, 1e-4, "stopped"), ("t03", 2, 2.0, 2e-2, "diverged")]  # fmt: skip
    trials = []
    for n, (trial_id, rank, alpha, lr, state) in enumerate(settings):
        rungs = {"finished": [10, 30, 90], "stopped": [10], "diverged": []}[state]
        curve = [
            {
                "step": s,
                "loss": 2.5 - 0.01 * s,
                "val_loss": 2.6 - 0.01 * s,
                "cider": 0.01 * s + 0.1 * n,
                "cider_se": 0.05,
            }
            for s in rungs
        ]
        last = curve[-1] if curve else {}
        trials.append({
            "trial_id": trial_id, "state": state, "rank": rank, "alpha": alpha, "scale": alpha / rank, "lr": lr,
            "dropout": 0.1 * (n % 2), "targets": ["query", "value"], "steps": rungs[-1] if rungs else 7,
            "rung": rungs[-1] if rungs else 0, "best_step": rungs[-1] if rungs else 0,
            "loss": last.get("loss", float("nan")), "val_loss": last.get("val_loss"), "cider": last.get("cider"),
            "cider_se": last.get("cider_se"), "seconds": 3.5 + n, "memory_bytes": (n + 1) * 10**9, "curve": curve,
            "reason": "" if state == "finished" else f"reason of {trial_id}",
            "collapse": {"collapsed": trial_id == "t02", "distinct_share": 0.86,
                         "reasons": ["47% repeat themselves", "3.5 times the references' length"]
                         if trial_id == "t02" else []},
        })  # fmt: skip
    return trials


def png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def trials():
    return made_up_trials()


@pytest.fixture
def config(tmp_path):
    return load_config("shapes-git", [f"run.dir={tmp_path / 'run'}", "train.steps=90"])


@pytest.fixture
def run_folder(config, trials):
    """A finished run with every file that a report is drawn from."""
    from raycap.files import write_json

    with Ledger.create(config, command="raycap sweep shapes-git train.steps=90") as ledger:
        with ledger.phase("prepare"):
            pass
        with ledger.phase("sweep"):
            pass
        ledger.write_trials(trials)
        references = {"a": ["a <b>red</b> square", "赤い四角形"], "b": ["a blue circle"]}
        for variant, n in (("constant", 0.1234), ("zero-shot", 0.4567), ("adapter", 1.2345), ("served", 1.3579)):
            ledger.write_predictions("test", variant, {"a": f"{variant} of a", "b": ""}, references)
            scores = {
                "cider": {"score": n, "signature": f"cider|{variant}"},
                "bleu4": {"score": n / 2, "signature": "b"},
            }
            ledger.add_metrics("test", variant, scores)
        write_json(ledger.folder / "gate.json", GATE)
        write_pictures(ledger.folder, [
            Picture(image_id="a", image=png(), references=references["a"],
                    captions={"zero-shot": "a & b", "adapter": "赤い円 <script>", "served": "赤い円 <script>", "worst-trial": ""},
                    kind="best", scores={"served": 1.234, "adapter": 1.234}),
        ])  # fmt: skip
        verdict = {"difference": 0.9012, "low": 0.8, "high": 1.0, "p": 0.0001, "sentence": "B is better"}
        verdicts = {"metric": "cider", "split": "test", "winner": "served", "zero-shot": verdict,
                    "runner-up": {**verdict, "trial": "t00", "split": "val", "low": -0.1}}  # fmt: skip
        ledger.finish(
            best_trial="t01", data_sha256="d" * 64, base_sha256="e" * 64, peak_memory_bytes=3 * 2**30, verdicts=verdicts
        )
    return ledger.folder
