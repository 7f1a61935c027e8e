"""The stage after a sweep, for a winner that is a prompt: captioned with, never merged, and said so."""

from __future__ import annotations

import torch

from raycap.config import from_dict
from raycap.data.shards import prepare_if_needed
from raycap.export.stage import export_stage
from raycap.models.prompt import export_prompt, import_prompt


def test_a_prompt_captions_val_and_test_and_the_gate_refuses_it_by_name(tmp_path):
    config = from_dict(
        {"run": {"cache_dir": str(tmp_path / "cache")}, "data": {"shapes_images": [2, 3, 2]},
         "lora": {"variant": "prompt", "prompt_tokens": 4}, "tune": {"slots": 1}, "decode": {"max_new_tokens": 8}}
    )  # fmt: skip
    vectors = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    adapter = export_prompt(tmp_path / "adapter", vectors, config.model.path, "CAUSAL_LM")
    assert torch.equal(import_prompt(adapter), vectors)
    shards = prepare_if_needed(config)
    found = export_stage(config.to_dict(), str(shards), str(tmp_path / "run"), str(adapter))
    assert "prompt tuning cannot be merged" in found["refused"]
    assert {split: len(variants["adapter"]) for split, variants in found["captions"].items()} == {"val": 3, "test": 2}
    assert found["captions"]["val"]["adapter"] != found["captions"]["val"]["zero-shot"]
    assert not (tmp_path / "run" / "best").exists()
