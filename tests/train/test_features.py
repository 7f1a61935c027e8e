"""Stored features are the tower's, bitwise, whenever and beside whatever they were computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.errors import DataError
from raycap.models import load_model
from raycap.train.features import Images


@pytest.fixture(params=["fp32", "bf16"])
def cm(request, config):
    c = config()
    return load_model(c.model, c.data, compute_dtype=request.param, device="cpu")


def test_stored_live_and_pixels_agree(cm, make_stores):
    complete, filling = make_stores(cm)["train"], make_stores(cm, finish=False)["train"]
    stored, live = Images(cm, stored=True), Images(cm, stored=True)
    rows = np.array([7, 0, 7, 3])
    found = stored.rows(complete, rows)
    assert complete.features is not None
    assert torch.equal(found, live.rows(filling, rows))
    assert filling.features is None
    assert found.dtype == cm.compute_dtype
    assert found.shape[:2] == (4, 17)
    pixels = Images(cm, stored=False).rows(complete, rows)
    assert pixels.dtype == cm.compute_dtype
    kind = 1e-5 if cm.compute_dtype == torch.float32 else 5e-2
    assert torch.allclose(cm.family.encode_images(cm, pixels), found, atol=kind)


def test_computed_once_and_attached_by_another_run(cm, make_stores):
    store = make_stores(cm)["train"]
    calls = []
    hook = cm.family.tower(cm.model).register_forward_hook(lambda *_: calls.append(1))
    first = Images(cm, stored=True).rows(store, np.arange(3))
    once = len(calls)
    store.features = None
    assert torch.equal(Images(cm, stored=True).rows(store, np.arange(3)), first)
    hook.remove()
    assert len(calls) == once


def test_another_tower_has_another_key(cm, make_stores):
    store = make_stores(cm)["train"]
    before = Images(cm, stored=True).key(store)
    with torch.no_grad():
        next(cm.family.tower(cm.model).parameters()).add_(1)
    assert Images(cm, stored=True).key(store) != before


def test_rows_that_never_come_are_told(cm, scenes, tmp_path):
    from raycap.data.store import Store

    store = Store.create(
        tmp_path / "s", "train", 1, (3, 64, 64), image_ids=["a"], references={"a": ["x"]}, max_tokens=8
    )
    store.close(DataError("the stream ended"))
    with pytest.raises(DataError, match="the stream ended"):
        Images(cm, stored=True).rows(store, np.arange(1))
