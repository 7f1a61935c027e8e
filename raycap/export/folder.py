"""A model folder that is whole: files, card, and a manifest of hashes that is written last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycap.errors import ModelError
from raycap.files import read_json, sha256_file, write_json

MANIFEST = "manifest.json"
SCHEMA = 1


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Record `facts` and the sha256 of every file in `folder`; a folder without this file is unfinished."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    hashes = {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}
    return write_json(folder / MANIFEST, {"schema": SCHEMA, **facts, "files": hashes})


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of an exported model folder.

    Raises:
        ModelError: there is no such folder, or it is unfinished, or its manifest is of another schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"{folder} has no {MANIFEST}: the export did not finish. Run it again.")
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        raise ModelError(f"{folder / MANIFEST} is not JSON ({error}). Export the model again.") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA or not isinstance(manifest.get("files"), dict):
        raise ModelError(f"{folder / MANIFEST} is of schema {schema!r}, expected {SCHEMA}. Export the model again.")
    return manifest


def verify(folder: Path | str) -> dict[str, Any]:
    """`read_manifest`, after every file it names was found with the hash it names (ModelError otherwise)."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{folder} lacks {name}, which its {MANIFEST} names. Export the model again.")
        if sha256_file(file) != expected:
            raise ModelError(f"{file} is not the file that was exported (its sha256 differs). Export the model again.")
    return manifest
