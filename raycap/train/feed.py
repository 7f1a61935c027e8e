"""The rows of a pack: its stores, filled while the base loads and trains; from Ray Data, when the set is worth its start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from raycap.config import Config


class Feed:
    """Fills this worker's stores from its streams, in a thread of its own; `error` is what stopped it.

    The streams are made here and not in the driver, which then imports neither Ray Data nor what prepares a row; and a
    store that is full already, or that another pack of this machine fills, starts none.
    """

    def __init__(self, config: Config, shards: Any, folder: str, log: Callable[[str], None]):
        from raycap.data.stream import ray_reader
        from raycap.data.window import open_store
        from raycap.models import load_family, resolve_path, row_preparer

        family = load_family(config.model.family, config.model)
        processor = family.load_processor(
            resolve_path(config.model.path), trust_remote_code=config.model.trust_remote_code
        )
        self.error: BaseException | None = None
        self.folder, self.log = folder, log
        data, model = config.data, config.model
        self.prepare = row_preparer(model.family, model.path, data.prompt, data.max_text_tokens, model)
        self.splits = {"train": "+".join(config.data.train_splits), "val": "val"}
        self._tokens: dict[str, dict[str, Any]] = {}
        self._limit, self._knows_all = config.data.max_text_tokens, family.unknown_token(processor) is None
        self.stores = {
            name: open_store(
                shards,
                split,
                config.cache_dir,
                family.image_size(processor),
                config.data.max_text_tokens,
                read=ray_reader(self.prepare),
                limit_bytes=int(config.run.store_gb * 1e9),
                family=config.model.family,
                processor=family.fingerprint(processor),
                prompt=config.data.prompt,
            )
            for name, split in self.splits.items()
        }
        threading.Thread(target=self._fill, name="feed", daemon=True).start()

    def tokens(self) -> dict[str, dict[str, Any]]:
        """Split -> captions, captions_cut, limit, tokens, unknown, unknown_share; of the splits that are in whole."""
        for name, store in self.stores.items():
            split = self.splits[name]
            if split not in self._tokens and (stats := store.stats):
                unknown = {n: None if self._knows_all else stats[n] for n in ("unknown", "unknown_share")}
                self._tokens[split] = {
                    "captions": stats["captions"], "captions_cut": stats["truncated"], "limit": self._limit,
                    "tokens": stats["tokens"], **unknown,
                }  # fmt: skip
        return self._tokens

    def _fill(self) -> None:
        from raycap.data.stream import fill, stream

        try:
            for name, store in self.stores.items():
                began = time.monotonic()
                how = "fills" if store.owner else "finds" if store.complete else "follows"
                if store.row_groups is not None:
                    how = f"has no room for all, keeps {store.capacity} row groups of"
                if store.owner:
                    fill(store, stream(self.folder, self.splits[name], self.prepare, store.ready, self.log))
                self.log(
                    f"{how} the store of {self.splits[name]}: {store.count} images, {time.monotonic() - began:.1f} s"
                )
        except BaseException as error:  # raised in the loop's thread, which meets it when it waits for a row
            self.error = error
            self.log(f"the stream stopped: {error}")
            for store in self.stores.values():
                store.close()
