"""Drawn sets as folders, each in the layout that the real set is published in, so that its own source reads it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from raycap.data.drawn import Drawn, draw
from raycap.files import atomic_folder, sha256_json, write_atomic, write_json

VERSION = 1
"""Goes up when pictures, captions or layouts change: sets in a cache are then drawn again."""
SIZES = {"train": 160, "val": 64, "test": 64}
"""Rows of each split once `prepare` is through."""
_FIRST = {"train": 0, "val": 10_000, "test": 20_000}
_SPARE = 14
"""Pictures that the creatures have beyond what `data.splits` counts, as the real set has."""
_OUTSIDE = 240
"""Pictures of the set out of the domain; its test split is a tenth of them."""


@dataclass(frozen=True, slots=True)
class DrawnSet:
    """How one published set is stood in for."""

    kind: str
    write: Callable[[Path], None]
    settings: dict[str, str]
    """Settings of `data` that name a place: setting -> path inside the set's folder."""
    outside: str = ""
    """Path of a further set, out of the domain of this one; empty: there is none."""


def write_set(name: str, place: Path) -> Path:
    """Draw the set of that name below `place` unless it lies there already; returns its folder. Takes a second or two."""
    folder = set_folder(name, place)
    if not folder.is_dir():
        with atomic_folder(folder) as writing:
            SETS[name].write(writing)
    return folder


def set_folder(name: str, place: Path) -> Path:
    return place / f"{name}-{sha256_json([VERSION, SIZES, _SPARE, _OUTSIDE])[:8]}"


def training_rows(name: str) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """(picture, captions) of the set's training split."""
    for drawn in _split(SETS[name].kind, "train", SIZES["train"]):
        for image in (drawn.image, *drawn.views):
            yield image, drawn.captions


def _split(kind: str, split: str, count: int) -> Iterator[Drawn]:
    views = 1 + len(draw(kind, 0, 0).views)
    for number in range(count // views):
        yield draw(kind, 0, _FIRST[split] + number)


def _jpeg(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _creatures(folder: Path) -> None:
    """reach-vb/pokemon-blip-captions: one parquet of image and text, without splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = sum(SIZES.values()) + _SPARE
    rows = [draw("creature", 0, number) for number in range(total)]
    table = pa.table({
        "image": [{"bytes": _png(row.image), "path": f"{n}.png"} for n, row in enumerate(rows)],
        "text": [row.captions[0] for row in rows],
    })  # fmt: skip
    place = folder / "pokemon-blip-captions" / "data"
    place.mkdir(parents=True)
    pq.write_table(table, place / "train-00000-of-00001.parquet")


def _xrays(folder: Path) -> None:
    """R2Gen's iu_xray: annotation.json beside images/<study>/<view>.png; its reports are the findings."""
    root, found = folder / "iu_xray", {}
    for split, count in SIZES.items():
        studies = []
        for number, drawn in enumerate(_split("xray", split, count)):
            study = f"CXR{_FIRST[split] + number}_IM-{number:04d}"
            paths = []
            for view, image in enumerate((drawn.image, *drawn.views)):
                paths.append(f"{study}/{view}.png")
                file = root / "images" / paths[-1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(_png(image))
            studies.append({"id": study, "report": drawn.captions[0], "image_path": paths, "split": split})
        found[split] = studies
    write_json(root / "annotation.json", found)


def _stair(folder: Path) -> None:
    """STAIR's JSON beside COCO's pictures (no test split: half of val becomes it), and YJ's on pictures of other things."""
    for split, count in (("train", SIZES["train"]), ("val", SIZES["val"] + SIZES["test"])):
        rows = [(_FIRST[split] + n, drawn) for n, drawn in enumerate(_split("photo-ja", split, count))]
        _coco(folder, f"stair/stair_captions_v1.2_{split}.json", split, rows)
    _coco(
        folder, "yj/yjcaptions26k_clean.json", "train", [(50_000 + n, draw("meal-ja", 0, n)) for n in range(_OUTSIDE)]
    )


def _coco(folder: Path, file: str, split: str, rows: list[tuple[int, Drawn]]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, drawn in rows:
        name = f"COCO_{split}2014_{number:012d}.jpg"
        _jpeg(folder / "coco" / f"{split}2014" / name, drawn.image)
        images.append({"id": number, "file_name": name})
        for caption in drawn.captions:
            annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
    write_json(folder / file, {"images": images, "annotations": annotations})


def _flickr(folder: Path) -> None:
    """Karpathy's dataset_flickr30k.json beside the pictures."""
    root, images = folder / "flickr30k", []
    for split, count in SIZES.items():
        for number, drawn in enumerate(_split("photo", split, count)):
            name = f"{_FIRST[split] + number + 1}.jpg"
            _jpeg(root / "flickr30k-images" / name, drawn.image)
            sentences = [{"raw": caption, "tokens": caption.rstrip(" .").split()} for caption in drawn.captions]
            images.append({"filename": name, "imgid": len(images), "split": split, "sentences": sentences})
    write_atomic(root / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))


def _risc(folder: Path) -> None:
    """RISCM: captions.csv beside resized/, 224 x 224."""
    root, table = folder / "RISCM", io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["source", "split", "image", *(f"caption_{n}" for n in range(1, 6))])
    for split, count in SIZES.items():
        for number, drawn in enumerate(_split("aerial", split, count)):
            source = ("NWPU", "RSICD", "UCM")[number % 3]
            name = f"{source}_{_FIRST[split] + number}.jpg"
            _jpeg(root / "resized" / name, drawn.image)
            writer.writerow([source, split, name, *drawn.captions])
    write_atomic(root / "captions.csv", table.getvalue())


SETS: dict[str, DrawnSet] = {
    "pokemon-blip-captions": DrawnSet("creature", _creatures, {"source": "pokemon-blip-captions"}),
    "iu_xray": DrawnSet("xray", _xrays, {"source": "iu_xray"}),
    "stair": DrawnSet("photo-ja", _stair, {"source": "stair", "images": "coco"}, outside="yj"),
    "flickr30k": DrawnSet("photo", _flickr, {"source": "flickr30k"}),
    "RISCM": DrawnSet("aerial", _risc, {"source": "RISCM"}),
}
"""The real set's name, as the presets have it in data.source -> its stand-in."""
