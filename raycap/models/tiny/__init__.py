"""Tiny models by family: random weights of the same transformers classes as the real ones, in the hub's layout."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from raycap.errors import ConfigError, did_you_mean

TWINS: dict[str, str] = {
    "git": "raycap.models.tiny.twins:git",
    "blip": "raycap.models.tiny.twins:blip",
    "generic": "raycap.models.tiny.twins:generic",
    "clip_llama": "raycap.models.tiny.twins:clip_llama",
    "paligemma": "raycap.models.tiny.twins:paligemma",
    "paligemma:2": "raycap.models.tiny.twins:paligemma2",
    "qwen2_vl": "raycap.models.tiny.twins:qwen2_vl",
    "qwen2_vl:2.5": "raycap.models.tiny.twins:qwen2_5_vl",
}
"""Family, or family:variant -> builder(folder, captions, dropout)."""


def build_twin(
    name: str, folder: Path | str, *, captions: Iterable[str] = (), dropout: float = 0.0, seed: int = 0
) -> Path:
    """Write a tiny model of family `name` ("family" or "family:variant") into `folder`; seconds on a CPU.

    Words of `captions` become whole tokens where the vocabulary has room. `dropout` is the base's own. Weights depend
    on `seed` alone, and are large enough that every module matters.

    Raises:
        ConfigError: there is no such twin.
    """
    if name not in TWINS:
        raise ConfigError(f"there is no tiny model of '{name}'; {did_you_mean(name, TWINS)}")
    import torch

    module, _, attribute = TWINS[name].partition(":")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(import_module(module), attribute)(folder, list(captions), dropout)
    return folder


def twin_note(path: Path | str) -> str:
    """What is to be said of every score of the model in `path`: something where it is a fitted twin, else ""."""
    from raycap.files import read_json
    from raycap.models.tiny.fit import NOTE

    file = Path(path).expanduser() / NOTE
    return str(read_json(file)["note"]) if file.is_file() else ""
