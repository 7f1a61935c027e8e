"""Land from above, 224 x 224, with five captions an image as the collections behind RISC word them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import ImageDraw

from raycap.data.drawn.base import Drawn, Rgb, clouds, shade

SIDE_PX = 224
LANDS = {"green": (70, 120, 60), "brown": (140, 105, 70), "yellow": (195, 180, 120), "grey": (140, 140, 138)}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


def aerial(rng: random.Random) -> Drawn:
    """224 px of land with one thing on it and trees around; five captions, as the collections behind RISC word them."""
    land = rng.choice(tuple(LANDS))
    image = clouds(rng, (SIDE_PX, SIDE_PX), shade(rng, LANDS[land]), 40, 7)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 14)):
        x, y, r = rng.randint(0, SIDE_PX), rng.randint(0, SIDE_PX), rng.randint(6, 14)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade(rng, (25, 70, 30)))
    what, where, many = _THINGS[rng.choice(tuple(_THINGS))](rng, pen)
    count = f"{NUMBERS[many]} " if many else ""
    return Drawn(image, (
        f"{count or 'a '}{what} {where} {land} land .",
        f"there {'are' if many > 1 else 'is'} {count or 'a '}{what} surrounded by {land} ground .",
        f"some trees are near {count or 'the '}{what} .",
        f"many green trees and {count or 'a '}{what} on {land} land .",
        f"this is an aerial view of {count or 'a '}{what} {where} {land} land with trees .",
    ))  # fmt: skip


def _band(rng: random.Random, pen: ImageDraw.ImageDraw, fill: Rgb, width: int) -> tuple[float, float, float, float]:
    """A straight band across the picture at any angle: (x, y, dx, dy) of its middle line."""
    angle, reach = rng.uniform(0, math.pi), SIDE_PX
    x, y = (SIDE_PX / 2 + rng.uniform(-45, 45) for _ in range(2))
    dx, dy = math.cos(angle), math.sin(angle)
    pen.line((x - reach * dx, y - reach * dy, x + reach * dx, y + reach * dy), fill=fill, width=width)
    return x, y, dx, dy


def _river(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    _band(rng, pen, shade(rng, (40, 80, 150)), rng.randint(34, 52))
    return "river", "runs through", 0


def _road(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    x, y, dx, dy = _band(rng, pen, shade(rng, (90, 90, 95)), rng.randint(26, 34))
    pen.line((x - 220 * dx, y - 220 * dy, x + 220 * dx, y + 220 * dy), fill=(235, 235, 230), width=3)
    return "road", "goes across", 0


def _runway(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    x, y, dx, dy = _band(rng, pen, shade(rng, (60, 60, 66)), rng.randint(52, 66))
    many = rng.randint(1, 4)
    for n in range(many):
        at = (n - (many - 1) / 2) * 42
        cx, cy = x + at * dx, y + at * dy
        pen.line((cx - 15 * dx, cy - 15 * dy, cx + 15 * dx, cy + 15 * dy), fill=(245, 245, 245), width=6)
        pen.line((cx + 13 * dy, cy - 13 * dx, cx - 13 * dy, cy + 13 * dx), fill=(245, 245, 245), width=5)
    return "white planes" if many > 1 else "white plane", "on a runway in", many


def _houses(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    many, first = rng.randint(1, 4), rng.randrange(4)
    for n in range(many):
        x, y = (20 + 100 * place + rng.randint(0, 40) for place in divmod((first + n) % 4, 2))
        pen.rectangle((x, y, x + 48, y + 38), fill=shade(rng, (190, 60, 45)))
        pen.line((x, y + 19, x + 48, y + 19), fill=(120, 30, 25), width=3)
    return "houses with red roofs" if many > 1 else "house with a red roof", "in", many


def _tanks(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    many, first = rng.randint(1, 4), rng.randrange(4)
    for n in range(many):
        x, y = (24 + 100 * place + rng.randint(0, 30) for place in divmod((first + n) % 4, 2))
        radius = rng.randint(48, 58)
        pen.ellipse(
            (x, y, x + radius, y + radius), fill=shade(rng, (235, 235, 235), 12), outline=(120, 120, 120), width=4
        )
    return "white storage tanks" if many > 1 else "white storage tank", "in", many


def _court(rng: random.Random, pen: ImageDraw.ImageDraw) -> tuple[str, str, int]:
    x, y = rng.randint(30, 90), rng.randint(30, 90)
    wide, high = rng.choice(((110, 64), (64, 110)))
    pen.rectangle((x, y, x + wide, y + high), fill=shade(rng, (40, 110, 170)), outline=(245, 245, 245), width=5)
    if wide > high:
        pen.line((x + wide / 2, y, x + wide / 2, y + high), fill=(245, 245, 245), width=4)
    else:
        pen.line((x, y + high / 2, x + wide, y + high / 2), fill=(245, 245, 245), width=4)
    return "tennis court", "lies in", 0


_THINGS: dict[str, Callable[[random.Random, ImageDraw.ImageDraw], tuple[str, str, int]]] = {
    "river": _river, "road": _road, "runway": _runway, "houses": _houses, "tanks": _tanks, "court": _court,
}  # fmt: skip
