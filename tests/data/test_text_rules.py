import random
import re
import unicodedata

import pytest

from raycap.data.text_rules import RULES, caption_key, clean_caption, clean_caption_counted, rules_for
from raycap.files import read_jsonl

EXAMPLES = [(rule.name, before, after) for rule in RULES for before, after in rule.examples]


@pytest.mark.parametrize(("name", "before", "after"), EXAMPLES)
def test_examples(name, before, after):
    rule = next(rule for rule in RULES if rule.name == name)
    assert rule.apply(before) == after
    assert rule.apply(after) == after


def test_every_rule_has_examples_that_change_and_one_that_does_not():
    for rule in RULES:
        assert any(a != b for a, b in rule.examples) and any(a == b for a, b in rule.examples), rule.name
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("before", "after", "lang"),
    [
        ("A child in a pink dress is climbing up a set of stairs in an entry way .",
         "A child in a pink dress is climbing up a set of stairs in an entry way.", "en"),
        ("a\r\ndog\non\rsand", "a dog on sand", "en"),
        ("\ufeffa\x00dog", "a dog", "en"),
        ("犬\u3000が走る", "犬 が走る", "en"),
        ("👩\u200d👧 smile", "👩\u200d👧 smile", "en"),  # English keeps its emojis, joined ones whole
        (" \u2028\n ", "", "en"),
        ("犬\u3000が😀走る！！", "犬が走る!", "ja"),
        ("ＴＶ　ゲーム（Ｗｉｉ）で　遊ぶ。。", "TVゲーム(Wii)で遊ぶ。", "ja"),
        ("空港の<unk>に黒いスーツケースが置いてある", "空港のに黒いスーツケースが置いてある", "ja"),
        ("モニタ－2つ", "モニター2つ", "ja"),
        ("<<unk>unk>", "< unk>", "ja"),  # what is left is no token
        ("un chat , noir", "un chat , noir", "fr"),  # French and others: only what holds for all languages
    ],
)  # fmt: skip
def test_clean_caption(before, after, lang):
    assert clean_caption(before, lang) == after
    assert clean_caption(after, lang) == after


def test_cleaning_twice_changes_nothing_more():
    pieces = [
        *"ab1. ,!?()\"'-~ー〜・。、犬がカＡ１！　😀👍🏽❤",
        "\ufe0f",
        "\u200d",
        "\u20e3",
        "<unk>",
        "...",
        " n't",
        "\n",
        "ｱ",
    ]
    dice = random.Random(0)
    for lang in ("en", "ja", "de"):
        for _ in range(3000):
            text = "".join(dice.choices(pieces, k=dice.randrange(1, 14)))
            once = clean_caption(text, lang)
            assert clean_caption(once, lang) == once, (lang, text)


def test_no_line_break_of_any_kind_survives():
    text = "".join(f"w{chr(code)}" for code in range(0x3100) if not 0xD800 <= code < 0xE000)
    for lang in ("en", "ja"):
        assert len(clean_caption(text, lang).splitlines()) == 1


def test_no_kana_and_no_kanji_is_ever_lost():
    blocks = [(0x3041, 0x3097), (0x30A1, 0x30FB), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2A6E0)]
    for low, high in blocks:
        text = "".join(map(chr, range(low, high)))
        assert clean_caption(text, "ja") == text
    for code in (*range(0xFF66, 0xFF9E), *range(0xF900, 0xFA6E), *range(0x31F0, 0x3200)):
        left = clean_caption(chr(code), "ja")
        assert left and left == unicodedata.normalize("NFKC", chr(code))
    assert clean_caption("𠮷野家の々〆ゝゞヽヾ", "ja") == "𠮷野家の々〆ゝゞヽヾ"


EMOJIS = "😀 👨\u200d👩\u200d👧\u200d👦 🇯🇵 1️⃣ #️⃣ *⃣ 👍🏽 🏳️\u200d🌈 🏴\u200d☠️ ❤️\u200d🔥 👩🏽\u200d⚕️ 🧑\u200d💻"
EMOJIS += " ☀ ⭐ ✈ 🈁 🈚 🅰 ㊙️ ©️ 🫠 🛜"


@pytest.mark.parametrize("emoji", EMOJIS.split(" "))
def test_emojis_leave_no_trace(emoji):
    assert clean_caption(f"犬{emoji}が走る", "ja") == "犬が走る"
    assert clean_caption(emoji, "ja") == ""


def test_what_changed_is_told():
    assert clean_caption_counted("犬！", "ja") == ("犬!", ["narrow"])
    assert clean_caption_counted("A dog .") == ("A dog.", ["close_punctuation"])
    assert clean_caption_counted("A dog.") == ("A dog.", [])
    assert {r.name for r in rules_for("fr")} < {r.name for r in rules_for("en")}


def test_caption_key_ignores_case_and_closing_stop():
    assert caption_key("A Dog .") == caption_key("a dog") != caption_key("a dog runs")


def test_half_a_surrogate_pair_can_be_written_afterwards():
    assert clean_caption("a \ud83d dog").encode("utf-8") == b"a dog"


def test_on_japanese_captions_of_people_only_what_is_meant_changes(shared_data):
    folder = shared_data / "stair_shichimi_ja"
    if not folder.is_dir():
        pytest.skip(f"no stair_shichimi_ja in {shared_data}")
    japanese = re.compile("[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\u3005]")
    changed = 0
    for split in ("val", "test"):
        for row in read_jsonl(folder / f"{split}.jsonl"):
            for caption in row["captions"]:
                cleaned = clean_caption(caption, "ja")
                assert japanese.findall(cleaned) == japanese.findall(caption)
                changed += cleaned != caption
    assert 0 < changed < 50
