"""Sources of images and captions: one file each, one line in the registry.

A new source is a class with the shape of `base.Source`, built from `(settings, seed)`, and a static
`detect(path) -> bool`; nothing else in raycap needs to know of it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import SPLITS, Rejected, Source, SourceRow
from raycap.errors import ConfigError, DataError, did_you_mean

__all__ = ["SOURCES", "SPLITS", "Rejected", "Source", "SourceRow", "detect", "open_source", "register"]

SOURCES: dict[str, str] = {}
"""Name -> "module:attribute", in the order in which `detect` asks them."""

BUILT_IN = ("shapes",)
"""Sources that `data.source` names; all others are recognised by what lies in the folder."""


def register(name: str, target: str) -> None:
    """Add a source; a name that is taken is refused."""
    if name in SOURCES:
        raise ConfigError(f"data source '{name}' is {SOURCES[name]} already; it cannot be {target} too")
    SOURCES[name] = target


register("shapes", "raycap.data.sources.shapes:Shapes")
register("captions_jsonl", "raycap.data.sources.captions_jsonl:CaptionsJsonl")
register("imagefolder", "raycap.data.sources.imagefolder:ImageFolder")


def load_source(name: str) -> Any:
    """The class behind a registered name."""
    if name not in SOURCES:
        raise ConfigError(f"no data source '{name}'; {did_you_mean(name, SOURCES)}")
    module, attribute = SOURCES[name].split(":")
    return getattr(import_module(module), attribute)


def detect(path: Path | str) -> str:
    """Name of the source that `path` holds.

    Raises:
        ConfigError: `path` is neither a built-in source nor anything that exists.
        DataError: it exists, and no source knows its layout.
    """
    if str(path) in BUILT_IN:
        return str(path)
    folder = Path(path).expanduser()
    if not folder.exists():
        near = did_you_mean(str(path), BUILT_IN) if len(folder.parts) == 1 else "check the path."
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"data.source={path} is neither a built-in set ({known}) nor a folder here; {near}")
    for name in SOURCES:
        if name not in BUILT_IN and load_source(name).detect(folder):
            return name
    layouts = "; ".join(f"{name}: {load_source(name).layout}" for name in SOURCES if name not in BUILT_IN)
    raise DataError(f"data.source={path} is in no layout that raycap reads. It reads: {layouts}. See docs/data.md.")


def open_source(settings: DataSettings, seed: int) -> Source:
    """Open `settings.source`: an iterable of SourceRow and Rejected that never raises for a single bad row.

    Raises:
        DataError: the source as a whole cannot be read (naming the file, and what it lacks).
    """
    return load_source(detect(settings.source))(settings, seed)
