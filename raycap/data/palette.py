"""What the drawn scenes are made of: shapes, colours, textures, backgrounds, each with the words that name it.

`plain` is the palette the shipped tiny model is pretrained on, `demo` the one it is fine-tuned on: other colours, a new
shape and texture, and synonyms that pretraining never showed. Every word of both is in the tiny model's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

Rgb = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Words:
    """Names of one thing, the usual one first; `plural` goes word for word with `names`."""

    names: tuple[str, ...]
    plural: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Palette:
    shapes: dict[str, Words]
    colours: dict[str, tuple[Rgb, Words]]
    textures: dict[str, Words]
    sizes: dict[str, Words]
    backgrounds: dict[str, tuple[Rgb, Words]]


def _s(*names: str) -> Words:
    return Words(names, tuple(n + ("es" if n.endswith(("s", "x")) else "s") for n in names))


CONTAINERS = ("circle", "square", "ring")
"""Shapes wide enough to hold a small object."""

PLAIN = Palette(
    shapes={
        "circle": _s("circle"), "square": _s("square"), "triangle": _s("triangle"), "star": _s("star"),
        "cross": _s("cross"), "diamond": _s("diamond"), "ring": _s("ring"), "heart": _s("heart"),
    },
    colours={
        "red": ((215, 35, 40), Words(("red",))), "green": ((40, 165, 65), Words(("green",))),
        "blue": ((45, 85, 220), Words(("blue",))), "yellow": ((245, 215, 45), Words(("yellow",))),
        "cyan": ((70, 225, 240), Words(("cyan",))), "magenta": ((225, 45, 210), Words(("magenta",))),
        "white": ((250, 250, 250), Words(("white",))), "black": ((15, 15, 15), Words(("black",))),
    },
    textures={"solid": Words(("",)), "striped": Words(("striped",)), "dotted": Words(("dotted",))},
    sizes={"small": Words(("small",)), "large": Words(("large",))},
    backgrounds={
        "white": ((250, 250, 250), Words(("white",))), "black": ((15, 15, 18), Words(("black",))),
        "gray": ((150, 150, 150), Words(("gray",))), "sand": ((225, 205, 170), Words(("sand",))),
        "forest": ((35, 70, 50), Words(("forest",))),
    },
)  # fmt: skip

DEMO = Palette(
    shapes={
        "circle": _s("circle", "disc"), "square": _s("square", "box"), "triangle": _s("triangle"), "star": _s("star"),
        "cross": _s("cross", "plus sign"), "diamond": _s("diamond", "rhombus"), "ring": _s("ring", "hoop"),
        "heart": _s("heart"), "moon": _s("moon", "crescent"), "arrow": _s("arrow"),
    },
    colours={
        "orange": ((240, 140, 30), Words(("orange",))), "purple": ((125, 50, 180), Words(("purple", "violet"))),
        "pink": ((245, 130, 185), Words(("pink", "rosy"))), "brown": ((120, 70, 35), Words(("brown",))),
        "turquoise": ((40, 185, 180), Words(("turquoise", "teal"))),
        "gray": ((140, 140, 145), Words(("gray", "silver"))), "navy": ((25, 35, 110), Words(("navy", "dark blue"))),
        "lime": ((170, 230, 40), Words(("lime", "bright green"))), "olive": ((120, 125, 35), Words(("olive",))),
        "maroon": ((115, 20, 50), Words(("maroon", "wine red"))),
    },
    textures={
        "solid": Words(("", "plain")), "striped": Words(("striped", "banded")), "dotted": Words(("spotted", "dotted")),
        "checked": Words(("checkered", "checked")),
    },
    sizes={"small": Words(("little", "tiny", "small")), "large": Words(("big", "huge", "large"))},
    backgrounds={
        "white": ((250, 250, 250), Words(("white", "bright"))), "dark": ((35, 35, 42), Words(("dark", "black"))),
        "beige": ((236, 222, 196), Words(("beige", "pale"))), "mint": ((200, 235, 215), Words(("mint", "pale green"))),
    },
)  # fmt: skip

PALETTES = {"plain": PLAIN, "demo": DEMO}

NUMBERS = ("zero", "one", "two", "three", "four")
