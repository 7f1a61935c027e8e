"""The model verdict over several candidates: each metric's own difference, Holm, and what is refused."""

from __future__ import annotations

import pytest

from raycap.errors import ConfigError, DataError
from raycap.evaluate import score
from raycap.evaluate.verdict import COMPARED, model_verdicts

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")


@pytest.fixture
def candidates(golden):
    predictions = golden[0]
    return {
        "ours": predictions,
        "same": dict(reversed(predictions.items())),
        "bad": dict.fromkeys(predictions, "a cat"),
    }


@pytest.mark.parametrize("metric", sorted(set(COMPARED) - {"meteor"}))
def test_differences_are_those_of_the_metric(metric, candidates, golden):
    rows = model_verdicts(candidates, golden[1], metric=metric, resamples=300)
    assert [r["name"] for r in rows] == list(candidates) and "difference" not in rows[0]
    wanted = {n: score(c, golden[1], (COMPARED[metric][0],), tokeniser="ptb-py")[metric] for n, c in candidates.items()}
    for row in rows:
        assert (
            row["score"] == pytest.approx(wanted[row["name"]].score)
            and row["signature"] == wanted[row["name"]].signature
        )
    same, bad = rows[1:]
    assert same["difference"] == 0 and same["p_holm"] == 1 and same["verdict"].startswith("cannot be told apart")
    assert bad["difference"] == pytest.approx(bad["score"] - rows[0]["score"])
    assert (
        bad["verdict"] == "worse" and bad["p_holm"] == pytest.approx(2 * bad["p"]) and "bad is worse" in bad["sentence"]
    )


def test_meteor_is_compared_by_its_segments(needs_java, candidates, golden):
    rows = model_verdicts(candidates, golden[1], metric="meteor", resamples=300)
    each = score(candidates["bad"], golden[1], ("meteor",))["meteor"].per_image
    ours = score(candidates["ours"], golden[1], ("meteor",))["meteor"].per_image
    assert rows[2]["difference"] == pytest.approx((sum(each.values()) - sum(ours.values())) / len(ours))
    assert "METEOR segment mean" in rows[2]["sentence"]


def test_whole_groups_are_drawn(candidates, golden):
    alone = model_verdicts(candidates, golden[1], resamples=1000)[2]
    together = model_verdicts(candidates, golden[1], resamples=1000, groups=dict.fromkeys(golden[0], "study"))[2]
    assert together["difference"] == alone["difference"] and together["p"] == 1 and "one group" in together["sentence"]
    assert together["verdict"].startswith("cannot be told apart")


def test_many_comparisons_take_a_verdict_back(candidates, golden):
    """300 resamples show at best p = 1 / 301, which thirty comparisons lift above 5 %; the sentence says it too."""
    many = {"ours": candidates["ours"], **{f"bad{n}": candidates["bad"] for n in range(30)}}
    for row in model_verdicts(many, golden[1], resamples=300)[1:]:
        assert row["high"] < 0 and row["p"] == 1 / 301 and row["p_holm"] == pytest.approx(30 / 301)
        assert row["verdict"] == "cannot be told apart at this size"
        assert "cannot be told apart once all 30 comparisons are counted (Holm): CIDEr -" in row["sentence"]


def test_what_cannot_be_compared(candidates, golden):
    with pytest.raises(ConfigError, match="'distinct1' has no verdict"):
        model_verdicts(candidates, golden[1], metric="distinct1")
    with pytest.raises(DataError, match="different images"):
        model_verdicts({**candidates, "few": {"g01": "a"}}, golden[1])
