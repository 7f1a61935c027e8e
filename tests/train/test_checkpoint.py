"""States on disk: what comes back is what went in, and half a folder is no checkpoint."""

from __future__ import annotations

import pytest
import torch

from raycap.errors import ModelError
from raycap.train import checkpoint


@pytest.fixture
def state():
    pair = (torch.randn(2, 3), torch.randn(4, 2))
    tensors = {"git.a.query": pair, "git.a.output.dense": tuple(t + 1 for t in pair)}
    return {
        "spec": {"trial_id": "t0"}, "step": 3, "updates": 2, "loss_scale": {"value": 4.0, "good": 1},
        "best_score": 0.5, "best": tensors, "value": tensors, "m": tensors, "v": {},
    }  # fmt: skip


def same(one, other):
    assert set(one) == set(other)
    for key, value in one.items():
        if isinstance(value, dict) and value and isinstance(next(iter(value.values())), tuple):
            assert set(value) == set(other[key])
            for path, pair in value.items():
                assert all(torch.equal(x, y) for x, y in zip(pair, other[key][path]))
        else:
            assert value == other[key]


def test_round_trip(state, tmp_path):
    unscored = {**state, "best": None, "best_score": None}
    states = {"t1": unscored, "t0": state}
    checkpoint.save(tmp_path / "c", states)
    again = checkpoint.load(tmp_path / "c")
    assert list(again) == ["t1", "t0"]
    for trial_id, saved in states.items():
        same(saved, again[trial_id])


def test_saving_again_replaces_the_whole(state, tmp_path):
    checkpoint.save(tmp_path / "c", {"t0": state, "t1": state})
    checkpoint.save(tmp_path / "c", {"t1": state})
    assert list(checkpoint.load(tmp_path / "c")) == ["t1"]


@pytest.mark.parametrize("damage", ["manifest.json", "t0.safetensors", "t0.json"])
def test_a_damaged_folder_is_told(state, tmp_path, damage):
    checkpoint.save(tmp_path / "c", {"t0": state})
    (tmp_path / "c" / damage).write_bytes(b"{")
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.load(tmp_path / "c")
    (tmp_path / "c" / damage).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.load(tmp_path / "c")
