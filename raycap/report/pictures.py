"""Pictures of a report: which to show, small enough to embed, with what each model says of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycap.files import read_json, write_atomic, write_json
from raycap.report.runs import Run

PICTURES = "plots/pictures.json"
KINDS = {
    "best": "where the winner scores highest",
    "median": "where half of the pictures score higher",
    "worst": "where the winner scores lowest",
    "even": "at even distances through the split: nobody picked them",
}
PER_KIND = 3
WORST = "worst-trial"
"""Variant under which the worst trial's captions of some test pictures are kept; never scored."""
PROMOTED = ("served", "merged", "merged-nf4", "adapter")
"""Who speaks for the run, the furthest on the way to production first."""
KEPT_BYTES = {"JPEG": 60_000, "PNG": 16_000}
"""Files of these kinds and sizes are embedded as they are where they are not too large in pixels."""
LONGEST_PX = 320


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture with what was said about it."""

    image_id: str
    image: bytes
    """The file's bytes: PNG or JPEG, shown as they are, so a few tens of kB at most."""
    references: list[str]
    captions: dict[str, str]
    """Who says -> what: variants of a run, `worst-trial`, or the names of runs that are compared."""
    kind: str = ""
    """One of KINDS; empty for a picture of which that is not known."""
    scores: dict[str, float] = field(default_factory=dict)
    """Who says -> CIDEr of that caption, with the document frequencies of the whole split."""


def choose(
    scores: Mapping[str, float], even: Sequence[str] = (), *, per_kind: int = PER_KIND
) -> dict[str, tuple[str, ...]]:
    """Kind -> image ids: the best, those in the middle and the worst by `scores`, then `per_kind` of `even`.

    No image is shown twice; of few images there are fewer of each kind. The worst stands first in its kind.
    """
    order = sorted(scores, key=lambda i: (-scores[i], i))
    count = min(per_kind, max(1, len(order) // 3)) if order else 0
    best, rest = order[:count], order[count:]
    worst = rest[::-1][:count]
    rest = rest[: len(rest) - len(worst)]
    middle = max(0, (len(rest) - count) // 2)
    found = {"best": best, "median": rest[middle : middle + count], "worst": worst}
    shown = {i for ids in found.values() for i in ids}
    left = [i for i in even if i not in shown]
    found["even"] = left[:: max(1, len(left) // per_kind)][:per_kind] if left else []
    return {kind: tuple(ids) for kind, ids in found.items() if ids}


def pictures_of(run: Run, split: str = "test") -> list[Picture]:
    """Best, median and worst of the promoted model's captions and some at even distances, read from the run's shards.

    Empty when nothing was captioned, or when the shards are not on this machine any more.
    """
    said = {v: {r["image_id"]: r for r in run.predictions(split, v)} for v in run.variants(split)}
    speaker = next((v for v in PROMOTED if v in said), None)
    if speaker is None:
        return []
    references = {i: list(row["references"]) for i, row in said[speaker].items()}
    captions = {v: {i: row["caption"] for i, row in rows.items() if i in references} for v, rows in said.items()}
    scores = cider_by_image(captions, references, run.config.get("evaluate", {}).get("lang", "en"))
    chosen = choose(scores[speaker], list(captions.get(WORST) or references))
    return read_images(run, split, chosen, captions, references, scores)


def cider_by_image(
    captions: Mapping[str, Mapping[str, str]], references: Mapping[str, Sequence[str]], lang: str
) -> dict[str, dict[str, float]]:
    """Who -> image id -> CIDEr, document frequencies from all of `references`."""
    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.tokenise import quick_tokeniser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few images: the scores' own table has said so
        scorer = CiderScorer(references, quick_tokeniser(lang), lang=lang)
    found = {}
    for who, rows in captions.items():
        ids = [i for i in scorer.ids if i in rows]
        found[who] = dict(zip(ids, map(float, scorer.score(rows)[1]))) if ids else {}
    return found


def read_images(
    run: Run,
    split: str,
    chosen: Mapping[str, Sequence[str]],
    captions: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[str, float]],
) -> list[Picture]:
    """The chosen pictures as thumbnails from the run's shards, in the order of `chosen`; empty without the shards."""
    from raycap.data.parquet import is_shards_folder, open_shards

    folder = run.entry.get("data", {}).get("folder") or "-"
    if not is_shards_folder(folder):
        return []
    wanted = {i for ids in chosen.values() for i in ids}
    images: dict[str, bytes] = {}
    for row in open_shards(folder).iter_rows(split, ("image_id", "image")):
        if row["image_id"] in wanted:
            images[row["image_id"]] = thumbnail(row["image"]["bytes"])
            if len(images) == len(wanted):
                break
    return [
        Picture(
            image_id=i,
            image=images[i],
            references=list(references[i]),
            captions={who: rows[i] for who, rows in captions.items() if i in rows},
            kind=kind,
            scores={who: rows[i] for who, rows in scores.items() if i in rows},
        )
        for kind, ids in chosen.items()
        for i in ids
        if i in images
    ]


def write_pictures(folder: Path | str, pictures: Sequence[Picture]) -> Path:
    """plots/pictures/ and the list of them, so that the report can be made again without the data."""
    folder = Path(folder)
    rows: list[dict[str, Any]] = []
    for n, picture in enumerate(pictures):
        file = f"plots/pictures/{n:02d}.{'jpg' if is_jpeg(picture.image) else 'png'}"
        write_atomic(folder / file, picture.image)
        rows.append({"image_id": picture.image_id, "file": file, "kind": picture.kind, "references": picture.references,
                     "captions": picture.captions, "scores": picture.scores})  # fmt: skip
    return write_json(folder / PICTURES, rows)


def read_pictures(folder: Path | str) -> list[Picture]:
    """What `write_pictures` left; of a run of an earlier version without kinds and scores."""
    folder = Path(folder)
    if not (folder / PICTURES).is_file():
        return []
    return [
        Picture(
            image_id=row["image_id"],
            image=(folder / row["file"]).read_bytes(),
            references=row["references"],
            captions=row["captions"],
            kind=row.get("kind", ""),
            scores=row.get("scores", {}),
        )
        for row in read_json(folder / PICTURES)
        if (folder / row["file"]).is_file()
    ]


def is_jpeg(image: bytes) -> bool:
    return image[:2] == bytes((0xFF, 0xD8))


def thumbnail(image: bytes, longest_px: int = LONGEST_PX) -> bytes:
    """An encoded picture small enough for a report: as it is when it is small already, else a JPEG."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image)) as opened:
        if max(opened.size) <= longest_px and len(image) < KEPT_BYTES.get(opened.format or "", 0):
            return image
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((longest_px, longest_px))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()
