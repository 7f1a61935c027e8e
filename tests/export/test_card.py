"""The card says what the folder is, and nothing of the machine it was made on."""

from __future__ import annotations

import yaml

from raycap.config import ExportSettings
from raycap.export.card import CardFacts, model_card
from raycap.export.gate import judge

GATE = judge(adapter=2.0, merged=1.9, merged_dequantised=1.98, merged_nf4=1.5, settings=ExportSettings()).to_dict()


def card(base="microsoft/git-base-coco", **facts):
    known = CardFacts(
        name="run", base=base, data="/home/me/pictures/cats", data_sha256="ab12", prompt="a photo of", **facts
    )
    return model_card(known, variant="merged-nf4", onto="dequantised", dtype="float16", gate=GATE)


def test_front_matter_is_yaml_that_the_hub_reads():
    _, head, _ = card().split("---\n", 2)
    matter = yaml.safe_load(head)
    assert matter["base_model"] == "microsoft/git-base-coco"
    assert matter["library_name"] == "transformers"
    for local in ("/models/git", "./git/base", "~/m/git", "builtin:tiny-git"):
        assert "base_model" not in yaml.safe_load(card(local).split("---\n", 2)[1])


def test_scores_adapter_and_verdict():
    text = card(trial="t03", adapter={"rank": 8, "lr": 0.0005, "targets": ("query", "value")})
    for line in (
        "| trial | t03 |",
        "| lr | 0.0005 |",
        "| targets | query, value |",
        "| merged on the dequantised weights | 1.9800 |",
        "| prompt | a photo of |",
        "| merged onto | the base's dequantised weights |",
        "a LoRA adapter folded into",
    ):
        assert line in text
    assert "a DoRA adapter folded into" in card(adapter={"kind": "DoRA", "base in": "8 bits"})
    assert "merged +1.00%, NF4 +25.00%. The variant promoted to serving passed." in text


def test_no_path_of_this_machine():
    assert "/home/me" not in card("/home/me/models/git") and "| model | git |" in card("/home/me/models/git")
    assert "| source | cats |" in card()


def test_a_cell_cannot_break_the_table():
    assert "| trial | a\\|b c |" in card(trial="a|b\nc")
