"""The drawn scenes: the same for the same seed, split by composition, worded in many ways."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from raycap.data.palette import DEMO, PLAIN
from raycap.data.shapes import SIDE, SPLITS, generate, rows, split_of

SIZES = (300, 80, 80)


@pytest.fixture(scope="module")
def demo():
    return list(rows(SIZES, seed=0))


def pixels(scene):
    return np.asarray(scene.image)


@pytest.mark.parametrize("style", ["demo", "plain"])
def test_a_scene_depends_on_seed_and_index_alone(style):
    all_at_once = list(generate(12, seed=3, style=style))
    later = list(generate(5, seed=3, style=style, start=7))
    for one, other in zip(all_at_once[7:], later, strict=True):
        assert one.scene_id == other.scene_id
        assert one.captions == other.captions
        assert np.array_equal(pixels(one), pixels(other))
    other_seed = list(generate(12, seed=4, style=style))
    assert [s.captions for s in other_seed] != [s.captions for s in all_at_once]
    assert len({s.scene_id for s in all_at_once + other_seed}) == 24


def test_a_scene_is_a_small_rgb_picture_of_one_to_four_objects():
    for scene in itertools.chain(generate(200, seed=1), generate(200, seed=1, style="plain")):
        assert scene.image.mode == "RGB"
        assert scene.image.size == (SIDE, SIDE)
        assert 1 <= len(scene.objects) == sum(g.count for g in scene.plan.groups) <= 4
        assert len({tuple(p) for p in pixels(scene).reshape(-1, 3)}) > 4  # edges are smooth


def test_objects_do_not_overlap_and_stand_as_the_relation_says():
    for scene in generate(400, seed=2):
        relation = scene.plan.relation
        first, second, third = ([o for o in scene.objects if o.group == n] for n in range(3))
        for one, other in itertools.combinations(scene.objects, 2):
            apart = np.hypot(one.x - other.x, one.y - other.y)
            if relation == "inside":
                assert apart + 6 < first[0].radius + second[0].radius
            else:
                assert apart > one.radius + other.radius
        if relation == "left":
            assert max(o.x for o in first) < min(o.x for o in second)
        if relation == "above":
            assert max(o.y for o in first) < min(o.y for o in second)
        if relation == "row":
            assert first[0].x < second[0].x < third[0].x
        if relation == "column":
            assert first[0].y < second[0].y < third[0].y


@pytest.mark.parametrize(("palette", "at_once"), [(PLAIN, 2), (DEMO, 3)])
def test_any_colours_that_meet_have_a_background_to_stand_out_from(palette, at_once):
    for colours in itertools.combinations([rgb for rgb, _ in palette.colours.values()], at_once):
        assert any(
            all(np.linalg.norm(np.subtract(ground, rgb)) >= 95 for rgb in colours)
            for ground, _ in palette.backgrounds.values()
        )


def test_five_different_captions_and_one_plain_one():
    for scene in generate(300, seed=5):
        assert len(set(scene.captions)) == 5
        assert all(c == " ".join(c.split()) == c.lower() for c in scene.captions)
    for scene in generate(300, seed=5, style="plain"):
        assert len(scene.captions) == 1


def test_plain_captions_say_what_is_there_and_nothing_of_the_demo():
    scenes = list(generate(3000, seed=6, style="plain"))
    words = {w for s in scenes for c in s.captions for w in c.split()}
    new = {w for s in generate(3000, seed=6) for c in s.captions for w in c.split()} - words
    assert not set(PLAIN.colours) & set(DEMO.colours)
    assert {"orange", "purple", "turquoise", "moon", "checkered", "beside", "under", "little", "background"} <= new
    by_caption = {}
    for scene in scenes:  # a plain caption is the composition in words: one never stands for two
        assert by_caption.setdefault(scene.captions[0], scene.plan.composition) == scene.plan.composition


def test_rows_fill_each_split_and_share_no_composition(demo):
    assert Counter(r.split for r in demo) == dict(zip(SPLITS, SIZES, strict=True))
    groups = {split: {r.group for r in demo if r.split == split} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not groups[one] & groups[other]
    assert len({r.image_id for r in demo}) == len(demo)
    picture = Image.open(io.BytesIO(demo[0].image))
    assert picture.format == "PNG"
    assert picture.size == (SIDE, SIDE)


def test_rows_are_the_same_again(demo):
    assert list(rows(SIZES, seed=0)) == demo
    assert list(rows((3, 1, 1), seed=1)) != list(rows((3, 1, 1), seed=0))


def test_the_split_belongs_to_the_composition_not_to_the_seed():
    seen = {}
    for seed in (0, 1):
        for scene in generate(1500, seed=seed):
            assert seen.setdefault(scene.plan.composition, split_of(scene.plan)) == split_of(scene.plan)


def test_no_look_up_table_would_do():
    whole = list(rows((1500, 1, 256), seed=0))
    train = {c for r in whole if r.split == "train" for c in r.captions}
    test = [c for r in whole if r.split == "test" for c in r.captions]
    unseen = sum(c not in train for c in test) / len(test)
    print(f"test captions that occur nowhere in training: {unseen:.1%}")
    assert unseen >= 0.2
    assert {w for c in test for w in c.split()} <= {w for c in train for w in c.split()}


def test_people_agree_enough_but_not_too_much():
    """CIDEr of one reference against the other four, and of the most frequent training caption."""
    from pycocoevalcap.cider.cider import Cider

    whole = list(rows((1500, 256, 1), seed=0))
    val = {r.image_id: r.captions for r in whole if r.split == "val"}
    frequent = Counter(c for r in whole if r.split == "train" for c in r.captions).most_common(1)[0][0]
    ceiling = Cider().compute_score({k: v[1:] for k, v in val.items()}, {k: v[:1] for k, v in val.items()})[0]
    constant = Cider().compute_score(val, {k: [frequent] for k in val})[0]
    print(f"one reference against the other four: CIDEr {ceiling:.2f}; constant caption {constant:.2f}")
    assert 2.3 <= ceiling <= 3.6
    assert constant < 0.2 * ceiling
