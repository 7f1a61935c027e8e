"""States of a pack's slots on disk: one safetensors and one JSON a trial, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch

from raycap.errors import ModelError
from raycap.files import atomic_folder, read_json, write_json

_CONTIGUOUS = torch.contiguous_format
TENSORS = ("value", "m", "v", "best")
"""Parts of a state that are {module path: (A, B)}, or more tensors where an adapter has them; the rest is plain."""


def apart(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state (PackEngine.state) as tensors by name, on the CPU, and what is plain in it."""
    tensors: dict[str, torch.Tensor] = {}
    for kind in TENSORS:
        for path, found in (state[kind] or {}).items():
            for name, tensor in zip(ascii_uppercase, found):
                # A copy: the best weights may be the present ones, and safetensors refuses shared memory.
                tensors[f"{kind}/{path}/{name}"] = tensor.detach().cpu().clone(memory_format=_CONTIGUOUS)
    return tensors, {k: v for k, v in state.items() if k not in TENSORS}


def together(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `apart`."""
    state: dict[str, Any] = {**plain, **{kind: {} for kind in TENSORS}}
    for key in tensors:
        kind, _, path = key.removesuffix("/A").partition("/")
        if key.endswith("/A"):
            names = (f"{kind}/{path}/{letter}" for letter in ascii_uppercase)
            state[kind][path] = tuple(tensors[n] for n in takewhile(tensors.__contains__, names))
    state["best"] = state["best"] or None
    return state


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """As a safetensors file holds them."""
    from safetensors.torch import save

    return save(dict(tensors))


def from_bytes(data: bytes) -> dict[str, torch.Tensor]:
    """The inverse of `to_bytes`."""
    from safetensors.torch import load

    return load(data)


def save(folder: Path | str, states: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `states` (trial id -> PackEngine.state) as one folder, whole or not at all."""
    with atomic_folder(folder) as temporary:
        for trial_id, state in states.items():
            tensors, plain = apart(state)
            # Not by save_file, which hides a full disk behind an error of its own.
            (temporary / f"{trial_id}.safetensors").write_bytes(to_bytes(tensors))
            write_json(temporary / f"{trial_id}.json", plain)
        write_json(temporary / "manifest.json", {"trials": list(states)})
    return Path(folder)


def load(folder: Path | str) -> dict[str, dict[str, Any]]:
    """The inverse of `save`, in the order of saving.

    Raises:
        ModelError: the folder is unfinished or damaged.
    """
    from safetensors.torch import load_file

    folder, states = Path(folder), {}
    try:
        for trial_id in read_json(folder / "manifest.json")["trials"]:
            tensors = load_file(folder / f"{trial_id}.safetensors")
            states[trial_id] = together(tensors, read_json(folder / f"{trial_id}.json"))
    except Exception as error:
        raise ModelError(f"the checkpoint {folder} cannot be read ({type(error).__name__}: {error})") from error
    return states
