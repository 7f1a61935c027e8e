"""What a frozen vision tower makes of each image, computed once and kept beside the pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from raycap.data.store import Store
from raycap.models.base import CaptionModel

BATCH = 64


def frozen_features(cm: CaptionModel, store: Store) -> np.ndarray:
    """Features [N, L, D] of every image of `store`, through the tower where they are not stored yet.

    Kept in fp16 where the model computes in 16 bits (numpy knows no bf16; a feature's size is near 1, where fp16 is the
    finer of the two), else in fp32. The key holds what they depend on: the tower's weights and the dtype.
    """
    kind = "float32" if cm.compute_dtype == torch.float32 else "float16"
    key = Store.key(tower=tower_sha256(cm), dtype=str(cm.compute_dtype), kept=kind)
    if store.attach_features(key):
        return store.features
    store.wait(np.arange(store.count))
    cm.model.eval()

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, store.count, BATCH):
            rows = np.arange(begin, min(begin + BATCH, store.count))
            pixels = torch.from_numpy(store.pixels(rows)).to(cm.device)
            values = cm.family.encode_images(cm, cm.family.pixel_values(cm.processor, pixels))
            yield rows, values.float().cpu().numpy().astype(kind)

    first = cm.family.encode_images(
        cm, cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels([0])).to(cm.device))
    )
    return store.add_features(key, first.shape[1:], kind, batches())


def tower_sha256(cm: CaptionModel) -> str:
    """Hash of the frozen tower's weights as they are in memory."""
    import hashlib

    digest = hashlib.sha256()
    tower = cm.family.tower(cm.model)
    for name, value in sorted(getattr(tower, "tower", tower).state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
