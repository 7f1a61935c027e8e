"""Signatures are read back, and scores that were computed differently are not set side by side."""

from __future__ import annotations

import pytest

from raycap.errors import DataError
from raycap.evaluate.signature import differences, parse, require_same, signature


def test_read_back():
    text = signature("cider", variant="D", tok="ptb", df="refs@0a1b2c3d", refs="5", lang="en", n=12)
    found = parse(text)
    assert found["metric"] == "cider" and found["df"] == "refs@0a1b2c3d" and found["n"] == "12"
    assert differences(text, text) == {}


def test_what_differs_is_named():
    one = signature("cider", variant="D", tok="ptb", df="refs@0a1b2c3d", n=12)
    other = signature("cider", variant="D", tok="ptb-py", df="refs@ffffffff", n=12)
    assert set(differences(one, other)) == {"tok", "df"}
    require_same(one, one)
    with pytest.raises(DataError, match=r"A and B.*tok ptb against ptb-py, df refs@0a1b2c3d against refs@ffffffff"):
        require_same(one, other, ("A", "B"))
    require_same(one, other, ignore=("tok", "df"))
    with pytest.raises(DataError, match="metric cider against bleu4"):
        require_same(one, signature("bleu4", n=12), ignore=("variant", "tok", "df"))
