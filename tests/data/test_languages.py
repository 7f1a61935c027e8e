"""English and Japanese in one set: prompts by row, scores in one language, and train with val for a final run."""

import numpy as np
import pytest

from raycap.config import from_dict, load_config
from raycap.data.shards import open_shards, prepare
from raycap.data.store import Store
from raycap.data.stream import fill, local_batches
from raycap.errors import ConfigError, DataError
from raycap.settings import prompt_for

PROMPTS = {"en": "a photo of", "ja": "写真："}


@pytest.fixture(scope="module")
def _mixed(tmp_path_factory):
    """Shards of 6 train, 4 val and 2 test rows; every other one of train and val is Japanese, test English."""
    import json

    from PIL import Image

    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for number, split in enumerate(["train"] * 6 + ["val"] * 4 + ["test"] * 2):
        Image.new("RGB", (16, 16), (number * 20, 0, 90)).save(folder / f"{number}.png")
        ja = number % 2 == 1 and split != "test"
        texts = ["犬がいる", "いぬ"] if ja else ["a dog", "the dog"]
        line = {"image": f"{number}.png", "captions": texts, "split": split, "lang": "ja" if ja else "en"}
        lines.append(json.dumps(line))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    out = tmp_path_factory.mktemp("out") / "shards"
    prepare(from_dict({"data": {"source": str(folder)}}), out)
    return out


@pytest.fixture
def mixed(_mixed):
    return open_shards(_mixed)


def test_the_manifest_counts_languages(mixed):
    assert mixed.languages == {"train": {"en": 3, "ja": 3}, "val": {"en": 2, "ja": 2}, "test": {"en": 2}}
    assert mixed.langs("test") == {} and set(mixed.langs("val").values()) == {"en", "ja"}


def test_scores_are_of_one_language(mixed):
    english = mixed.speaking("en")
    assert list(english.references("val")) == ["6.png", "8.png"] == list(english.groups("val"))
    assert [r["row"] for r in english.iter_rows("val", ("image_id",))] == [0, 2]
    assert set(next(english.iter_rows("val", ("image_id",)))) == {"image_id", "row", "resized_for"}
    assert english.aside(("val", "test")) == {"ja": 2} and mixed.aside(("val",)) == {}
    assert english.constant_caption() == "a dog" and mixed.speaking("ja", ("val",)).constant_caption() == "いぬ"
    assert list(mixed.references("val")) == ["6.png", "7.png", "8.png", "9.png"]
    with pytest.raises(DataError, match=r"no captions in 'ja' in split 'test', but 2 in 'en': set evaluate\.lang"):
        mixed.speaking("ja")


def test_shards_of_before_languages_were_counted(mixed):
    mixed.languages.clear()
    assert len(mixed.speaking("ja").references("val")) == 4


class Prepare:
    """A row preparer that shows which prompt it was given."""

    def __init__(self, prompt):
        self.prompt = prompt

    def __call__(self, row):
        head = [ord(c) % 97 for c in prompt_for(self.prompt, row["lang"])]
        ids = [[*head, *(ord(c) % 97 for c in caption)] for caption in row["captions"]]
        return {"pixels": np.zeros((3, 4, 4), np.uint8), "token_ids": ids, "prompt_lens": [len(head)] * len(ids)}


def test_each_row_gets_the_prompt_of_its_language(mixed, tmp_path):
    store = Store.for_shards(mixed, "train", tmp_path, (3, 4, 4), 40, prompt=PROMPTS)
    fill(store, local_batches(mixed.folder, "train", Prepare(PROMPTS)))
    lengths = store.prompt_lens(np.array([[r, 1] for r in range(6)])).tolist()
    assert lengths == [len(PROMPTS[lang]) for lang in ("en", "ja") * 3]
    assert list(store.langs.values()) == ["en", "ja"] * 3
    assert Store.open(store.folder).langs == store.langs
    with pytest.raises(DataError, match=r"image 1\.png: .*data\.prompt holds prompts for en.*'ja'"):
        list(local_batches(mixed.folder, "train", Prepare({"en": "a photo of"})))


def test_rows_of_a_family_are_tokenised_under_their_own_prompt(mixed):
    from raycap.models import BUILTIN, row_preparer

    rows = mixed.read_rows("train")
    ready = [row_preparer("git", next(iter(BUILTIN)), {"en": "two red rings", "ja": ""}, 24)(row) for row in rows[:2]]
    assert ready[0]["prompt_lens"] == [4, 4] and ready[1]["prompt_lens"] == [1, 1]


def test_a_prompt_for_each_language_in_the_settings():
    text = "data.prompt={en: a photo of, ja: 写真：}"
    assert load_config("shapes-git", [text]).data.prompt == {"en": "a photo of", "ja": "写真："}
    assert from_dict({"data": {"prompt": PROMPTS}}).data.prompt == PROMPTS
    assert load_config("shapes-git", ["data.prompt=a photo: of {x}"]).data.prompt == "a photo: of {x}"
    config = from_dict({"data": {"prompt": PROMPTS}})
    assert from_dict(config.to_dict()) == config
    for bad in ({"en": 3}, {}):
        with pytest.raises(ConfigError, match=r"data\.prompt=.*a text for each language"):
            from_dict({"data": {"prompt": bad}})


def test_train_and_val_as_one(mixed, tmp_path):
    both = Store.for_shards(mixed, "train+val", tmp_path, (3, 4, 4), 40)
    fill(both, local_batches(mixed.folder, "train+val", Prepare("")))
    assert both.count == 10 and both.image_ids == [f"{n}.png" for n in range(10)] and len(both.langs) == 10
    assert both.references["9.png"] == ["犬がいる", "いぬ"]


def test_train_splits_of_the_settings():
    from raycap.tune.space import sample_trials

    def config(splits, **tune):
        return from_dict({"data": {"train_splits": splits}, "tune": tune})

    for bad in (["test"], ["val"], ["train", "test"], []):
        with pytest.raises(ConfigError, match=r"data\.train_splits=.*test is never seen"):
            config(bad)
    with pytest.raises(ConfigError, match=r"data\.train_splits=train,val.*raycap train"):
        sample_trials(config("train,val", trials=2))
    assert len(sample_trials(config(["train", "val"], trials=1, scheduler="none"))) == 1


def test_a_final_run_has_one_rung():
    from raycap.tune.schedule import planned_rungs

    final = {"train": {"steps": 90}, "data": {"train_splits": ["train", "val"]}}
    assert planned_rungs(from_dict(final)) == [90] and planned_rungs(from_dict({"train": {"steps": 90}})) == [
        10,
        30,
        90,
    ]
