"""Creatures drawn on paper, a caption each."""

from __future__ import annotations

import random

from PIL import ImageDraw

from raycap.data.drawn.base import Drawn, clouds, shade

SIDE_PX = 180
SKINS = {"red": (215, 60, 50), "blue": (60, 110, 215), "green": (80, 170, 75), "yellow": (240, 210, 60),
         "purple": (140, 80, 180)}  # fmt: skip


def creature(rng: random.Random) -> Drawn:
    """A creature drawn on paper; one caption, as BLIP worded them."""
    skin, eyes = rng.choice(tuple(SKINS)), rng.choice(("black", "red"))
    parts = [p for p in ("a long tail", "big ears", "wings") if rng.random() < 0.5]
    side, fill = SIDE_PX, shade(rng, SKINS[skin])
    image = clouds(rng, (side, side), (238, 238, 234), 16, 6)
    pen = ImageDraw.Draw(image)
    x, y = side // 2 + rng.randint(-18, 18), side // 2 + rng.randint(-6, 18)
    half, tall = rng.randint(26, 42), rng.randint(28, 46)
    if "wings" in parts:
        for way in (-1, 1):
            tip = (x + way * (half + 40), y - rng.randint(30, 60))
            pen.polygon(
                ((x, y), tip, (x + way * (half + 26), y + 14)), fill=shade(rng, (200, 200, 210)), outline=(30,) * 3
            )
    if "a long tail" in parts:
        way = rng.choice((-1, 1))
        pen.line(
            (x, y + tall - 8, x + way * (half + 22), y + tall - 4, x + way * (half + 34), y - 12), fill=fill, width=10
        )
    pen.ellipse((x - half, y - tall, x + half, y + tall), fill=fill, outline=(30,) * 3, width=3)
    head, top = rng.randint(20, 30), y - tall - 8
    if "big ears" in parts:
        for way in (-1, 1):
            pen.polygon(((x + way * 6, top), (x + way * (head + 16), top - 44), (x + way * head, top + 4)), fill=fill,
                        outline=(30,) * 3)  # fmt: skip
    pen.ellipse((x - head, top - head, x + head, top + head), fill=fill, outline=(30,) * 3, width=3)
    for way in (-1, 1):
        at = x + way * head // 2
        pen.ellipse((at - 5, top - 6, at + 5, top + 6), fill=(200, 20, 20) if eyes == "red" else (20, 20, 20))
    told = " and ".join(["red eyes"] * (eyes == "red") + parts)
    return Drawn(image, (f"a drawing of a {skin} pokemon" + (f" with {told}" if told else ""),))
