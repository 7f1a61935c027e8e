"""The built-in image set: drawn scenes of one to four objects, with captions that say what, how many and where.

A scene is a function of (style, seed, index) alone. Its composition - shapes, colours, sizes, textures, counts and the
relation, without positions or background - decides its split, so no split shares a composition with another.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw

from raycap.data.palette import CONTAINERS, PALETTES, Palette, Rgb
from raycap.data.shapes_wording import Group, Plan, word

if TYPE_CHECKING:
    from raycap.data.sources import SourceRow

Style = Literal["demo", "plain"]
SIDE = 64
"""Width and height of a scene in pixels."""
SUPERSAMPLING = 3
SPLITS = ("train", "val", "test")
_MARGIN = 1.0
_CONTRAST = 95.0  # least distance in RGB of what lies on what; below it people mix them up at 64 px
_KINDS = {"plain": (0.25, 0.2, 0.0), "demo": (0.1, 0.12, 0.38)}
"""Shares of scenes with one object, several that look alike, three along a line; the rest relate two groups."""
_RADII = {"small": (6.5, 8.5), "large": (12.0, 14.5), "container": (18.0, 22.0)}


@dataclass(frozen=True, slots=True)
class Placed:
    """One drawn object: centre and radius in pixels, angle in radians."""

    group: int
    shape: str
    rgb: Rgb
    texture: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn picture and what people would say of it."""

    scene_id: str
    image: Image.Image
    """RGB, 64 x 64."""
    captions: tuple[str, ...]
    """demo: five differently worded; plain: one."""
    plan: Plan
    objects: tuple[Placed, ...]


def generate(count: int, *, seed: int, style: Style = "demo", start: int = 0) -> Iterator[Scene]:
    """Scenes start .. start + count - 1 of the endless sequence that (style, seed) names."""
    for index in range(start, start + count):
        yield _scene(style, seed, index)


def rows(sizes: Sequence[int] = (1500, 256, 256), seed: int = 0) -> Iterator[SourceRow]:
    """The demo set as source rows: train, then val, then test; `group` is the composition, which splits never share."""
    from raycap.data.sources import SourceRow

    for split, size in zip(SPLITS, sizes, strict=True):
        index, found = 0, 0
        while found < size:
            plan, _ = _plan("demo", seed, index)
            if split_of(plan) == split:
                scene = _scene("demo", seed, index)
                yield SourceRow(
                    image_id=scene.scene_id, image=_png(scene.image), captions=list(scene.captions), split=split,
                    group=plan.composition, lang="en", source="shapes", path=f"{scene.scene_id}.png",
                    where=f"shapes seed {seed}, scene {index}",
                )  # fmt: skip
                found += 1
            index += 1


def split_of(plan: Plan) -> str:
    """Split of a composition: 60 / 20 / 20 % of them, by hash, whatever the seed."""
    bucket = hashlib.sha256(plan.composition.encode()).digest()[0] % 5
    return SPLITS[max(0, bucket - 2)]


def _scene(style: Style, seed: int, index: int) -> Scene:
    plan, rng = _plan(style, seed, index)
    objects = _place(plan, PALETTES[style], rng)
    captions = word(plan, style, random.Random(f"words/{style}/{seed}/{index}"))
    return Scene(f"{style}-{seed}-{index:06d}", _draw(plan, objects, PALETTES[style]), captions, plan, objects)


def _plan(style: Style, seed: int, index: int) -> tuple[Plan, random.Random]:
    """What the scene shows, and the generator that goes on to place it."""
    rng = random.Random(f"{style}/{seed}/{index}")
    palette = PALETTES[style]
    kind = rng.random()
    lone, many, trio = _KINDS[style]
    if kind < lone:
        return _finish((_group(palette, rng, 1),), "", rng, palette), rng
    if kind < lone + many:
        return _finish((_group(palette, rng, rng.choice((2, 3, 4))),), "", rng, palette), rng
    if kind >= 1 - trio:
        groups: list[Group] = []
        for _ in range(3):
            groups.append(_group(palette, rng, 1, sizes=("small",), away_from=tuple(g.colour for g in groups)))
        return _finish(tuple(groups), rng.choice(("row", "column")), rng, palette), rng
    relation = rng.choice(("left", "left", "above", "above", "inside"))
    if relation == "inside":
        outer = _group(palette, rng, 1, shapes=CONTAINERS, sizes=("large",), textures=("solid",))
        inner = _group(palette, rng, 1, sizes=("small",), away_from=(outer.colour,))
        return _finish((inner, outer), relation, rng, palette), rng
    counts = rng.choice(((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2)))
    first = _group(palette, rng, counts[0])
    second = _group(palette, rng, counts[1], away_from=(first.colour,))
    return _finish((first, second), relation, rng, palette), rng


def _group(palette: Palette, rng: random.Random, count: int, *, shapes: Sequence[str] = (), sizes: Sequence[str] = (),
           textures: Sequence[str] = (), away_from: Sequence[str] = ()) -> Group:  # fmt: skip
    colours = [c for c in palette.colours if all(_distance(palette, c, a) >= _CONTRAST for a in away_from)]
    if not sizes:
        sizes = tuple(palette.sizes) if count == 1 else ("small",)
    if not textures:
        textures = ("solid", "solid", *(t for t in palette.textures if t != "solid"))
    return Group(
        count=count, shape=rng.choice(shapes or tuple(palette.shapes)), colour=rng.choice(colours),
        texture=rng.choice(textures), size=rng.choice(sizes),
    )  # fmt: skip


def _distance(palette: Palette, one: str, other: str) -> float:
    return math.dist(palette.colours[one][0], palette.colours[other][0])


def _finish(groups: tuple[Group, ...], relation: str, rng: random.Random, palette: Palette) -> Plan:
    """Adds a background that stands out from every colour (each palette has one: tested), and a lone object's place."""
    inks = [palette.colours[g.colour][0] for g in groups]
    clear = [b for b, (rgb, _) in palette.backgrounds.items() if all(math.dist(rgb, ink) >= _CONTRAST for ink in inks)]
    alone = len(groups) == 1 and groups[0].count == 1
    place = rng.choice(("middle", "left", "right", "top", "bottom")) if alone else ""
    return Plan(groups, relation, background=rng.choice(clear), place=place)


def _place(plan: Plan, palette: Palette, rng: random.Random) -> tuple[Placed, ...]:
    """Positions without overlap; a layout that gets stuck is started again with smaller objects."""
    for attempt in range(20):
        shrink = 0.97**attempt
        placed: list[Placed] = []
        inks = [_shade(palette.colours[g.colour][0], rng) for g in plan.groups]
        for number in reversed(range(len(plan.groups))):  # the container, second in `inside`, is drawn first
            group = plan.groups[number]
            for _ in range(group.count):
                radius = rng.uniform(*_RADII[_radius_kind(plan, number)]) * shrink
                spot = _spot(plan, number, radius, placed, rng)
                if spot is not None:
                    angle = rng.uniform(-0.12, 0.12)
                    placed.append(Placed(number, group.shape, inks[number], group.texture, *spot, radius, angle))
        if len(placed) == sum(g.count for g in plan.groups):
            return tuple(placed)
    raise AssertionError(f"no room for {plan}")  # unreachable: at 0.57 of their size four objects always fit


def _shade(rgb: Rgb, rng: random.Random) -> Rgb:
    red, green, blue = (min(255, max(0, c + rng.randint(-15, 15))) for c in rgb)
    return red, green, blue


def _radius_kind(plan: Plan, number: int) -> str:
    return "container" if plan.relation == "inside" and number == 1 else plan.groups[number].size


def _spot(
    plan: Plan, number: int, radius: float, placed: Sequence[Placed], rng: random.Random
) -> tuple[float, float] | None:
    """A centre for an object of group `number` that touches none of `placed`; None when there is no room."""
    if plan.relation == "inside" and number == 0:
        outer = placed[0]
        return outer.x + rng.uniform(-1.5, 1.5), outer.y + rng.uniform(-1.5, 1.5)
    low, high = radius + _MARGIN, SIDE - radius - _MARGIN
    x_range, y_range = [low, high], [low, high]
    if plan.relation in ("left", "above"):
        # Group 0 keeps to the left (upper) part; a lone object stays near the middle of the other axis.
        along, across = (x_range, y_range) if plan.relation == "left" else (y_range, x_range)
        middle = SIDE / 2
        along[number == 0] = middle - radius * 0.9 if number == 0 else middle + radius * 0.9
        if along[0] > along[1]:
            along[0] = along[1] = (along[0] + along[1]) / 2
        if plan.groups[number].count == 1:
            across[:] = [max(low, middle - 9), min(high, middle + 9)]
    elif plan.relation in ("row", "column"):
        along, across = (x_range, y_range) if plan.relation == "row" else (y_range, x_range)
        third = SIDE * (number + 0.5) / 3
        along[:] = [max(low, third - 2), min(high, third + 2)]
        across[:] = [SIDE / 2 - 7, SIDE / 2 + 7]
    elif plan.place:
        middle, third = SIDE / 2, SIDE * 0.28
        centre = {"middle": (middle, middle), "left": (third, middle), "right": (SIDE - third, middle),
                  "top": (middle, third), "bottom": (middle, SIDE - third)}[plan.place]  # fmt: skip
        x_range, y_range = ([min(max(c - 3, low), high), max(min(c + 3, high), low)] for c in centre)
    for _ in range(40):
        x, y = rng.uniform(*x_range), rng.uniform(*y_range)
        if all(math.hypot(x - p.x, y - p.y) > radius + p.radius + 1.5 for p in placed):
            return x, y
    return None


def _draw(plan: Plan, objects: Sequence[Placed], palette: Palette) -> Image.Image:
    """Drawn three times as large and averaged down, which gives smooth edges."""
    big = SIDE * SUPERSAMPLING
    canvas = Image.new("RGB", (big, big), palette.backgrounds[plan.background][0])
    for item in objects:
        radius = round(item.radius * SUPERSAMPLING)
        corner = round(item.x * SUPERSAMPLING) - radius, round(item.y * SUPERSAMPLING) - radius
        ink = item.rgb if item.texture == "solid" else _texture(item, radius)
        canvas.paste(ink, (*corner, corner[0] + 2 * radius, corner[1] + 2 * radius), _mask(item, radius))
    return canvas.reduce(SUPERSAMPLING)


def _texture(item: Placed, radius: int) -> Image.Image:
    """A tile in the object's colour with a lighter (of dark colours) or darker pattern."""
    toward = 255 if sum(item.rgb) < 380 else 0
    other = tuple(round(c * 0.35 + toward * 0.65) for c in item.rgb)
    side = 2 * radius
    tile = Image.new("RGB", (side, side), item.rgb)
    pen = ImageDraw.Draw(tile)
    step = 4 * SUPERSAMPLING if radius < 30 else 5 * SUPERSAMPLING
    if item.texture == "striped":
        for start in range(-side, side, step):
            pen.line((start, side, start + side, 0), fill=other, width=step // 3)
    elif item.texture == "dotted":
        dot = step * 0.3
        for row, y in enumerate(range(step // 2, side, step)):
            for x in range(step // 2 if row % 2 else 0, side + step, step):
                pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=other)
    else:
        for row, y in enumerate(range(0, side, step)):
            for x in range(step if row % 2 else 0, side, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=other)
    return tile


def _mask(item: Placed, radius: int) -> Image.Image:
    mask = Image.new("L", (2 * radius, 2 * radius), 0)
    pen = ImageDraw.Draw(mask)
    if item.shape in ("circle", "ring", "moon"):
        pen.ellipse((0, 0, 2 * radius - 1, 2 * radius - 1), fill=255)
        if item.shape == "ring":
            hole = radius * 0.36 if item.radius < 15 else radius * 0.24
            pen.ellipse((hole, hole, 2 * radius - 1 - hole, 2 * radius - 1 - hole), fill=0)
        elif item.shape == "moon":
            pen.ellipse((radius * 0.7, -radius * 0.2, radius * 2.5, radius * 1.6), fill=0)
        return mask
    cosine, sine = math.cos(item.angle), math.sin(item.angle)
    pen.polygon(
        [(radius * (1 + x * cosine - y * sine), radius * (1 + x * sine + y * cosine)) for x, y in _outline(item.shape)],
        fill=255,
    )
    return mask


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners in the unit circle, y downwards."""

    def ring(corners: int, first: float, radii: Sequence[float] = (1.0,)) -> tuple[tuple[float, float], ...]:
        turns = [(first + 2 * math.pi * n / corners, radii[n % len(radii)]) for n in range(corners)]
        return tuple((r * math.cos(a), r * math.sin(a)) for a, r in turns)

    if shape == "square":
        return tuple((x * 0.84, y * 0.84) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1)))
    if shape == "triangle":
        return ring(3, -math.pi / 2)
    if shape == "diamond":
        return ((0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0))
    if shape == "star":
        return ring(10, -math.pi / 2, (1.0, 0.42))
    if shape == "arrow":
        return ((-0.95, -0.28), (0.05, -0.28), (0.05, -0.8), (0.98, 0.0), (0.05, 0.8), (0.05, 0.28), (-0.95, 0.28))
    if shape == "cross":
        arm, end = 0.3, 0.95
        quarter = ((-arm, -end), (arm, -end), (arm, -arm))
        turned = quarter
        points = list(turned)
        for _ in range(3):
            turned = tuple((-y, x) for x, y in turned)
            points += turned
        return tuple(points)
    angles = [2 * math.pi * n / 28 for n in range(28)]
    return tuple(
        (math.sin(a) ** 3 * 0.98,
         -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 * 0.98)
        for a in angles
    )  # fmt: skip


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
