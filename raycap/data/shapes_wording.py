"""What people say of a drawn scene: one plain sentence, or five that differ in template, order, synonyms and detail."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from raycap.data.palette import NUMBERS, PALETTES, Palette

CAPTIONS_PER_SCENE = 5
_SYNONYM = 0.12  # how often a caption takes another than the usual word
_OMISSION = 0.06  # how often it leaves an attribute out


@dataclass(frozen=True, slots=True)
class Group:
    """Objects that look alike."""

    count: int
    shape: str
    colour: str
    texture: str
    size: str

    def __str__(self) -> str:
        return f"{self.count} {self.size} {self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a scene shows. Of two groups the first is `relation` (left, above, inside) of the second; three objects

    stand in a `row` from left to right or in a `column` from top to bottom.
    """

    groups: tuple[Group, ...]
    relation: str
    background: str
    place: str
    """Where a lone object is: middle, left, right, top, bottom."""

    @property
    def composition(self) -> str:
        """What makes two scenes the same to a reader, whatever their positions and background."""
        return f" {self.relation} ".join(map(str, self.groups))


def word(plan: Plan, style: str, rng: random.Random) -> tuple[str, ...]:
    """The captions of a scene: five different ones in the demo style, one in the plain style."""
    if style == "plain":
        return (_plain(plan),)
    speaker = _Speaker(PALETTES[style], rng)
    templates = _LONE if plan.place else _MANY if len(plan.groups) == 1 else _RELATED[plan.relation]
    captions: dict[str, None] = {}
    order = rng.sample(templates, len(templates))
    while len(captions) < CAPTIONS_PER_SCENE:
        for template in order:
            if len(captions) < CAPTIONS_PER_SCENE:
                # Three objects along a line are all small, so half of the people do not mention it.
                speaker.skips_sizes = len(plan.groups) == 3 and rng.random() < 0.5
                captions[template(plan, speaker)] = None
    return tuple(captions)


def _plain(plan: Plan) -> str:
    speaker = _Speaker(PALETTES["plain"], None)
    relation = {"left": "left of", "above": "above", "inside": "inside", "": ""}[plan.relation]
    return f" {relation} ".join(speaker.name(group) for group in plan.groups)


class _Speaker:
    """Chooses words. Without a generator: always the usual word, every attribute."""

    def __init__(self, palette: Palette, rng: random.Random | None):
        self.palette, self.rng = palette, rng
        self.skips_sizes = False

    def pick(self, names: tuple[str, ...]) -> int:
        if self.rng is None or len(names) == 1 or self.rng.random() >= _SYNONYM:
            return 0
        return self.rng.randrange(1, len(names))

    def any(self, *texts: str) -> str:
        assert self.rng is not None
        return self.rng.choice(texts)

    def leaves_out(self) -> bool:
        return self.rng is not None and self.rng.random() < _OMISSION

    def adjectives(self, group: Group) -> list[str]:
        p = self.palette
        size, texture, colour = p.sizes[group.size], p.textures[group.texture], p.colours[group.colour][1]
        words = [] if self.leaves_out() or self.skips_sizes else [size.names[self.pick(size.names)]]
        words += [] if self.leaves_out() else [texture.names[self.pick(texture.names)]]
        return [w for w in (*words, colour.names[self.pick(colour.names)]) if w]

    def noun(self, group: Group) -> str:
        shape = self.palette.shapes[group.shape]
        number = self.pick(shape.names)
        return shape.names[number] if group.count == 1 else shape.plural[number]

    def bare(self, group: Group) -> str:
        """Adjectives and noun."""
        return " ".join([*self.adjectives(group), self.noun(group)])

    def name(self, group: Group, one: str = "") -> str:
        """With the article or the number."""
        bare = self.bare(group)
        return f"{NUMBERS[group.count]} {bare}" if group.count > 1 else f"{one or article(bare)} {bare}"

    def names(self, plan: Plan) -> str:
        return " and ".join(self.name(group) for group in plan.groups)

    def background(self, plan: Plan) -> str:
        names = self.palette.backgrounds[plan.background][1].names
        return f"{names[self.pick(names)]} background"

    def place(self, plan: Plan) -> str:
        return {"middle": "in the middle", "left": "on the left side", "right": "on the right side",
                "top": "at the top", "bottom": "at the bottom"}[plan.place]  # fmt: skip


def article(words: str) -> str:
    return "an" if words[0] in "aeio" else "a"


def _on(plan: Plan, s: _Speaker) -> str:
    ground = s.background(plan)
    return f"on {article(ground)} {ground}"


def _with(plan: Plan, s: _Speaker, names: str) -> str:
    ground = s.background(plan)
    return f"{article(ground)} {ground} with {names}"


def _there(group: Group) -> str:
    return "there is" if group.count == 1 else "there are"


Template = Callable[[Plan, _Speaker], str]

_LONE: list[Template] = [
    lambda p, s: f"{s.name(p.groups[0])} {s.place(p)} of the picture",
    lambda p, s: f"{s.name(p.groups[0])} {_on(p, s)}",
    lambda p, s: f"there is {s.name(p.groups[0])} {s.place(p)}",
    lambda p, s: f"the picture shows {s.name(p.groups[0], s.any('one', 'a single'))}",
    lambda p, s: f"{_with(p, s, s.name(p.groups[0]))}",
    lambda p, s: f"{s.place(p)} we see {s.name(p.groups[0])}",
    lambda p, s: f"{s.name(p.groups[0], 'one')} {s.any('alone', 'and nothing else')}",
]

_MANY: list[Template] = [
    lambda p, s: f"{s.name(p.groups[0])}",
    lambda p, s: f"there are {s.name(p.groups[0])}",
    lambda p, s: f"{s.name(p.groups[0])} {_on(p, s)}",
    lambda p, s: f"the picture shows {s.name(p.groups[0])}",
    lambda p, s: f"a group of {s.name(p.groups[0])}",
    lambda p, s: f"{_with(p, s, s.name(p.groups[0]))}",
    lambda p, s: f"{s.any('some', 'several')} {s.bare(p.groups[0])}",
    lambda p, s: f"we see {s.name(p.groups[0])} {s.any('of the same kind', 'that look alike')}",
]


def _pair(forward: tuple[str, ...], backward: tuple[str, ...], apart: tuple[str, ...]) -> list[Template]:
    """Templates of a relation: said from the first group, from the second, or place by place."""
    return [
        lambda p, s: f"{s.name(p.groups[0])} {s.any(*forward)} {s.name(p.groups[1])}",
        lambda p, s: f"{s.name(p.groups[1])} {s.any(*backward)} {s.name(p.groups[0])}",
        lambda p, s: f"{_there(p.groups[0])} {s.name(p.groups[0])} {s.any(*forward)} {s.name(p.groups[1])}",
        lambda p, s: f"the picture shows {s.name(p.groups[0])} and {s.name(p.groups[1])}",
        lambda p, s: s.any(*apart).format(s.name(p.groups[0]), s.name(p.groups[1])),
        lambda p, s: f"{s.name(p.groups[0])} {s.any(*forward)} {s.name(p.groups[1])} {_on(p, s)}",
        lambda p, s: f"{s.name(p.groups[1])} and {s.name(p.groups[0])}",
    ]


def _line(order: str, first: str, last: str) -> list[Template]:
    """Templates of three objects along a line, said in order, or from the middle one."""
    return [
        lambda p, s: f"{order} {s.names(p)}",
        lambda p, s: f"{s.name(p.groups[1])} between {s.name(p.groups[0])} and {s.name(p.groups[2])}",
        lambda p, s: f"the picture shows {s.names(p)}",
        lambda p, s: f"there are three objects {s.names(p)}",
        lambda p, s: f"{s.names(p)} {_on(p, s)}",
        lambda p, s: f"{s.name(p.groups[0])} {first} and {s.name(p.groups[2])} {last} of {s.name(p.groups[1])}",
    ]


_RELATED: dict[str, list[Template]] = {
    "left": _pair(("to the left of", "beside", "next to"), ("to the right of", "beside"),
                  ("on the left {0} and on the right {1}", "{0} on the left side and {1} on the right side")),
    "above": _pair(("over", "on top of", "higher than"), ("under", "below", "beneath"),
                   ("at the top {0} and at the bottom {1}", "{0} at the top and {1} at the bottom")),
    "inside": _pair(("within", "in the middle of"), ("around", "with"),
                    ("{1} that holds {0}", "{0} surrounded by {1}")),
    "row": _line("from left to right", "on the left side", "on the right side"),
    "column": _line("from top to bottom", "at the top", "at the bottom"),
}  # fmt: skip
