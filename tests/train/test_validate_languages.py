"""Rungs score the rows in evaluate.lang alone."""

from types import SimpleNamespace

import pytest

from raycap.config import from_dict
from raycap.train.validate import Validator


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_validation_rows_are_of_one_language(lang):
    ids = [f"i{n}" for n in range(10)]
    langs = {i: "ja" if n % 2 else "en" for n, i in enumerate(ids)}
    config = from_dict({"train": {"val_images": 3}, "evaluate": {"lang": lang}})
    store = SimpleNamespace(image_ids=ids, langs=langs, count=10)
    rows = Validator(None, None, config).rows(store)
    assert {langs[ids[r]] for r in rows} == {lang} and len(rows) == 3 and list(rows) == sorted(set(rows))


def test_a_split_of_one_language_is_spread_evenly_as_before():
    config = from_dict({"train": {"val_images": 4}})
    store = SimpleNamespace(image_ids=[f"i{n}" for n in range(10)], langs={}, count=10)
    assert Validator(None, None, config).rows(store).tolist() == [0, 2, 5, 7]
