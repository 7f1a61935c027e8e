import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from raycap.data import duplicates
from raycap.data.duplicates import NEAR_BITS, Picture, find_duplicates, merged_groups, near_pairs, rows_to_drop
from raycap.data.images import Look, check_image, look_of


def scene(number, size=(160, 120)):
    """A soft picture, unlike that of any other number, as photos are: large areas and a few edges."""
    dice = np.random.default_rng(number)
    coarse = Image.fromarray(dice.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def again(image, quality=60, size=None):
    buffer = io.BytesIO()
    image.resize(size or image.size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def picture(image, name="x", **fields):
    checked = check_image(_png(image))
    return Picture(name, f"table:{name}", checked.sha256, checked.look, **fields)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda i: again(i, 30),
        lambda i: again(i, size=(80, 60)),
        lambda i: again(i, size=(224, 224)),
        lambda i: ImageEnhance.Brightness(i).enhance(1.1),
        lambda i: ImageEnhance.Contrast(i).enhance(1.1),
    ],
    ids=["saved-again", "halved", "squared", "brighter", "contrast"],
)
def test_the_same_picture_in_other_clothes_is_found(change):
    originals = [scene(n) for n in range(20)]
    looks = [look_of(i) for i in originals] + [look_of(change(i)) for i in originals]
    assert {(a, b) for a, b, _ in near_pairs(looks)} == {(n, n + 20) for n in range(20)}


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda i: i.rotate(90, expand=True),
        lambda i: Image.merge("RGB", i.split()[::-1]),
        lambda i: _with_spot(i),
    ],
    ids=["mirrored", "turned", "other-colours", "one-thing-more"],
)
def test_another_picture_is_not(change):
    for n in range(10):
        assert near_pairs([look_of(scene(n)), look_of(change(scene(n)))]) == []


def _with_spot(image):
    image = image.copy()
    pixels = np.asarray(image)[40:60, 40:60].mean((0, 1))
    image.paste(tuple(int(255 - p if abs(p - 127) > 40 else 255) for p in pixels), (40, 40, 60, 60))
    return image


def test_plain_pictures_are_told_apart_by_colour():
    looks = [look_of(Image.new("RGB", (40, 40), c)) for c in ("white", "black", "red", "#fe0000", "#ee0000")]
    assert [(a, b) for a, b, _ in near_pairs(looks)] == [(2, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_what_comparing_all_finds(monkeypatch, seed):
    """Against every pair, on hashes made to lie near one another, equal ones among them."""
    monkeypatch.setattr(duplicates, "_BLOCK", 50)
    dice = np.random.default_rng(seed)
    hashes = [int(h) for h in dice.integers(0, 2**63, 60)]
    for _ in range(240):
        flipped = hashes[dice.integers(len(hashes))]
        for bit in dice.choice(64, dice.integers(0, 9), replace=False):
            flipped ^= 1 << int(bit)
        hashes.append(flipped)
    looks = [Look(h, bytes(768)) for h in hashes]
    wanted = {(a, b, (hashes[a] ^ hashes[b]).bit_count()) for a, b in itertools.combinations(range(len(hashes)), 2)}
    assert near_pairs(looks) == sorted(p for p in wanted if p[2] <= NEAR_BITS) != []


def test_far_fewer_pairs_are_looked_at_than_there_are(monkeypatch):
    looked = 0
    count = np.bitwise_count

    def counting(values):
        nonlocal looked
        looked += len(values)
        return count(values)

    monkeypatch.setattr(duplicates.np, "bitwise_count", counting)
    hashes = np.random.default_rng(0).integers(0, 2**63, 20_000)
    near_pairs([Look(int(h), bytes(768)) for h in hashes])
    assert looked < 20_000**2 / 2 / 100


def test_copies_and_clusters():
    a, b, near_a = scene(0), scene(1), again(scene(0))
    found = find_duplicates([picture(i, str(n)) for n, i in enumerate([a, b, near_a, a, b, scene(2)])])
    assert found.exact == [0, 1, 2, 0, 1, 5] and found.cluster == [0, 1, 0, 0, 1, 5]
    assert found.counts() == {"exact": 2, "near": 1}
    assert found.between(3, 2).kind == "near" and found.between(0, 3).kind == "exact" and found.between(0, 5) is None


def test_what_is_dropped():
    a, near_a = scene(0), again(scene(0))
    rows = [
        picture(a, "0", split="train"),
        picture(a, "1", split="train"),
        picture(near_a, "2", split="train"),
        picture(a, "3", split="train", lang="ja"),  # its captions are in another language: no copy
        picture(a, "4", split="test"),
        picture(a, "5", split="test"),  # official test sets stay whole
    ]
    found = find_duplicates(rows)
    assert rows_to_drop(rows, found, "keep") == {}
    assert {i: (p.a, p.kind) for i, p in rows_to_drop(rows, found, "exact").items()} == {1: (0, "exact")}
    near = rows_to_drop(rows, found, "near")
    assert {i: (p.a, p.kind) for i, p in near.items()} == {1: (0, "exact"), 2: (0, "near")} and near[2].bits <= 6


def test_groups_of_one_picture_become_one():
    a, b = scene(0), scene(1)
    rows = [picture(a, "0"), picture(b, "1", group="g"), picture(a, "2", group="h"), picture(b, "3", group="k"),
            picture(scene(3), "4"), picture(scene(4), "5"), picture(again(scene(4)), "6")]  # fmt: skip
    assert merged_groups(rows, find_duplicates(rows)) == ["h", "g", "h", "g", "", "5", "5"]


def test_no_pictures():
    assert find_duplicates([]).counts() == {"exact": 0, "near": 0} and near_pairs([]) == []
