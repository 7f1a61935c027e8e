"""The layout of a shards folder, and reading it.

It holds `<split>-<number>.parquet`, `rejected.jsonl`, and `manifest.json`, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.data.sources.base import SPLITS
from raycap.errors import DataError, RunError
from raycap.storage import Storage, is_url, join, open_file, without_secret

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
ROW_GROUP_ROWS = 64
"""Rows that one task of the stream reads: few, so that the first ones arrive early."""


def schema(*, clip_scores: bool = False) -> pa.Schema:
    """Columns of a shard, with the note by which `datasets` reads `image` as pictures.

    `clip_scores` adds the CLIPScore of each caption, and `selected`, the index of the one with the highest.
    """
    import pyarrow as pa

    features = {
        "image_id": {"dtype": "string", "_type": "Value"},
        "image": {"_type": "Image"},
        "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        **{name: {"dtype": "string", "_type": "Value"} for name in ("split", "group", "lang", "source")},
        **{name: {"dtype": "int32", "_type": "Value"} for name in ("width", "height")},
        "sha256": {"dtype": "string", "_type": "Value"},
    }
    optional = []
    if clip_scores:
        features["clip_scores"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
        features["selected"] = {"dtype": "int32", "_type": "Value"}
        optional = [
            pa.field("clip_scores", pa.list_(pa.field("element", pa.float32()))),
            pa.field("selected", pa.int32()),
        ]
    fields = [
        pa.field("image_id", pa.string()),
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        # "element" is the name that parquet itself gives, so that what is read equals what was written.
        pa.field("captions", pa.list_(pa.field("element", pa.string()))),
        *(pa.field(name, pa.string()) for name in ("split", "group", "lang", "source")),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
        pa.field("sha256", pa.string()),
        *optional,
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


class Shards:
    """A finished shards folder. Rows of a split are numbered from 0 through its files in order."""

    def __init__(self, folder: Path | str, manifest: dict[str, Any]):
        self.folder = folder
        """A path, or the url of a storage as text."""
        self.manifest = manifest
        self.counts: dict[str, int] = manifest["counts"]
        self.splits: tuple[str, ...] = tuple(s for s in SPLITS if self.counts.get(s))
        self.content_sha256: str = manifest["content_sha256"]
        self.languages: dict[str, dict[str, int]] = manifest.get("languages", {})
        """Split -> language -> rows."""
        self.lang = ""
        """Rows in other languages are left out by whatever reads rows here; "" reads all (see `speaking`)."""
        self._references: dict[str, dict[str, list[str]]] = {}

    def speaking(self, lang: str, splits: Sequence[str] = SPLITS) -> Shards:
        """These shards, reading rows in `lang` alone: scores of two languages do not make one.

        Raises:
            DataError: one of `splits` has no row in it.
        """
        found = Shards(self.folder, self.manifest)
        for split in splits:
            have = self.languages.get(split)
            if have and lang not in have:
                named = ", ".join(f"{n:,} in '{other}'" for other, n in have.items())
                raise DataError(
                    f"{without_secret(self.folder)} has no captions in '{lang}' in split '{split}', but {named}: set "
                    "evaluate.lang to the language that is scored, or data.lang when preparing, where it was misread"
                )
        found.lang = lang
        return found

    def aside(self, splits: Sequence[str]) -> dict[str, int]:
        """Language -> rows of `splits` that are left out."""
        found: Counter[str] = Counter()
        for split in splits:
            found.update({lang: n for lang, n in self.languages.get(split, {}).items() if lang != self.lang})
        return dict(found) if self.lang else {}

    def langs(self, split: str) -> dict[str, str]:
        """Image id -> language of its captions, where `split` holds several; empty else."""
        if not self._several(split):
            return {}
        return {row["image_id"]: row["lang"] for row in self.iter_rows(split, ("image_id", "lang"))}

    def _several(self, split: str) -> bool:
        return len({lang for part in split.split("+") for lang in self.languages.get(part, {})}) > 1

    def files(self, split: str) -> list[Path | str]:
        """The split's shards, in row order: paths, or urls in a storage. `train+val` is one split after the other."""
        parts = split.split("+")
        for part in parts:
            self._check(part)
        return [_file(self.folder, f["name"]) for part in parts for f in self.manifest["files"] if f["split"] == part]

    def row_groups(self, split: str) -> list[dict[str, Any]]:
        """Where the rows lie: {file, row_group, offset (row of the split), rows, resized_for}, from the footers alone.

        `resized_for` is the hash of the processor that the images were resized by, empty for originals.
        """
        import pyarrow.parquet as pq

        groups, offset = [], 0
        resized_for = (self.manifest.get("store") or {}).get("processor", "")
        for file in self.files(split):
            try:
                with open_file(file) as opened:
                    footer = pq.read_metadata(opened)
            except Exception as error:
                raise DataError(damaged(file, None, error)) from error
            for number in range(footer.num_row_groups):
                rows = footer.row_group(number).num_rows
                place = file if is_url(file) else str(Path(file).resolve())
                found = {"file": place, "row_group": number, "offset": offset, "rows": rows}
                groups.append({**found, "resized_for": resized_for})
                offset += rows
        return groups

    def iter_rows(self, split: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the split in order, as dicts of the schema's columns (or `columns`), with `row` added."""
        filtered = bool(self.lang) and self._several(split)
        wanted = [*columns, "lang"] if filtered and columns and "lang" not in columns else columns
        for group in self.row_groups(split):
            for row in read_row_group(group, wanted):
                if not filtered or row["lang"] == self.lang:
                    yield row if wanted is columns else {k: v for k, v in row.items() if k != "lang"}

    def read_rows(self, split: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows of the split at once; `image` is {"bytes", "path"}."""
        return list(self.iter_rows(split, columns))

    def references(self, split: str) -> dict[str, list[str]]:
        """Image id -> captions, in row order."""
        if split not in self._references:
            rows = self.iter_rows(split, ("image_id", "captions"))
            self._references[split] = {row["image_id"]: row["captions"] for row in rows}
        return self._references[split]

    def groups(self, split: str) -> dict[str, str]:
        """Image id -> the group that a bootstrap draws as one."""
        return {row["image_id"]: row["group"] for row in self.iter_rows(split, ("image_id", "group"))}

    def clip_scores(self, split: str) -> dict[str, tuple[list[float], int]] | None:
        """Image id -> (CLIPScore of each caption, index of the chosen one); None where `prepare` did not score."""
        if "clip_scores" not in self.manifest:
            return None
        rows = self.iter_rows(split, ("image_id", "clip_scores", "selected"))
        return {row["image_id"]: (row["clip_scores"], row["selected"]) for row in rows}

    def constant_caption(self) -> str:
        """The most frequent training caption; of several, the first in alphabetical order."""
        return self._constant_caption

    @cached_property
    def _constant_caption(self) -> str:
        counts = Counter(caption for captions in self.references("train").values() for caption in captions)
        return min(counts, key=lambda caption: (-counts[caption], caption))

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's hashes.

        Raises:
            DataError: a shard differs from what `prepare` wrote.
        """
        for entry in self.manifest["files"]:
            file = _file(self.folder, entry["name"])
            with open_file(file) as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise DataError(f"{without_secret(file)} is not what `prepare` wrote: its hash differs. {_REDO}")

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise DataError(
                f"{without_secret(self.folder)} has no rows in split '{split}'; it has {', '.join(self.splits)}"
            )


_REDO = "Remove the folder and prepare again."


def open_shards(folder: Path | str) -> Shards:
    """Open a folder that `prepare` finished; sizes of all shards are checked, contents are not (see `Shards.verify`).

    Raises:
        DataError: no manifest (unfinished), another schema, or a shard that is missing or cut.
    """
    said = without_secret(folder)
    storage = Storage.open(folder)
    folder = storage.local or str(folder)
    try:
        raw = storage.get(MANIFEST)
        manifest = None if raw is None else json.loads(raw)
    except (RunError, ValueError) as error:
        raise DataError(f"{said}/{MANIFEST} cannot be read: {error}. {_REDO}") from error
    if raw is None:
        raise DataError(f"{said} has no {MANIFEST}: it is not a shards folder, or `prepare` did not finish it. "
                        "Run `raycap prepare` again.")  # fmt: skip
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{said}/{MANIFEST} has schema version {found}, this raycap reads {SCHEMA_VERSION}. {_REDO}")
    for entry in manifest["files"]:
        size = storage.size(entry["name"])
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, the manifest says {entry['bytes']}"
            raise DataError(f"shard {said}/{entry['name']} {found}. {_REDO}")
    return Shards(folder, manifest)


def is_shards_folder(place: Path | str) -> bool:
    """Whether the path or url `place` holds a manifest of shards (finished)."""
    storage = Storage.open(place)
    return storage.has(MANIFEST) and any("-" in file and file.endswith(".parquet") for file in storage.files())


def _file(folder: Path | str, name: str) -> Path | str:
    return join(folder, name) if is_url(folder) else Path(folder) / name


def read_row_group(group: dict[str, Any], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one descriptor of `Shards.row_groups`, with `row` added.

    Raises:
        DataError: the row group cannot be read, naming file and row group.
    """
    import pyarrow.parquet as pq

    try:
        with open_file(group["file"]) as opened, pq.ParquetFile(opened) as file:
            table = file.read_row_group(group["row_group"], columns=list(columns) if columns else None)
            rows = table.to_pylist()
    except FileNotFoundError as error:
        raise DataError(
            f"shard {without_secret(group['file'])} is not there on node {socket.gethostname()}. Put data.source or "
            "run.cache_dir on a path that every node of the cluster sees, or set run.storage."
        ) from error
    except Exception as error:
        # pyarrow raises ArrowInvalid, OSError, and others, for damaged bytes.
        raise DataError(damaged(group["file"], group["row_group"], error)) from error
    if len(rows) != group["rows"]:
        raise DataError(damaged(group["file"], group["row_group"], f"{len(rows)} rows, expected {group['rows']}"))
    for i, row in enumerate(rows):
        row["row"] = group["offset"] + i
        row["resized_for"] = group.get("resized_for", "")
    return rows


def damaged(file: Path | str, row_group: int | None, error: object) -> str:
    """The sentence for a shard that cannot be read."""
    file = without_secret(file)
    place = "its footer" if row_group is None else f"row group {row_group}"
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return f"shard {file}, {place}, is damaged ({kind}{' '.join(str(error).split())}). {_REDO}"
