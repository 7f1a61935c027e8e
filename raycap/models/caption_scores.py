"""CLIPScores of captions for `prepare`, which chooses one an image by them (data.captions)."""

from __future__ import annotations

from typing import Any

from raycap.models.clip_score import WEIGHT, shared


class CaptionScorer:
    """CLIPScore of each caption with its image: 2.5 * max(cosine, 0) (Hessel et al. 2021).

    Picklable; the CLIP is loaded once a process, when it is first asked.
    """

    def __init__(self, model: str):
        self.model = model

    def __call__(self, images: list[bytes], captions: list[list[str]]) -> list[list[float]]:
        cosines, _ = shared(self.model).cosines(images, captions)
        return [[WEIGHT * max(float(c), 0.0) for c in row] for row in cosines]

    def describe(self) -> dict[str, Any]:
        return {"model": shared(self.model).name, "weight": WEIGHT}
