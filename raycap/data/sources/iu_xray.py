"""IU X-Ray (Open-i): chest X-rays with reports, as XML reports beside PNGs, or as R2Gen's `annotation.json`.

Layout of the XML (NLMCXR_reports.tgz, ecgen-radiology/<n>.xml), as read in several parsers of it and a test that mirrors
a report: <eCitation> with <uId id="CXR7"/>, <AbstractText Label="FINDINGS"> and Label="IMPRESSION" (either may be empty
or missing), and a <parentImage id="CXR7_IM-2263-1001"> for each view, whose picture is CXR7_IM-2263-1001.png
(NLMCXR_png.tgz). No splits: they are drawn by study.

Layout of annotation.json, as read in cuhksz-nlp/R2Gen's users, who quote its first entries: {"train": [{"id":
"CXR2384_IM-0942", "report": "...", "image_path": ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"], "split": "train"},
...], "val": [...], "test": [...]} beside images/. Its reports are the findings alone, its splits are kept.

Each view is a row; those of a study share a group, so that no split and no bootstrap draw tears them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected, canonical_split
from raycap.data.sources.columns import short
from raycap.data.sources.table import (
    Record,
    TableSource,
    image_places,
    json_files,
    outside_error,
    read_json_object,
)
from raycap.errors import ConfigError, DataError

ANNOTATION = "annotation.json"
REPORTS = "ecgen-radiology"
_SECTIONS = {"findings": ("FINDINGS",), "impression": ("IMPRESSION",), "both": ("FINDINGS", "IMPRESSION")}
_STUDY = re.compile(r"^CXR\d+")
_SNIFFED_BYTES = 1 << 16


class IuXray(TableSource):
    """Report text as the caption of every view of its study."""

    layout = (
        f"IU X-Ray: {REPORTS}/ with Open-i's XML reports beside PNGs, or R2Gen's {ANNOTATION} ('image_path', 'report') "
        "beside images/"
    )
    uses = frozenset({"images", "lang", "report"})

    def __init__(self, settings: DataSettings, seed: int):
        super().__init__(settings, seed)
        self.places = tuple(dict.fromkeys(place for base in self._bases for place in image_places(base)))
        self._annotation = _annotation(self.path)
        if self._annotation and settings.report not in ("auto", "findings"):
            raise ConfigError(
                f"data.report={settings.report}: {self._annotation} holds the findings alone; give the folder with "
                "Open-i's XML reports, or leave data.report away"
            )

    @staticmethod
    def detect(path: Path) -> bool:
        return _annotation(path) is not None or bool(_reports(path))

    def table_files(self) -> list[Path]:
        return [self._annotation] if self._annotation else _reports(self.path)

    def records(self) -> Iterator[Record | Rejected]:
        if self._annotation:
            yield from self._annotated(self._annotation)
            return
        for file in self.table_files():
            yield from self._report(file)

    def _report(self, file: Path) -> Iterator[Record | Rejected]:
        where = file.relative_to(self.root).as_posix()
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            yield Rejected("", f"{where}:{error.position[0]}", "not-xml", str(error))
            return
        uid = root.find(".//uId")
        study = (uid.get("id", "") if uid is not None else "").strip() or f"report-{file.stem}"
        said = {
            (section.get("Label") or "").strip().upper(): " ".join("".join(section.itertext()).split())
            for section in root.iter("AbstractText")
        }
        wanted = _SECTIONS["both" if self.settings.report == "auto" else self.settings.report]
        caption = " ".join(said[label] for label in wanted if said.get(label))
        views = [v for view in root.iter("parentImage") if (v := (view.get("id") or "").strip())]
        if not views:
            yield Rejected(study, where, "image-not-named", "the report names no <parentImage id=...>")
        for view in dict.fromkeys(views):
            if (outside := outside_error(view)) is not None:
                yield Rejected(view, where, "image-outside", outside)
            elif not caption:
                have = ", ".join(label for label, words in said.items() if words) or "none"
                error = f"no text under <AbstractText Label={' or '.join(wanted)}>; sections with text: {have}"
                yield Rejected(view, where, "no-captions", error)
            else:
                yield Record(f"{view}.png", [caption], where, image_id=view, group=study)

    def _annotated(self, file: Path) -> Iterator[Record | Rejected]:
        for name, studies in read_json_object(file).items():
            split = canonical_split(name)
            if not isinstance(studies, list) or not split:
                raise DataError(
                    f"{file}: key '{name}' holds {short(studies)}; expected train, val and test, each a list"
                )
            for number, study in enumerate(studies):
                yield from self._study(study, split, f"{file.name}: {name}[{number}]")

    def _study(self, study: Any, split: str, where: str) -> Iterator[Record | Rejected]:
        if not isinstance(study, dict):
            yield Rejected("", where, "not-an-object", f"{short(study)}, expected an object with report and image_path")
            return
        name, report, views = str(study.get("id") or ""), study.get("report"), study.get("image_path")
        views = [views] if isinstance(views, str) else views
        if not isinstance(views, list) or not views or not all(isinstance(v, str) and v for v in views):
            error = f"'image_path' is {'missing' if views is None else short(views)}, expected a list of paths"
            yield Rejected(name, where, "image-not-named", error)
            return
        number = _STUDY.match(name)
        for view in views:
            if (outside := outside_error(view)) is not None:
                yield Rejected(view, where, "image-outside", outside)
            elif not isinstance(report, str):
                error = f"'report' is {'missing' if report is None else short(report)}, expected a text"
                yield Rejected(view, where, "captions-not-text", error)
            else:
                yield Record(view, [report], where, view, split=split, group=number.group() if number else name)


def _annotation(path: Path) -> Path | None:
    if path.is_file() or (path / ANNOTATION).is_file():
        file = path if path.is_file() else path / ANNOTATION
        return next(iter(json_files(file, ("image_path", "report"))), None)
    return None


def _reports(path: Path) -> list[Path]:
    """Open-i's reports in the folder, or in ecgen-radiology/ in it or one folder below, by number."""
    if path.is_file():
        return []
    for place in ("", REPORTS, f"*/{REPORTS}"):
        folders = sorted(path.glob(place)) if "*" in place else [path / place]
        files = [f for folder in folders for f in folder.glob("*.xml")]
        if files and _is_report(min(files)):
            return sorted(files, key=lambda f: (len(f.stem), f.stem))
    return []


def _is_report(file: Path) -> bool:
    with open(file, "rb") as raw:
        head = raw.read(_SNIFFED_BYTES)
    return b"eCitation" in head or b"AbstractText" in head
