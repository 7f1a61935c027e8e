"""A `datasets` data set: one of the hub by its id, or a folder that `save_to_disk` wrote.

Layout of the folder, as `datasets` 5.2 writes it (Dataset.save_to_disk, DatasetDict.save_to_disk): `dataset_info.json`,
`state.json` and `data-00000-of-00001.arrow`; of several splits, `dataset_dict.json` and such a folder a split.

Nothing of a data set is run: `datasets` reads files, and no loading script.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected, SourceRow, canonical_split, images_folder, language_of
from raycap.data.sources.columns import checked_columns, require_columns
from raycap.data.sources.embedded import embedded_row, first_captions, wanted_columns
from raycap.data.sources.table import find_licence
from raycap.errors import DataError
from raycap.places import hint

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+?)(@(?P<revision>[\w./-]+))?(:(?P<configuration>[\w.-]+))?")
_JUDGED_ROWS = 200


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name[@revision][:configuration]."""
    return HUB_ID.fullmatch(source) is not None


class HubDataset:
    """Its splits are kept; one alone (`train`) says nothing, and splits are drawn."""

    layout = "a folder written by datasets' save_to_disk (dataset_dict.json, or dataset_info.json and state.json)"
    uses = frozenset({"columns", "images", "lang"})

    def __init__(self, settings: DataSettings, seed: int):
        self.settings = settings
        path = Path(settings.source).expanduser()
        self.title = path.resolve().name if path.exists() else settings.source.partition(":")[0].partition("@")[0]
        self.columns = checked_columns(settings)
        images = images_folder(settings)
        self._roots = [*([images] if images else []), *([path] if path.is_dir() else [])]
        self._folder = path if path.is_dir() else None

    @staticmethod
    def detect(path: Path) -> bool:
        return (path / "dataset_dict.json").is_file() or all(
            (path / name).is_file() for name in ("dataset_info.json", "state.json")
        )

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Name -> datasets.Dataset, images left encoded."""
        import datasets

        found = self._load(datasets)
        parts = dict(found) if isinstance(found, Mapping) else {"": found}
        unknown = [name for name in parts if canonical_split(name) is None]
        if unknown and len(parts) > 1:
            raise DataError(
                f"{self.title} has the splits {', '.join(parts)}; raycap knows train, val and test. Save the ones you mean "
                "under these names (datasets.DatasetDict.save_to_disk)."
            )
        ready = {}
        for name, part in parts.items():
            require_columns(f"{self.title} ({name or 'all rows'})", part.column_names, self.columns)
            part = part.select_columns(wanted_columns(part.column_names, self.columns))
            for column, feature in part.features.items():
                if isinstance(feature, datasets.Image):
                    part = part.cast_column(column, datasets.Image(decode=False))
            ready[name] = part
        return ready

    def _load(self, datasets: Any) -> Any:
        try:
            if self._folder is not None:
                return datasets.load_from_disk(str(self._folder))
            named = HUB_ID.fullmatch(self.settings.source)
            return datasets.load_dataset(named["id"], named["configuration"], revision=named["revision"])
        except Exception as error:
            # datasets and huggingface_hub raise OSError, ValueError, their own and pyarrow's errors.
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self._folder is not None:
                raise DataError(f"{self._folder} cannot be read as a data set of save_to_disk ({said})") from error
            raise DataError(
                f"data.source={self.settings.source}: there is no such folder here, and the hub does not give a data set "
                f"of this id ({said}).{hint(self.settings.source)}"
            ) from error

    @cached_property
    def licence(self) -> str:
        if self._folder is not None and (stated := find_licence(self._folder)) != "not stated":
            return stated
        info = getattr(next(iter(self.splits.values())), "info", None)
        return getattr(info, "license", "") or "not stated"

    def __len__(self) -> int:
        return sum(len(part) for part in self.splits.values())

    def __iter__(self) -> Iterator[SourceRow | Rejected]:
        for name, part in self.splits.items():
            split = canonical_split(name) if len(self.splits) > 1 else ""
            for number, fields in enumerate(part):
                yield embedded_row(
                    fields,
                    f"{name or 'rows'}: row {number}",
                    columns=self.columns,
                    row_id=f"{name or 'row'}-{number:06d}",
                    split=split or "",
                    lang=self._lang,
                    title=self.title,
                    roots=[*self._roots, *_caches()],
                )

    def fingerprint(self) -> str:
        """Hash of the splits' names, lengths, features, and of their files' names and sizes.

        `datasets` names a downloaded file's folder by its revision's hash.
        """
        digest = hashlib.sha256()
        for name, part in self.splits.items():
            digest.update(f"{name}\0{len(part)}\0{part.features}\n".encode())
            for file in part.cache_files:
                stat = Path(file["filename"]).stat()
                digest.update(f"{Path(file['filename']).name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _lang(self) -> str:
        if self.settings.lang:
            return self.settings.lang
        picture = self.columns.get("image")
        pictures = (picture,) if picture else ("image", "file_name")
        part = next(iter(self.splits.values()))
        part = part.select_columns([n for n in part.column_names if n not in pictures])
        return language_of(c for fields in islice(part, _JUDGED_ROWS) for c in first_captions(fields, self.columns))


def _caches() -> list[Path]:
    """Where `datasets` keeps the files of a downloaded set, whose rows hold paths into it."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
