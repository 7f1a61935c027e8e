"""Parquet with a column of images: what hub data sets ship, Pokémon BLIP captions among them.

Layout of Pokémon BLIP captions, as read on the hub (reach-vb/pokemon-blip-captions: its file list, its dataset_infos.json
and its card): `data/train-00000-of-00001-566cc9b19d7203f8.parquet` with `image` (the `datasets.Image` layout, a struct of
bytes and path) and `text`, 833 rows, all of them train. The naming `<split>-<part>-of-<parts>` and the struct are
`datasets`' own (its documents on parquet and on images).

The split is a column, or stands in the files' names, or in their folders'; where all files name the same one, that says
nothing, and splits are drawn (`data.splits=560,70,70` takes 700 of the 833).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import (
    Rejected,
    SourceRow,
    canonical_split,
    images_folder,
    language_of,
    source_root,
    split_in_name,
)
from raycap.data.sources.columns import checked_columns, require_columns
from raycap.data.sources.embedded import embedded_row, first_captions, wanted_columns
from raycap.data.sources.table import find_licence
from raycap.errors import DataError

_BATCH_ROWS = 32
_JUDGED_ROWS = 200


class ParquetFiles:
    """One row of the table is one image; rows are read a batch at a time."""

    layout = "*.parquet with an image column, in the folder or one below (data/, train/, ...)"
    uses = frozenset({"columns", "images", "lang"})

    def __init__(self, settings: DataSettings, seed: int):
        path = Path(settings.source).expanduser()
        self.settings, self.root, self.files = settings, source_root(settings), _files(path)
        self.title = path.resolve().stem if path.is_file() else path.resolve().name
        self.columns = checked_columns(settings)
        images = images_folder(settings)
        self._roots = [*([images] if images else []), self.root]
        splits = {file: _split(file, self.root) for file in self.files}
        self._splits = splits if len(set(splits.values())) > 1 else dict.fromkeys(self.files, "")

    @staticmethod
    def detect(path: Path) -> bool:
        return bool(_files(path))

    @cached_property
    def licence(self) -> str:
        return find_licence(self.root)

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def __iter__(self) -> Iterator[SourceRow | Rejected]:
        for file in self.files:
            for number, fields in self._rows(file):
                name = file.relative_to(self.root).as_posix()
                yield embedded_row(
                    fields,
                    f"{name}: row {number}",
                    columns=self.columns,
                    row_id=f"{file.stem}-{number:06d}",
                    split=self._splits[file],
                    lang=self._lang,
                    title=self.title,
                    roots=self._roots,
                )

    def fingerprint(self) -> str:
        """Hash of each file's name, size, time of change and footer (row counts and statistics)."""
        digest = hashlib.sha256()
        for file in self.files:
            stat, footer = file.stat(), self._open(file).metadata
            name = file.relative_to(self.root).as_posix()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{footer.to_dict()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _lang(self) -> str:
        if self.settings.lang:
            return self.settings.lang
        rows = (fields for file in self.files for _, fields in self._rows(file, captions_only=True))
        return language_of(c for fields in islice(rows, _JUDGED_ROWS) for c in first_captions(fields, self.columns))

    def _rows(self, file: Path, captions_only: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        table = self._open(file)
        have = table.schema_arrow.names
        require_columns(str(file), have, self.columns)
        wanted = wanted_columns(have, self.columns)
        if captions_only:
            picture = self.columns.get("image")
            wanted = [n for n in wanted if n not in ((picture,) if picture else ("image", "file_name"))]
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                for fields in batch.to_pylist():
                    yield number, fields
                    number += 1
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            raise DataError(f"{file}, after row {number}: damaged ({' '.join(str(error).split())})") from error

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not parquet, or is cut: {' '.join(str(error).split())}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))


def _split(file: Path, root: Path) -> str:
    return split_in_name(file.stem) or (canonical_split(file.parent.name) or "" if file.parent != root else "")
