"""What all kinds of drawn pictures share."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

Rgb = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture of a drawn set; `views` are the other pictures of the same thing that share its captions."""

    image: Image.Image
    captions: tuple[str, ...]
    views: tuple[Image.Image, ...] = ()


def clouds(rng: random.Random, size: tuple[int, int], base: Rgb, strength: int, cells: int = 5) -> Image.Image:
    """`base` with soft random light and shade, so that no two pictures look alike by chance."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-strength, strength + 1, (cells, cells))
    light = Image.fromarray((noise + 128).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(light, dtype=np.int16)[..., None] - 128 + np.array(base, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shade(rng: random.Random, rgb: Rgb, by: int = 18) -> Rgb:
    red, green, blue = (min(255, max(0, c + rng.randint(-by, by))) for c in rgb)
    return red, green, blue
