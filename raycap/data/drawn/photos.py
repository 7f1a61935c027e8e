"""Photographs of people and animals with five captions each, in English or Japanese; and of meals, in Japanese."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from raycap.data.drawn.base import Drawn, Rgb, clouds, shade

SIZE_PX = (200, 150)
PLACES: dict[str, tuple[Rgb, Rgb, str]] = {
    "on a beach": ((215, 195, 140), (90, 160, 210), "砂浜"),
    "in the grass": ((80, 150, 60), (165, 205, 240), "芝生"),
    "in the snow": ((240, 243, 248), (175, 185, 200), "雪の上"),
    "on a street": ((105, 105, 110), (200, 195, 185), "道路"),
}
CLOTHES: dict[str, tuple[Rgb, str]] = {
    "red": ((205, 40, 40), "赤い"), "blue": ((40, 70, 200), "青い"), "yellow": ((235, 205, 50), "黄色い"),
    "black": ((30, 30, 32), "黒い"),
}  # fmt: skip
PEOPLE = {"man": "男性", "woman": "女性", "child": "子供"}
ANIMALS: dict[str, tuple[Rgb, str]] = {
    "brown dog": ((125, 75, 40), "茶色い犬"), "white dog": ((235, 230, 222), "白い犬"), "black cat": ((35, 33, 36), "黒い猫"),
}  # fmt: skip
TOYS: dict[str, tuple[Rgb, str]] = {"ball": ((240, 120, 30), "ボール"), "kite": ((180, 50, 190), "凧")}


@dataclass(frozen=True, slots=True)
class _Photo:
    """What a photograph shows, in words of PLACES and so on; `toy` may be empty."""

    place: str
    who: str
    colour: str
    toy: str


def _photo(rng: random.Random) -> tuple[_Photo, Image.Image]:
    place, animal = rng.choice(tuple(PLACES)), rng.random() < 0.4
    who = rng.choice(tuple(ANIMALS if animal else PEOPLE))
    shown = _Photo(place, who, "" if animal else rng.choice(tuple(CLOTHES)), rng.choice(("", *TOYS)))
    ground, sky, _ = PLACES[place]
    wide = SIZE_PX[0]
    image = clouds(rng, SIZE_PX, shade(rng, ground), 38, 7)
    horizon = rng.randint(48, 80)
    image.paste(clouds(rng, (wide, horizon), shade(rng, sky), 30), (0, 0))
    pen = ImageDraw.Draw(image)
    x, foot = rng.randint(50, wide - 60), rng.randint(118, 142)
    if animal:
        fur = shade(rng, ANIMALS[who][0], 12)
        pen.ellipse((x - 38, foot - 48, x + 30, foot - 12), fill=fur)
        pen.ellipse((x + 18, foot - 64, x + 48, foot - 34), fill=fur)
        for leg in (-28, -12, 8, 20):
            pen.rectangle((x + leg, foot - 22, x + leg + 7, foot), fill=fur)
    else:
        tall = 58 if who == "child" else 96
        skin, hair = shade(rng, (222, 175, 140)), (60, 40, 25) if who != "woman" else (150, 80, 30)
        pen.rectangle((x - 13, foot - tall * 0.45, x + 13, foot), fill=(50, 50, 75))
        pen.rectangle(
            (x - 21, foot - tall * 0.82, x + 21, foot - tall * 0.4), fill=shade(rng, CLOTHES[shown.colour][0])
        )
        pen.ellipse((x - 12, foot - tall - 8, x + 12, foot - tall * 0.78), fill=skin)
        pen.pieslice((x - 13, foot - tall - 10, x + 13, foot - tall * 0.78), 180, 360, fill=hair)
        if who == "woman":
            pen.rectangle((x - 14, foot - tall, x - 9, foot - tall * 0.68), fill=hair)
    if shown.toy:
        at, fill = x + rng.choice((-58, 56)), shade(rng, TOYS[shown.toy][0])
        if shown.toy == "ball":
            pen.ellipse((at - 13, foot - 26, at + 13, foot), fill=fill)
        else:
            pen.polygon(((at, 8), (at + 20, 30), (at, 54), (at - 20, 30)), fill=fill)
    return shown, image


def english(rng: random.Random) -> Drawn:
    shown, image = _photo(rng)
    who = f"a {shown.who}" if not shown.colour else f"a {shown.who} in a {shown.colour} shirt"
    plain = f"a {shown.who}"
    toy = f" with a {shown.toy}" if shown.toy else ""
    does = "playing" if shown.toy else ("standing" if shown.colour else "running")
    return Drawn(image, (
        f"{who} is {does} {shown.place}{toy} .",
        f"{who}{toy} {shown.place} .",
        f"{plain} is outside {shown.place} .",
        f"{plain} is {does}{toy} .",
        f"there is {who} {shown.place} .",
    ))  # fmt: skip


def japanese(rng: random.Random) -> Drawn:
    shown, image = _photo(rng)
    place, toy = PLACES[shown.place][2], TOYS[shown.toy][1] if shown.toy else ""
    plain = ANIMALS[shown.who][1] if not shown.colour else PEOPLE[shown.who]
    who = plain if not shown.colour else f"{CLOTHES[shown.colour][1]}服を着た{plain}"
    does = f"{toy}で遊んでいる" if toy else ("立っている" if shown.colour else "走っている")
    return Drawn(image, (
        f"{place}で{who}が{does}",
        f"{who}が{place}にいる",
        f"{place}にいる{plain}",
        f"{plain}が{place}で{does}様子",
        f"{who}が{does}",
    ))  # fmt: skip


DISHES: dict[str, tuple[Rgb, str]] = {
    "rice": ((250, 248, 240), "ご飯"), "soup": ((170, 90, 40), "スープ"), "salad": ((90, 165, 60), "サラダ"),
    "tomato": ((215, 50, 40), "トマト"),
}  # fmt: skip
TABLES: dict[str, tuple[Rgb, str]] = {
    "wood": ((150, 105, 65), "木のテーブル"), "white": ((225, 225, 222), "白いテーブル"), "blue": ((70, 105, 170), "青い布"),
}  # fmt: skip


def meal(rng: random.Random) -> Drawn:
    """Out of the domain of `japanese`: dishes on a table, in the fuller sentences that YJ Captions are written in."""
    table, one = rng.choice(tuple(TABLES)), rng.choice(tuple(DISHES))
    other = rng.choice([d for d in DISHES if d != one])
    image = clouds(rng, SIZE_PX, shade(rng, TABLES[table][0]), 34, 7)
    pen = ImageDraw.Draw(image)
    for n, dish in enumerate((one, other)):
        x, y, r = 55 + 90 * n + rng.randint(-18, 18), 75 + rng.randint(-22, 22), rng.randint(34, 44)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade(rng, (240, 240, 245), 10))
        pen.ellipse((x - r + 9, y - r + 9, x + r - 9, y + r - 9), fill=shade(rng, DISHES[dish][0], 10))
    words, on = (DISHES[one][1], DISHES[other][1]), TABLES[table][1]
    return Drawn(image, (
        f"{on}の上に{words[0]}と{words[1]}が置かれています。",
        f"{words[0]}と{words[1]}が{on}に並んでいます。",
        f"テーブルの上に{words[0]}の皿があります。",
        f"{on}に料理が二皿あります。",
        f"お皿に{words[1]}が盛られています。",
    ))  # fmt: skip
