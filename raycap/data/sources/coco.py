"""COCO-style caption JSON: COCO itself, STAIR Captions v1.2, YJ Captions 26k (both Japanese, on COCO's images).

Layout, as read in cocodataset.org's format page (`images`: id, file_name, ...; `annotations`: id, image_id, caption), in
STAIR-Lab-CIT/STAIR-captions' README (the same, with `tokenized_caption` in the *_tokenized files) and the loader
shunk031/huggingface-datasets_STAIR-Captions (stair_captions_v1.2_{train,val}.json beside COCO's train2014/ and val2014/),
and in users of yjcaptions26k_clean.json, who name the image COCO_train2014_<id, 12 digits>.jpg where no file_name is.

The split is the one in the file's name: COCO's captions_train2014.json, captions_val2014.json. There is no public test
split; `data.missing_splits=draw` makes one of half of val.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycap.data.sources.base import Rejected, language_of, split_in_name
from raycap.data.sources.columns import short
from raycap.data.sources.table import Record, TableSource, json_files, outside_error, read_json_object
from raycap.errors import DataError

FOLDERS = ("", "annotations")
IMAGE_FOLDERS = ("", "images", "train2014", "val2014", "train2017", "val2017")
_OTHER_TASKS = ("instances_", "person_keypoints_", "stuff_", "panoptic_")
"""Files that COCO ships beside the captions; large, and without any."""
_COCO_NAME = re.compile(r"^(?:COCO_(?:train|val)2014_)?\d{12}\.jpg$")
_JUDGED = 1000


class Coco(TableSource):
    """Captions joined by image. Files of several languages make a row each for an image, of one group."""

    layout = (
        "COCO-style JSON, in the folder or in annotations/ ('images' with id and file_name, 'annotations' with image_id "
        "and caption)"
    )
    places = IMAGE_FOLDERS

    @staticmethod
    def detect(path: Path) -> bool:
        return bool(_files(path))

    def table_files(self) -> list[Path]:
        return _files(self.path)

    def records(self) -> Iterator[Record | Rejected]:
        read = [(file, *_parts(file)) for file in self.table_files()]
        langs = [self.settings.lang or _language(notes) for _, _, notes in read]
        several = len(set(langs)) > 1
        for (file, images, notes), lang in zip(read, langs):
            yield from self._file(file, images, notes, lang, several)

    def _file(
        self, file: Path, images: list[Any], annotations: list[Any], lang: str, several: bool
    ) -> Iterator[Record | Rejected]:
        name, split = file.relative_to(self.root).as_posix(), split_in_name(file.stem)
        names: dict[str, str] = {}
        captioned: set[str] = set()
        for number, image in enumerate(images):
            where = f"{name}: images[{number}]"
            if not isinstance(image, dict) or image.get("id") is None:
                yield Rejected("", where, "image-not-named", f"{short(image)} has no 'id'")
            elif isinstance(image.get("file_name"), str) and image["file_name"].strip():
                names[str(image["id"])] = image["file_name"].strip()
            else:
                names[str(image["id"])] = ""
        for number, annotation in enumerate(annotations):
            where = f"{name}: annotations[{number}]"
            if not isinstance(annotation, dict) or annotation.get("image_id") is None:
                yield Rejected("", where, "image-not-named", f"{short(annotation)} has no 'image_id'")
                continue
            number_of = str(annotation["image_id"])
            captioned.add(number_of)
            caption = annotation.get("caption")
            if not isinstance(caption, str):
                error = f"'caption' is {'missing' if caption is None else short(caption)}, expected a text"
                yield Rejected(number_of, where, "captions-not-text", error)
                continue
            image = names.get(number_of) or _coco_name(number_of, split)
            if not image:
                error = f"'images' holds no entry with id {number_of} and a file_name"
                yield Rejected(number_of, where, "image-not-named", error)
                continue
            if (outside := outside_error(image)) is not None:
                yield Rejected(number_of, where, "image-outside", outside)
                continue
            yield Record(
                image=image,
                captions=[caption],
                where=where,
                image_id=f"{number_of}-{lang}" if several else number_of,
                split=split,
                # The picture, whatever the language: no split may hold it in one and its neighbour in another.
                group=f"coco-{int(number_of)}" if number_of.isdigit() and _COCO_NAME.match(image) else "",
                lang=lang,
            )
        for number, image in enumerate(images):
            if isinstance(image, dict) and image.get("id") is not None and str(image["id"]) not in captioned:
                error = "no entry of 'annotations' names it"
                yield Rejected(str(image["id"]), f"{name}: images[{number}]", "no-captions", error)

    def _candidates(self, record: Record) -> list[str]:
        found = super()._candidates(record)
        if _COCO_NAME.match(record.image):  # the release of 2017 holds the same pictures under shorter names
            short_name = record.image[-16:]
            found += [f"{place}/{short_name}" for place in ("train2017", "val2017")]
        return list(dict.fromkeys(found))


def _files(path: Path) -> list[Path]:
    files = [
        f
        for f in json_files(path, ("annotations", "image_id", "caption"), FOLDERS)
        if not f.name.startswith(_OTHER_TASKS)
    ]
    names = {f.name for f in files}
    # STAIR ships each file twice; the tokenised one holds nothing more that is read here.
    return [f for f in files if not (f.stem.endswith("_tokenized") and f.name.replace("_tokenized", "") in names)]


def _parts(file: Path) -> tuple[list[Any], list[Any]]:
    found = read_json_object(file)
    annotations, images = found.get("annotations"), found.get("images", [])
    for key, value in (("annotations", annotations), ("images", images)):
        if not isinstance(value, list):
            state = "missing" if value is None else type(value).__name__
            raise DataError(f"{file}: '{key}' is {state}, expected a list, as in COCO's caption files")
    return images, annotations


def _language(annotations: list[Any]) -> str:
    captions = (a.get("caption") for a in annotations[:_JUDGED] if isinstance(a, dict))
    return language_of(c for c in captions if isinstance(c, str))


def _coco_name(image_id: str, split: str) -> str:
    """COCO's own file name for an image of which only the number is given; "" for what is no number."""
    return f"COCO_{split if split == 'val' else 'train'}2014_{int(image_id):012d}.jpg" if image_id.isdigit() else ""
