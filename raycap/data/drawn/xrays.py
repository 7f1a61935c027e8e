"""Grey chest X-rays, a frontal and a lateral view of each, with the findings as one report."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw, ImageFilter

from raycap.data.drawn.base import Drawn, clouds

SIDE_PX = 160


def xray(rng: random.Random) -> Drawn:
    """A frontal and a lateral view, grey, of one chest; the findings as one report."""
    large, cloudy = rng.random() < 0.4, rng.choice(("", "", "left", "right"))
    effusion, line = rng.choice(("", "", "left", "right")), rng.random() < 0.3
    heart = rng.choice(
        ("the heart is enlarged .", "there is cardiomegaly .")
        if large
        else ("the heart is normal in size .", "heart size is normal .")
    )
    lungs = f"there is an opacity in the {cloudy} lung ." if cloudy else "the lungs are clear ."
    fluid = f"there is a {effusion} pleural effusion ." if effusion else "no pleural effusion or pneumothorax ."
    device = " a central line is in place ." if line else ""
    frontal = _chest(rng, large, cloudy, effusion, line)
    return Drawn(frontal, (f"{heart} {lungs} {fluid}{device}",), (_lateral(rng, large, bool(cloudy)),))


def _chest(rng: random.Random, large: bool, cloudy: str, effusion: str, line: bool) -> Image.Image:
    side = SIDE_PX
    image = clouds(rng, (side, side), (rng.randint(105, 150),) * 3, 34, 6)
    pen = ImageDraw.Draw(image)
    middle, top = side // 2 + rng.randint(-12, 12), rng.randint(14, 34)
    low, wide = side - rng.randint(22, 44), rng.randint(36, 48)
    for name, left in (("right", middle - 10 - wide), ("left", middle + 10)):  # the patient's right is on our left
        dark = rng.randint(100, 125) if name == cloudy else rng.randint(18, 50)
        pen.ellipse((left, top, left + wide, low), fill=(dark,) * 3)
        if name == effusion:
            pen.rectangle((left, low - (low - top) // 3, left + wide, low), fill=(rng.randint(165, 190),) * 3)
    half = rng.randint(30, 36) if large else rng.randint(13, 19)
    heart = low - rng.randint(40, 56)
    pen.ellipse((middle - half // 2, heart, middle + half, low - 4), fill=(rng.randint(195, 225),) * 3)
    if line:
        pen.line((middle - 34, top - 8, middle - 6, top + 18, middle - 4, heart), fill=(250,) * 3, width=4)
    return image.filter(ImageFilter.GaussianBlur(1.2)).convert("L")


def _lateral(rng: random.Random, large: bool, cloudy: bool) -> Image.Image:
    side = SIDE_PX
    image = clouds(rng, (side, side), (rng.randint(120, 160),) * 3, 34, 6)
    pen = ImageDraw.Draw(image)
    left, top = rng.randint(26, 48), rng.randint(12, 30)
    dark = (rng.randint(95, 120) if cloudy else rng.randint(25, 55),) * 3
    pen.ellipse((left, top, left + rng.randint(74, 92), side - rng.randint(18, 34)), fill=dark)
    radius = rng.randint(26, 31) if large else rng.randint(13, 17)
    x, y = left + rng.randint(26, 36), side - rng.randint(56, 70)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(rng.randint(195, 225),) * 3)
    return image.filter(ImageFilter.GaussianBlur(1.2)).convert("L")
