"""The memory benchmark's logic on a CPU: the same work on a real tiny model, its tensors counted instead of a GPU's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_memory
from raycap.config import load_config
from raycap.models.rehearsal import Rehearsal
from raycap.models.tiny import build_twin
from raycap.train.lanes import Lanes


class Counted(gpu_memory.Measured):
    device = values_on = torch.device("cpu")
    watch = Rehearsal

    def base(self, quantisation):
        cm = self.load(quantisation)
        tensors = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in (*cm.model.parameters(), *cm.model.buffers())
        }
        self.held = sum(tensors.values())
        return cm


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = build_twin("blip", tmp_path_factory.mktemp("twin"))
    return load_config("iu-xray-blip", [
        f"model.path={folder}", "model.quantisation=none", "model.compute_dtype=fp32", "tune.slots=3", "lora.r=4",
        "data.max_text_tokens=48", "decode.max_new_tokens=16", "export.promote=merged", "train.gradient_checkpointing=false",
    ])  # fmt: skip


@pytest.fixture
def one_lane(monkeypatch):
    """As on a GPU; a CPU's lanes hold gradients of their own."""
    monkeypatch.setattr("raycap.train.slots.lanes_for", lambda device: Lanes())


def test_a_prediction_meets_what_is_measured(config, one_lane):
    found = gpu_memory.compare("iu-xray-blip", config, Counted)
    assert [row["what"] for row in found["rows"]] == ["training, 1 slots", "training, 3 slots", "serving merged"]
    for row in found["rows"]:
        told, there = row["predicted"], row["measured"]
        for part in ("weights", "adapters", "step", "tower"):
            assert part not in told or there[part] == pytest.approx(told[part], rel=0.1), (row["what"], part)
        for part in ("validation", "decoding"):  # the whole caption at once is more than happens
            assert part not in told or 0.5 * told[part] < there[part] < 1.1 * told[part], (row["what"], part)
    assert found["wrong"] == []


def test_what_is_off_is_told(config, one_lane, monkeypatch):
    monkeypatch.setitem(gpu_memory.LIMITS, "iu-xray-blip", {"checkpoint": 10})
    monkeypatch.setattr(gpu_memory, "BOUND", -1.0)
    found = gpu_memory.compare("iu-xray-blip", config, Counted)
    assert len(found["wrong"]) == 4 and "at most 10" in found["wrong"][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert gpu_memory.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("preset", gpu_memory.PRESETS)
def test_presets_on_a_gpu(preset):
    assert gpu_memory.compare(preset, load_config(preset))["wrong"] == []
