"""States of a pack's slots on disk: one safetensors and one JSON a trial, the manifest last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raycap.errors import ModelError
from raycap.files import atomic_folder, read_json, write_json

KINDS = ("value", "m", "v", "best")


def save(folder: Path | str, states: dict[str, dict[str, Any]]) -> Path:
    """Write `states` (PackEngine.state of each trial) as one folder, whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        for trial_id, state in states.items():
            tensors: dict[str, torch.Tensor] = {}
            for kind in KINDS:
                for name, (a, b) in (state.get(kind) or {}).items():
                    tensors[f"{kind}/{name}/A"] = a.detach().cpu().contiguous()
                    tensors[f"{kind}/{name}/B"] = b.detach().cpu().contiguous()
            save_file(tensors, temporary / f"{trial_id}.safetensors")
            plain = {k: v for k, v in state.items() if k not in KINDS}
            plain["best_score"] = None if plain["best_score"] == float("-inf") else plain["best_score"]
            write_json(temporary / f"{trial_id}.json", plain)
        write_json(temporary / "manifest.json", {"trials": sorted(states)})
    return folder


def load(folder: Path | str) -> dict[str, dict[str, Any]]:
    """The inverse of `save`.

    Raises:
        ModelError: the folder is unfinished or damaged.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    states = {}
    try:
        for trial_id in read_json(folder / "manifest.json")["trials"]:
            state: dict[str, Any] = {kind: {} for kind in KINDS}
            state.update(read_json(folder / f"{trial_id}.json"))
            state["best_score"] = float("-inf") if state["best_score"] is None else state["best_score"]
            tensors = load_file(folder / f"{trial_id}.safetensors")
            for key, a in tensors.items():
                kind, _, rest = key.partition("/")
                name, _, half = rest.rpartition("/")
                if half == "A":
                    state[kind][name] = (a, tensors[f"{kind}/{name}/B"])
            states[trial_id] = state
    except Exception as error:
        raise ModelError(f"the checkpoint in {folder} cannot be read ({type(error).__name__}: {error})") from error
    return states
