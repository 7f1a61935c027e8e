"""A model folder -> captions: how exported models are decoded by the gate, locally and behind HTTP alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raycap.config import Config

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from raycap.models.base import CaptionModel


class Captioner:
    """An exported model with its processor and decoding settings."""

    def __init__(self, model: CaptionModel, config: Config):
        self.model = model
        self.config = config

    @classmethod
    def load(cls, config: Config, folder: Path | str, *, device: str | None = None, threads: int = 0) -> Captioner:
        """Load a folder in the hub's layout (16-bit or NF4) to caption with `config.decode` under `config.data.prompt`.

        On a CPU it computes in fp32, so that a caption does not depend on what it was batched with.
        """
        import torch

        from raycap.models import load_model

        if threads:
            torch.set_num_threads(threads)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "fp32" if device == "cpu" else None
        # The folder says itself whether it is quantised; asking for NF4 here would quantise a merged model.
        model = load_model(
            config.model, config.data, path=folder, quantisation="none", compute_dtype=dtype, device=device,
            lang=config.evaluate.lang,
        )  # fmt: skip
        model.model.eval()
        return cls(model, config)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [3, H, W] as the model's processor resizes it, and as the shards' store holds it."""
        return self.model.family.resize(self.model.processor, image)

    def caption(self, pixels: Sequence[np.ndarray] | np.ndarray) -> list[str]:
        """Captions of uint8 images [N, 3, H, W], decoded `decode.batch` at a time."""
        import numpy as np
        import torch

        from raycap.models.decoding import for_batch

        cm, size = self.model, self.config.decode.batch
        captions: list[str] = []
        for begin in range(0, len(pixels), size):
            part = torch.from_numpy(np.stack([np.asarray(p) for p in pixels[begin : begin + size]]))
            values = cm.family.pixel_values(cm.processor, part).to(cm.device)
            decode = for_batch(self.config.decode, cm.processor, part.numpy())
            with torch.inference_mode():
                captions += cm.family.generate(cm, values, decode)
        return captions
