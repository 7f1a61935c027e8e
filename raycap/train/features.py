"""What a frozen vision tower makes of each image: computed once, kept beside the pixels, shared by every trial.

Shapes: n images, N visual tokens, D width of the tower.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import torch

from raycap.data.store import Store
from raycap.models.base import CaptionModel

TOWER_BATCH = 64
"""Images in every run of the tower, a short rest filled up: with one size of batch an image's features do not depend
on what it is computed beside."""
_STORED_AS = {torch.bfloat16: np.uint16}
"""numpy has no bf16: its bits are kept as they are."""


class Images:
    """Hands out what the model takes for rows of a store: stored features, or pixel values.

    With `stored` the model is given features. They come from the store's file once the store is complete (they are
    computed then, unless another run has left them there), and before that from the tower, bitwise the same. Of a split
    that `kept` says no to (train.keeping decides it) the tower computes them at each look.
    """

    def __init__(self, cm: CaptionModel, *, stored: bool, shared: bool | None = None):
        self.cm, self.stored = cm, stored
        self.kept: dict[str, bool] = {}
        """Whether features of a split are kept on disk; yes where nothing is said."""
        self.shared = stored if shared is None else shared
        """Whether slots can look at one copy of them: all that comes between tower and text is frozen too."""
        self._key: str | None = None
        self._lock = threading.Lock()

    def rows(self, store: Store, rows: np.ndarray) -> torch.Tensor:
        """Features [n, N, D] or pixel values of the images in `rows`, waiting for those that have not come yet."""
        rows = np.asarray(rows, dtype=np.int64)
        if not self.stored:
            store.wait(rows)
            return self._pixel_values(store, rows).to(self.cm.device, self.cm.compute_dtype)
        compute = self.live
        if self.kept.get(store.split, True):
            compute = self.encode
            with self._lock:  # lanes ask side by side
                if store.features is None and store.complete:
                    self.store_features(store)
            if store.features is not None:
                return self.from_numpy(np.asarray(store.features[rows]))
        store.wait(rows)
        distinct, back = np.unique(rows, return_inverse=True)
        return compute(store, distinct)[torch.from_numpy(back).to(self.cm.device)]

    def store_features(self, store: Store) -> None:
        """Make `store.features` there: attached where the same tower has left them, else computed for all images."""
        key = self.key(store)
        if store.attach_features(key):
            return
        one = self.encode(store, np.arange(1))

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for begin in range(0, store.count, TOWER_BATCH):
                rows = np.arange(begin, min(begin + TOWER_BATCH, store.count))
                yield rows, self.to_numpy(self.encode(store, rows))

        store.add_features(key, one.shape[1:], str(self.to_numpy(one).dtype), batches())

    def key(self, store: Store) -> str:
        """Names the features: the tower's weights as they are in memory, dtype and device they are computed in."""
        if self._key is None:
            digest = hashlib.sha256()
            family = self.cm.family
            for module in family.feature_modules(self.cm.model):
                for name, tensor in sorted(module.state_dict().items()):
                    name = name.replace(".base.", ".")  # a site of adapters
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            own = {f"model_{name}": str(getattr(family.settings, name)) for name in sorted(family.uses)}
            self._key = Store.key(
                tower=digest.hexdigest(),
                dtype=str(self.cm.compute_dtype),
                device=self.cm.device.type,
                batch=TOWER_BATCH,
                **own,
            )
        return self._key

    def live(self, store: Store, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows`, computed in batches of what there is."""
        batches = np.array_split(rows, -(-len(rows) // TOWER_BATCH))
        return torch.cat([self.cm.family.encode_images(self.cm, self._pixel_values(store, part)) for part in batches])

    def encode(self, store: Store, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows`, computed in batches of TOWER_BATCH, the last one filled up."""
        parts = []
        for begin in range(0, len(rows), TOWER_BATCH):
            part = rows[begin : begin + TOWER_BATCH]
            full = np.resize(part, TOWER_BATCH)
            parts.append(self.cm.family.encode_images(self.cm, self._pixel_values(store, full))[: len(part)])
        return torch.cat(parts)

    def _pixel_values(self, store: Store, rows: np.ndarray) -> torch.Tensor:
        return self.cm.family.pixel_values(self.cm.processor, torch.from_numpy(store.pixels(rows)))

    def to_numpy(self, features: torch.Tensor) -> np.ndarray:
        kind = _STORED_AS.get(features.dtype)
        features = features.detach().cpu().contiguous()
        return features.view(torch.uint16).numpy() if kind is not None else features.numpy()

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.view(self.cm.compute_dtype) if array.dtype == np.uint16 else tensor).to(self.cm.device)
