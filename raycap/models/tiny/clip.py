"""A tiny CLIP of random weights in open_clip's layout: what it finds alike means nothing, how it is used is the real way."""

from __future__ import annotations

from pathlib import Path

from raycap.files import write_json

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


def build_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write the model into `folder`; its weights depend on `seed` alone."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = open_clip.CLIP(**TINY_CLIP["model_cfg"]).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", TINY_CLIP)
    return folder
