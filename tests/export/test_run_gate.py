"""The whole gate on the tiny GIT: real merges, real captions, real CIDEr; and a damaged merge that must not pass."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raycap.data.shapes import generate
from raycap.errors import GateError
from raycap.export import gate as gate_module
from raycap.export.captioner import Captioner
from raycap.export.card import CardFacts
from raycap.export.folder import MANIFEST, read_manifest, verify, write_manifest
from raycap.export.gate import run_gate
from raycap.files import read_json
from raycap.models import load_model


@pytest.fixture(scope="module")
def scored(config, adapter):
    """(the adapter's CIDEr, scorer of a folder) on the same scenes."""
    from peft import PeftModel

    from raycap.evaluate.cider import CiderScorer

    scenes = list(generate(48, seed=11, style="plain"))
    cider = CiderScorer({scene.scene_id: list(scene.captions) for scene in scenes})

    def score(captioner: Captioner) -> float:
        captions = captioner.caption([captioner.prepare(scene.image) for scene in scenes])
        return cider.score({scene.scene_id: c for scene, c in zip(scenes, captions, strict=True)})[0]

    cm = load_model(config.model, config.data, compute_dtype="fp32", device="cpu")
    cm.model = PeftModel.from_pretrained(cm.model, adapter).eval()
    trained = score(Captioner(cm, config))
    assert trained > 0.3, "an adapter that captions nothing would gate nothing"
    return trained, lambda folder, variant: score(Captioner.load(config, folder, device="cpu"))


def test_a_sound_export_passes_and_is_kept(config, adapter, scored, tmp_path):
    trained, scorer = scored
    seen = []

    def record(folder, variant):
        seen.append(variant)
        return scorer(folder, variant)

    facts = CardFacts(name="t", base="builtin:tiny-git", data="shapes", trial="t03", adapter={"rank": 4, "lr": 1e-3})
    result = run_gate(config, adapter, trained, record, tmp_path / "best", tmp_path / "gate.json", facts=facts)
    print(json.dumps(result.to_dict()))
    assert seen == ["merged", "merged-dequantised", "merged-nf4-original", "merged-nf4-dequantised"]
    assert result.passed
    assert read_json(tmp_path / "gate.json") == result.to_dict()
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["merged", "merged-nf4"]
    for variant, score in (
        ("merged", max(result.merged, result.merged_dequantised)),
        ("merged-nf4", result.merged_nf4),
    ):
        folder = tmp_path / "best" / variant
        assert variant == "merged-nf4" or verify(folder)["onto"] == result.kept
        assert scorer(folder, variant) == score, "what is kept is what was scored"
        card = (folder / "README.md").read_text()
        assert "serving passed." in card and "| trial | t03 |" in card and f"{trained:.4f}" in card


def damaging(merge):
    """`merge`, but one layer of what it writes is noise of the layer's own size."""

    def damaged(base, data, adapter, out, onto):
        folder = merge(base, data, adapter, out, onto)
        weights = load_file(folder / "model.safetensors")
        name = "git.encoder.layer.0.intermediate.dense.weight"
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
        weights[name] = (3 * noise * weights[name].float().std()).to(weights[name].dtype)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        facts = {k: v for k, v in read_manifest(folder).items() if k not in ("schema", "files")}
        (folder / MANIFEST).unlink()
        write_manifest(folder, facts)
        return folder

    return damaged


def test_a_damaged_layer_fires_the_gate(config, adapter, scored, tmp_path, monkeypatch):
    trained, scorer = scored
    monkeypatch.setattr(gate_module, "merge", damaging(gate_module.merge))
    with pytest.raises(GateError, match=r"merged was not promoted: cider on val fell .* Nothing is served"):
        run_gate(config, adapter, trained, scorer, tmp_path / "best", tmp_path / "gate.json")
    recorded = read_json(tmp_path / "gate.json")
    assert recorded["passed"] is False
    assert recorded["drop_merged"] > recorded["max_drop"]
    assert "did not pass" in (tmp_path / "best" / "merged" / "README.md").read_text()


def test_a_scorer_that_fails_leaves_nothing_half_done(config, adapter, tmp_path):
    def fails(folder, variant):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gate(config, adapter, 1.0, fails, tmp_path / "best", tmp_path / "gate.json")
    assert not (tmp_path / "gate.json").exists()
    assert list((tmp_path / "best").iterdir()) == []
