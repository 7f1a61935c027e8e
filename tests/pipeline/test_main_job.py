"""The main job, small: what it leaves is what the contract says, loads in plain libraries, and scores the same again."""

from __future__ import annotations

import csv
import json

import pytest
from pycoco import tokenised

from raycap.config import load_config
from raycap.errors import GateError
from raycap.files import read_json, read_jsonl


@pytest.mark.ray
@pytest.mark.slow
def test_the_run_folder_keeps_its_contract(run):
    entry = read_json(run / "run.json")
    for key in ("name", "status", "command", "seed", "seconds", "peak_memory_bytes", "versions", "commit", "data_sha256",
                "base_sha256", "best_trial", "metrics"):  # fmt: skip
        assert key in entry, key
    assert entry["status"] == "finished" and entry["command"] == "raycap sweep small" and entry["peak_memory_bytes"] > 0
    variants = {"zero-shot", "adapter", "merged", "merged-nf4", "served", "constant"}
    if entry["best_trial"] != "default":
        variants.add("default")
    assert set(entry["metrics"]["test"]) == variants
    for variant in variants:
        found = entry["metrics"]["test"][variant]
        assert set(found) == {"bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider"}
        assert all(set(s) == {"score", "signature"} and s["signature"] for s in found.values())
    rows = list(csv.DictReader((run / "trials.csv").open()))
    assert list(rows[0]) == [
        "trial_id",
        "state",
        "rank",
        "alpha",
        "scale",
        "lr",
        "dropout",
        "targets",
        "steps",
        "rung",
        "val_loss",
        "cider",
        "cider_se",
        "seconds",
        "reason",
    ]
    assert len(rows) == 5 and rows[0]["trial_id"] == "default" and rows[0]["steps"] == "18"
    assert all(float(r["scale"]) == float(r["alpha"]) / int(r["rank"]) for r in rows)
    assert {r["state"] for r in rows} <= {"finished", "stopped", "diverged"} and "stopped" in {r["state"] for r in rows}
    gate = read_json(run / "gate.json")
    assert set(gate) == {"split", "metric", "adapter", "merged", "merged_dequantised", "merged_nf4", "drop_merged",
                         "drop_nf4", "max_drop", "passed"}  # fmt: skip
    for name in ("config.yaml", "metrics.csv", "report.html", "best/adapter/adapter_config.json", "best/merged/README.md",
                 "best/merged-nf4/config.json", "logs/pack-0.log"):  # fmt: skip
        assert (run / name).is_file(), name
    assert "pid" in (run / "logs" / "pack-0.log").read_text()
    told = entry["verdicts"]
    assert told["trials"] == 5 and told["zero-shot"]["p_holm"] >= told["zero-shot"]["p"]
    assert entry["best_trial"] in told["separation"]["p"] and set(told["scores"]) == {"val", "test"}
    assert entry["sentence"] and entry["sentence"] in (run / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.ray
@pytest.mark.slow
def test_predictions_score_the_same_in_pycocoevalcap(run):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    entry = read_json(run / "run.json")
    rows = read_jsonl(run / "predictions" / "test.served.jsonl")
    assert len(rows) == 60 and all(set(r) == {"image_id", "caption", "references"} for r in rows)
    references, said = tokenised(rows)
    scores = entry["metrics"]["test"]["served"]
    assert scores["cider"]["score"] == pytest.approx(Cider().compute_score(references, said)[0], abs=1e-6)
    assert scores["rouge_l"]["score"] == pytest.approx(Rouge().compute_score(references, said)[0], abs=1e-6)
    for n, value in enumerate(Bleu(4).compute_score(references, said, verbose=0)[0], start=1):
        assert scores[f"bleu{n}"]["score"] == pytest.approx(value, abs=1e-6)


@pytest.mark.ray
@pytest.mark.slow
def test_served_captions_are_the_local_ones(run):
    entry = read_json(run / "run.json")
    assert entry["served_equals_local"]["different"] == 0
    assert read_jsonl(run / "predictions" / "test.served.jsonl") == read_jsonl(
        run / "predictions" / "test.merged.jsonl"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_adapter_and_merged_models_load_in_plain_libraries(run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoProcessor

    from raycap.models import resolve_path

    base = resolve_path("builtin:tiny-git")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "best" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "best" / "merged", dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(run / "best" / "merged-nf4")
    processor = AutoProcessor.from_pretrained(run / "best" / "merged")
    assert (
        processor.tokenizer.decode(processor.tokenizer("a red dog")["input_ids"], skip_special_tokens=True)
        == "a red dog"
    )
    inputs = {
        "input_ids": torch.tensor([[1]]),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        adapter_logits, merged_logits = adapted(**inputs).logits, merged(**inputs).logits
        assert torch.isfinite(packed(**inputs).logits).all()
    manifest = read_json(run / "best" / "merged" / "manifest.json")
    if manifest["onto"] == "original":  # else the sum is with the dequantised weights, and another model
        assert torch.allclose(adapter_logits, merged_logits, atol=0.05)


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_never_overwritten(run, run_settings):
    from raycap.cli import main

    before = (run / "run.json").read_bytes()
    assert main(["sweep", "shapes-git", *run_settings, f"run.dir={run}", "--plain"]) == 1
    assert main(["sweep", "--resume", str(run), "--plain"]) == 0
    assert (run / "run.json").read_bytes() == before


def test_a_refused_gate_serves_nothing_and_says_why(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from raycap.pipeline import main_job

    served = []
    config = load_config("shapes-git", [f"run.dir={tmp_path / 'run'}", "evaluate.metrics=cider"])
    shards = SimpleNamespace(folder=tmp_path, counts={"test": 1}, content_sha256="0")
    monkeypatch.setattr(main_job._Run, "_prepare", lambda self: shards)
    monkeypatch.setattr(main_job._Run, "_sweep", lambda self, ray, s, resume: None)
    monkeypatch.setattr(
        main_job._Run, "_export", lambda self, ray, s, f: {"refused": "merged fell by 40 %", "captions": {}}
    )
    monkeypatch.setattr(main_job._Run, "_score", lambda self, s, c, f: None)
    monkeypatch.setattr(main_job._Run, "_serve", lambda *a: served.append(a))
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}, nodes=lambda: [{"Alive": True}])
    monkeypatch.setattr(main_job, "connect", lambda config, **options: __import__("contextlib").nullcontext(ray))
    with pytest.raises(GateError, match="40 %") as error:
        main_job.sweep(config, plain=True)
    assert error.value.exit_code == 1 and not served
    entry = json.loads((tmp_path / "run" / "run.json").read_text())
    assert entry["status"] == "failed" and (tmp_path / "run" / "report.html").is_file()


def test_a_space_that_cannot_be_sampled_leaves_no_folder(tmp_path):
    from raycap.errors import ConfigError
    from raycap.pipeline import sweep

    with pytest.raises(ConfigError, match=r"train\.lr"):
        sweep(
            load_config("shapes-git", [f"run.dir={tmp_path / 'run'}", "tune.space={train.lr: {loguniform: [1, 0]}}"]),
            plain=True,
        )
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_none_is_named(tmp_path):
    from raycap.errors import DataError
    from raycap.pipeline import caption

    bad = tmp_path / "holiday.jpg"
    bad.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        caption(load_config("shapes-git"), tmp_path, [bad])


def test_sentences_say_what_the_intervals_say():
    from raycap.pipeline.verdicts import _sentence

    def verdict(low, high):
        return {"difference": (low + high) / 2, "low": low, "high": high}

    told = {
        "zero-shot": verdict(0.1, 0.3),
        "constant": verdict(-0.1, 0.1),
        "runner-up": {"trial": "t07", **verdict(-0.3, -0.1)},
    }
    text = _sentence("t03", told)
    assert "adapter of t03 beats zero-shot by CIDEr +0.200 [0.100, 0.300]" in text
    assert "cannot be told apart from the constant caption" in text and "worse than the runner-up t07" in text
    told["runner-up"] = {"trial": "default", **verdict(0.1, 0.3)}
    assert _sentence("t03", told).endswith(
        "it beats the runner-up, the preset's default trial, by CIDEr +0.200 [0.100, 0.300]."
    )
