"""The verdict on ready scores, and what a person reads when it is no."""

from __future__ import annotations

import json
import math

import pytest

from raycap.config import ExportSettings
from raycap.errors import GateError
from raycap.export.gate import judge, require_passed
from raycap.files import read_json, write_json

KEYS = [
    "split", "metric", "adapter", "merged", "merged_dequantised", "merged_nf4", "drop_merged", "drop_nf4", "max_drop",
    "passed",
]  # fmt: skip


def verdict(adapter=2.0, merged=1.9, merged_dequantised=1.98, merged_nf4=1.8, **settings):
    return judge(
        adapter=adapter,
        merged=merged,
        merged_dequantised=merged_dequantised,
        merged_nf4=merged_nf4,
        settings=ExportSettings(**settings),
    )


def test_keys_are_exactly_those_of_the_run_folder():
    assert list(verdict().to_dict()) == KEYS


def test_the_better_merge_is_kept_and_drops_are_relative_to_the_adapter():
    result = verdict()
    assert (result.kept, result.drop_merged, result.drop_nf4) == (
        "dequantised",
        pytest.approx(0.01),
        pytest.approx(0.1),
    )
    assert verdict(merged=1.99).kept == "original"
    assert verdict(merged=1.98).kept == "dequantised"
    assert verdict(merged=math.nan).kept == "dequantised"
    assert verdict(merged_dequantised=math.nan).kept == "original"


def test_unquantised_base_has_one_way_of_merging():
    result = verdict(merged_dequantised=None)
    assert (result.kept, result.merged_dequantised, result.drop_merged) == ("original", None, pytest.approx(0.05))


def test_the_promoted_variant_decides():
    assert verdict(promote="merged").passed
    assert not verdict(promote="merged-nf4").passed
    assert verdict(promote="merged-nf4", max_drop=0.11).passed
    assert verdict(adapter=2.0, merged=2.0, merged_dequantised=1.0, max_drop=0.0).passed


def test_a_gain_is_a_negative_drop_and_passes():
    result = verdict(merged=2.2)
    assert result.drop_merged == pytest.approx(-0.1)
    assert result.passed


@pytest.mark.parametrize(
    "scores", [{"adapter": 0.0}, {"adapter": math.nan}, {"merged": math.nan, "merged_dequantised": None}]
)
def test_what_cannot_be_told_does_not_pass(scores, tmp_path):
    result = verdict(**scores)
    assert not result.passed and result.drop_merged is None
    with pytest.raises(GateError, match="no relative drop can be told"):
        require_passed(result, "merged")
    write_json(tmp_path / "gate.json", result.to_dict())
    assert list(json.loads((tmp_path / "gate.json").read_text())) == KEYS
    assert read_json(tmp_path / "gate.json")["drop_merged"] is None


def test_the_message_names_drop_limit_and_remedy():
    with pytest.raises(GateError) as caught:
        require_passed(verdict(promote="merged-nf4"), "merged-nf4")
    text = str(caught.value)
    for part in ("merged-nf4 was not promoted", "cider on val", "2.0000", "1.8000", "10.0%", "export.max_drop=0.05"):
        assert part in text
    assert "Nothing is served" in text
    assert "export.promote=merged" in text
    with pytest.raises(GateError) as caught:
        require_passed(verdict(merged=1.0, merged_dequantised=1.1, merged_nf4=0.5), "merged")
    assert "45.0%" in str(caught.value) and "export.promote" not in str(caught.value)
