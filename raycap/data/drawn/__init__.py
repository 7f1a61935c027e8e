"""Drawn pictures of the kinds that the presets caption, each with captions as people write them for that kind.

They stand in for sets that cannot be had everywhere, so that a preset's whole way can be walked without them
(`raycap sweep PRESET --tiny`). Nothing can be learnt from them about the real ones. A picture is a function of
(kind, seed, number) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from raycap.data.drawn.aerial import aerial
from raycap.data.drawn.base import Drawn
from raycap.data.drawn.creatures import creature
from raycap.data.drawn.photos import english, japanese, meal
from raycap.data.drawn.xrays import xray

__all__ = ["KINDS", "Drawn", "draw"]

KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    "xray": xray,
    "aerial": aerial,
    "photo": english,
    "photo-ja": japanese,
    "meal-ja": meal,
    "creature": creature,
}


def draw(kind: str, seed: int, number: int) -> Drawn:
    """Picture `number` of a kind of KINDS."""
    return KINDS[kind](random.Random(f"{kind}/{seed}/{number}"))
