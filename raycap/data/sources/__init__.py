"""Sources of images and captions: one file each, one line in the registry.

A new source is a class with the shape of `base.Source`, built from `(settings, seed)`, and a static
`detect(path) -> bool`; nothing else in raycap needs to know of it.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import OPTIONAL, SPLITS, Rejected, Source, SourceRow
from raycap.errors import ConfigError, DataError, did_you_mean
from raycap.places import hint

__all__ = ["SOURCES", "SPLITS", "Rejected", "Source", "SourceRow", "detect", "open_source", "register"]

SOURCES: dict[str, str] = {}
"""Name -> "module:attribute", in the order in which `detect` asks them."""

BUILT_IN = ("shapes",)
"""Sources that `data.source` names; all others are recognised by what lies in the folder."""

_TABLES = (".jsonl", ".json", ".csv", ".parquet", ".xml")
_SHOWN_BYTES = 1 << 26
"""Up to this size a JSON file that no source knows is read to say what is wrong with it."""


def register(name: str, target: str) -> None:
    """Add a source; a name that is taken is refused."""
    if name in SOURCES:
        raise ConfigError(f"data source '{name}' is {SOURCES[name]} already; it cannot be {target} too")
    SOURCES[name] = target


register("shapes", "raycap.data.sources.shapes:Shapes")
register("captions_jsonl", "raycap.data.sources.captions_jsonl:CaptionsJsonl")
register("imagefolder", "raycap.data.sources.imagefolder:ImageFolder")
register("risc", "raycap.data.sources.risc:Risc")
register("iu_xray", "raycap.data.sources.iu_xray:IuXray")
register("karpathy", "raycap.data.sources.karpathy:Karpathy")
register("coco", "raycap.data.sources.coco:Coco")
register("hub", "raycap.data.sources.hub:HubDataset")
register("parquet", "raycap.data.sources.parquet_files:ParquetFiles")


def load_source(name: str) -> Any:
    """The class behind a registered name."""
    if name not in SOURCES:
        raise ConfigError(f"no data source '{name}'; {did_you_mean(name, SOURCES)}")
    module, attribute = SOURCES[name].split(":")
    return getattr(import_module(module), attribute)


def detect(path: Path | str) -> str:
    """Name of the source that `path` holds.

    Raises:
        ConfigError: `path` is neither a built-in source, nor anything that exists, nor of the form of a hub id.
        DataError: it exists, and no source knows its layout.
    """
    if str(path) in BUILT_IN:
        return str(path)
    place = Path(path).expanduser()
    if not place.exists():
        from raycap.data.sources.hub import is_hub_id

        if is_hub_id(str(path)):
            return "hub"
        near = did_you_mean(str(path), BUILT_IN) if len(place.parts) == 1 else "check the path."
        known = ", ".join(BUILT_IN)
        raise ConfigError(
            f"data.source={path} is neither a built-in set ({known}) nor a folder here; {near}{hint(path)}"
        )
    for name in SOURCES:
        if name not in BUILT_IN and load_source(name).detect(place):
            return name
    layouts = "; ".join(f"{name}: {load_source(name).layout}" for name in SOURCES if name not in BUILT_IN)
    raise DataError(
        f"data.source={path} is in no layout that raycap reads; it {_holds(place)}. Looked for: {layouts}. See docs/data.md."
    )


def open_source(settings: DataSettings, seed: int) -> Source:
    """Open `settings.source`: an iterable of SourceRow and Rejected that never raises for a single bad row.

    Raises:
        ConfigError: a setting that has no effect on this kind of source.
        DataError: the source as a whole cannot be read (naming the file, and what it lacks).
    """
    name = detect(settings.source)
    kind = load_source(name)
    defaults = DataSettings()
    for setting in OPTIONAL:
        value = getattr(settings, setting)
        if setting not in kind.uses and value != getattr(defaults, setting):
            raise ConfigError(
                f"data.{setting}={value} has no effect: data.source={settings.source} is read as '{name}'"
            )
    return kind(settings, seed)


def _holds(place: Path) -> str:
    if place.is_file():
        known = (name for name in SOURCES if name not in BUILT_IN and load_source(name).detect(place.parent))
        near = next(known, "") if place.suffix in _TABLES else ""
        more = f"; the folder that it lies in, {place.parent}, is read as '{near}': give that" if near else ""
        return f"is a file of {place.stat().st_size:,} bytes{_inside(place)}{more}"
    # What may hold captions first: a folder of ten thousand pictures says little.
    files = sorted(place.iterdir(), key=lambda p: (p.suffix not in _TABLES, p.name))
    names = [p.name + ("/" if p.is_dir() else _inside(p)) for p in files[:5]]
    more = f" and {len(files) - 5:,} more" if len(files) > 5 else ""
    return f"holds {', '.join(names)}{more}" if names else "is an empty folder"


def _inside(file: Path) -> str:
    """What a table holds, as far as a slip in it can be seen from that; "" for other files."""
    from raycap.data.sources.csv_table import csv_header

    if file.suffix == ".csv":
        return f" (columns {', '.join(csv_header(file)) or 'none'})"
    if file.suffix != ".json" or file.stat().st_size > _SHOWN_BYTES:
        return ""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f" (cannot be read as JSON: {error})"
    return f" (keys {', '.join(list(found)[:8])})" if isinstance(found, dict) else f" (a {type(found).__name__})"
