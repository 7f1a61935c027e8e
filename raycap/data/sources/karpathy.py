"""Karpathy's `dataset_*.json` with its official splits: Flickr8k, Flickr30k, COCO; UCM-Captions and RSICD took it over.

Layout, as read in the published file's first lines (quoted in many repositories, such as the first image of
dataset_flickr8k.json): `{"images": [{"sentids", "imgid", "sentences": [{"tokens", "raw", "imgid", "sentid"}], "split",
"filename"}], "dataset": "flickr8k"}`; dataset_coco.json adds `filepath` (the folder) and `cocoid`. RSICD's and UCM's are
read by isaaccorley/torchrs (dataset_rsicd.json beside RSICD_images/). `restval` counts as train, as is usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected
from raycap.data.sources.columns import short
from raycap.data.sources.table import (
    Record,
    TableSource,
    image_places,
    json_files,
    outside_error,
    parse_record,
    read_json_object,
)
from raycap.errors import DataError


class Karpathy(TableSource):
    """Images lie beside the file, in a folder there (Flickr8k_Dataset/, flickr30k-images/, imgs/), or in data.images."""

    layout = "Karpathy's dataset_*.json ('images' with filename, split and 'sentences' of raw)"

    def __init__(self, settings: DataSettings, seed: int):
        super().__init__(settings, seed)
        self.places = tuple(dict.fromkeys(place for base in self._bases for place in image_places(base)))

    @staticmethod
    def detect(path: Path) -> bool:
        return bool(_files(path))

    def table_files(self) -> list[Path]:
        return _files(self.path)

    def records(self) -> Iterator[Record | Rejected]:
        files = self.table_files()
        if len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise DataError(f"{self.root} holds {names}: give one of these files as data.source")
        file = files[0]
        found = read_json_object(file)
        images = found.get("images")
        if not isinstance(images, list):
            raise DataError(f"{file}: 'images' is {type(images).__name__}, expected a list, as in Karpathy's files")
        if isinstance(found.get("dataset"), str) and found["dataset"]:
            self.title = found["dataset"]
        for number, image in enumerate(images):
            yield _record(image, f"{file.name}: images[{number}]")


def _files(path: Path) -> list[Path]:
    return json_files(path, ("images", "sentences", "filename", "raw"))


def _record(image: Any, where: str) -> Record | Rejected:
    if not isinstance(image, dict):
        return Rejected("", where, "not-an-object", f"{short(image)}, expected an object with filename and sentences")
    name, sentences = image.get("filename"), image.get("sentences")
    image_id = name if isinstance(name, str) else ""
    if not isinstance(sentences, list):
        state = "missing" if sentences is None else short(sentences)
        return Rejected(image_id, where, "no-captions", f"'sentences' is {state}, expected a list")
    captions = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
    if not all(isinstance(c, str) for c in captions):
        bad = next(s for s, c in zip(sentences, captions) if not isinstance(c, str))
        return Rejected(image_id, where, "captions-not-text", f"{short(bad)} in 'sentences' has no text under 'raw'")
    folder = image.get("filepath") if isinstance(image.get("filepath"), str) else ""
    if folder and (outside := outside_error(folder)) is not None:
        return Rejected(image_id, where, "image-outside", outside)
    fields = {"filename": name, "captions": captions, "split": image.get("split"), "image_id": image_id}
    return parse_record(fields, where, image_keys=("filename",), folder=folder)
