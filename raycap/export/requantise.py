"""Quantises a merged model to NF4 again, into a folder that plain transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from raycap.config import DataSettings, ModelSettings
from raycap.export.folder import read_manifest, write_manifest
from raycap.files import atomic_folder


def requantise(base: ModelSettings, data: DataSettings, merged: Path, out: Path) -> Path:
    """Write the NF4 twin of the merged folder `merged` to `out`: NF4 where training had it, 16 bits elsewhere.

    Raises:
        ModelError: `merged` is no finished export.
    """
    from raycap.models import load_model

    manifest = read_manifest(merged)
    dtype = {"float16": "fp16", "bfloat16": "bf16"}[manifest["dtype"]]
    # Quantised from the 16-bit weights and saved before any forward: the first evaluation on some CPUs repacks them.
    packed = dataclasses.replace(base, materialise=False)
    cm = load_model(packed, data, path=merged, quantisation="nf4", compute_dtype=dtype)
    with atomic_folder(out) as folder:
        cm.model.save_pretrained(folder)
        cm.processor.save_pretrained(folder)
        kept = {k: v for k, v in manifest.items() if k not in ("schema", "files", "gate")}
        write_manifest(folder, {**kept, "variant": "merged-nf4"})
    return out
