"""Adapters: how they start, and PEFT's files of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel

from raycap.config import from_dict
from raycap.errors import ConfigError, ModelError
from raycap.models.lora import export_adapter, import_adapter, start
from raycap.trial import trial_spec

SHAPES = {"a.query": (64, 64), "a.dense": (64, 256)}


@pytest.fixture
def spec():
    return trial_spec(from_dict({"lora": {"r": 4, "alpha_per_rank": 1.5}}), "t0", seed=7)


def filled(shapes, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        p: (torch.randn(r, i, generator=generator), torch.randn(o, r, generator=generator))
        for p, (i, o) in shapes.items()
    }


def test_start_is_pefts_draw_keyed_by_seed_and_module(spec):
    weights = start(spec, SHAPES)
    assert list(weights) == list(SHAPES)
    for path, (a, b) in weights.items():
        inputs, outputs = SHAPES[path]
        assert a.shape == (4, inputs)
        assert b.shape == (outputs, 4)
        assert not b.any()
        bound = inputs**-0.5  # kaiming_uniform with a = sqrt 5
        assert 0.9 * bound < a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    alone = start(spec, {"a.dense": SHAPES["a.dense"]})
    assert torch.equal(alone["a.dense"][0], weights["a.dense"][0])
    assert not torch.equal(weights["a.query"][0], weights["a.dense"][0])
    other = start(dataclasses.replace(spec, seed=8), SHAPES)
    assert not torch.equal(other["a.query"][0], weights["a.query"][0])


def test_rank_0_is_refused(spec):
    with pytest.raises(ConfigError, match=r"lora\.r=0"):
        start(dataclasses.replace(spec, r=0), SHAPES)


def test_an_exported_adapter_adapts_the_same_modules_in_plain_peft(load, pixel_values, spec, tmp_path):
    cm = load()
    paths = cm.family.lora_targets(cm.model, "language", ("query", "output.dense"))
    shapes = {p: (m.in_features, m.out_features) for p in paths for m in [cm.model.get_submodule(p)]}
    weights = filled(shapes, spec.r)
    export_adapter(tmp_path, weights, spec, cm.path, cm.family.task_type)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 6, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == cm.path
    peft = PeftModel.from_pretrained(load().model, str(tmp_path))
    adapted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(paths)
    for path in paths:
        module = peft.get_submodule(f"base_model.model.{path}")
        assert torch.equal(module.lora_A["default"].weight, weights[path][0])
        assert module.scaling["default"] == spec.scale


def test_round_trip(spec, tmp_path):
    weights = filled(SHAPES, spec.r)
    export_adapter(tmp_path, weights, spec, "base", None)
    config, again = import_adapter(tmp_path)
    assert config["lora_alpha"] == spec.alpha
    for path, pair in weights.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, again[path]))


def test_what_plain_peft_saved_is_read(load, tmp_path):
    from peft import LoraConfig, get_peft_model

    cm = load()
    paths = cm.family.lora_targets(cm.model, "language", ("query",))
    peft = get_peft_model(cm.model, LoraConfig(r=3, lora_alpha=5, target_modules=paths))
    peft.save_pretrained(tmp_path)
    config, weights = import_adapter(tmp_path)
    assert set(weights) == set(paths)
    assert config["r"] == 3
    module = peft.get_submodule(f"base_model.model.{paths[0]}")
    assert torch.equal(weights[paths[0]][0], module.lora_A["default"].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "use_dora"), ({"rank_pattern": {"x": 2}}, "rank_pattern")],
)
def test_what_a_slot_cannot_hold_is_refused(spec, tmp_path, change, words):
    export_adapter(tmp_path, filled(SHAPES, spec.r), spec, "base", None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=words):
        import_adapter(tmp_path)


def test_a_folder_without_an_adapter_says_so(tmp_path):
    with pytest.raises(ModelError, match="no readable PEFT adapter"):
        import_adapter(tmp_path)
