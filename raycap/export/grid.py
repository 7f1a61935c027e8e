"""Captions of one model folder for all cells of a decoding grid; each image goes through the vision tower once.

Captions are kept by what they depend on: the model's files, prompt, decoding, image set, split, device and code version.
A cell is written after every chunk, so that one which was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycap import __version__
from raycap.config import from_dict
from raycap.data.shards import Shards, open_shards
from raycap.errors import ConfigError
from raycap.evaluate.grid import Cell
from raycap.export.captioner import Captioner
from raycap.export.stage import CHUNK_IMAGES
from raycap.files import read_jsonl, set_aside, sha256_folder, sha256_json, write_jsonl

if TYPE_CHECKING:
    import torch

    from raycap.models.base import CaptionModel


def grid_stage(
    settings: dict[str, Any],
    shards_folder: str,
    split: str,
    model: str,
    cells: Sequence[dict[str, Any]],
    folder: str,
    *,
    threads: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, Any]]:
    """Caption `split` once for every cell, or read what is kept in `folder`.

    Returns: cell's name -> file (JSONL of image_id and caption), key, reused (how many captions were there before).
    """
    config = from_dict(settings)
    shards = open_shards(shards_folder).speaking(config.evaluate.lang, (split,))
    ids, wanted = list(shards.references(split)), [Cell.from_dict(c) for c in cells]
    weights = sha256_folder(model)
    found: dict[str, dict[str, Any]] = {}
    kept: dict[str, dict[str, str]] = {}
    for cell in wanted:
        key = _key(config, shards, split, weights, cell)
        file = Path(folder) / f"{key}.jsonl"
        kept[cell.name] = _read(file)
        found[cell.name] = {"file": str(file), "key": key, "reused": len(kept[cell.name])}
    if any(len(kept[cell.name]) < len(ids) for cell in wanted):
        captioner = Captioner.load(config, model, threads=threads)
        for cell in wanted:
            _check_room(captioner.model, cell)
        for number, (part, pixels) in enumerate(_chunks(captioner, shards, split)):
            missing = [cell for cell in wanted if any(i not in kept[cell.name] for i in part)]
            if not missing:
                continue
            features = encode(captioner.model, pixels)
            for cell in missing:
                begun = number * CHUNK_IMAGES
                say(f"{cell.name}: {begun + len(part):,} of {len(ids):,} images")
                kept[cell.name].update(zip(part, decode(captioner.model, cell, features, pixels, begun), strict=True))
                rows = [{"image_id": i, "caption": kept[cell.name][i]} for i in ids if i in kept[cell.name]]
                write_jsonl(found[cell.name]["file"], rows)
    return found


def encode(cm: CaptionModel, pixels: np.ndarray) -> torch.Tensor:
    """Features of uint8 images [n, C, H, W] by the tower, in runs of one size so that they do not depend on the rest."""
    import torch

    from raycap.train.features import TOWER_BATCH

    parts = []
    for begin in range(0, len(pixels), TOWER_BATCH):
        part = pixels[begin : begin + TOWER_BATCH]
        full = part[np.arange(TOWER_BATCH) % len(part)]
        with torch.inference_mode():
            values = cm.family.pixel_values(cm.processor, torch.from_numpy(full))
            parts.append(cm.family.encode_images(cm, values)[: len(part)])
    return torch.cat(parts)


def decode(cm: CaptionModel, cell: Cell, features: torch.Tensor, pixels: np.ndarray, begun: int = 0) -> list[str]:
    """Captions of one cell, `decode.batch` images at a time in their order; `begun` images of the split came before them."""
    import torch

    from raycap.models.decoding import for_batch

    prompted = dataclasses.replace(cm, prompt=cell.prompt)
    captions: list[str] = []
    size = cell.decode.batch
    for begin in range(0, len(pixels), size):
        settings = for_batch(cell.decode, cm.processor, pixels[begin : begin + size])
        devices = [cm.device] if cell.fixed_order and cm.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices, enabled=cell.fixed_order):
            if cell.fixed_order:
                torch.manual_seed(zlib.crc32(f"{cell.decode.seed} {begun + begin}".encode()))
            captions += cm.family.generate(prompted, features[begin : begin + size], settings)
    return captions


def _chunks(captioner: Captioner, shards: Shards, split: str) -> Any:
    """(image ids, uint8 [n, C, H, W]) of CHUNK_IMAGES images at a time, in the split's order."""
    from PIL import Image

    ids: list[str] = []
    pixels: list[np.ndarray] = []
    for row in shards.iter_rows(split, ("image_id", "image")):
        ids.append(row["image_id"])
        pixels.append(captioner.prepare(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")))
        if len(ids) == CHUNK_IMAGES:
            yield ids, np.stack(pixels)
            ids, pixels = [], []
    if ids:
        yield ids, np.stack(pixels)


def _check_room(cm: CaptionModel, cell: Cell) -> None:
    """Raise where prompt and caption together are longer than the model's positions."""
    positions = cm.family.max_positions(cm.model)
    head = len(cm.family.head(cm.processor, cell.prompt))
    if positions is not None and head + cell.decode.max_new_tokens > positions:
        raise ConfigError(
            f"the prompt '{cell.prompt_name}' is {head} tokens and decode.max_new_tokens={cell.decode.max_new_tokens}, but "
            f"the model has {positions} text positions: shorten one of them"
        )


def _key(config: Any, shards: Shards, split: str, weights: str, cell: Cell) -> str:
    import torch

    decode = dataclasses.asdict(cell.decode)
    if not cell.fixed_order:
        del decode["batch"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = {
        "model": weights, "family": dataclasses.asdict(config.model) | {"path": ""}, "device": device,
        "data": shards.content_sha256, "lang": config.evaluate.lang, "split": split,
        "prompt": cell.prompt, "decode": decode, "code": __version__,
    }  # fmt: skip
    return sha256_json(parts)[:20]


def _read(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        return {row["image_id"]: row["caption"] for row in read_jsonl(file)}
    except (ValueError, KeyError, TypeError):
        set_aside(file)
        return {}
