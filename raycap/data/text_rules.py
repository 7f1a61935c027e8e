"""Cleaning rules for captions: each a pure function with a table of examples, which is its test and its page in the docs.

A caption passes the rules of its language in order, again and again until nothing changes, so that cleaning a clean
caption changes nothing. No rule removes a kana or a kanji.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from raycap.data.emoji import EMOJI, STRAYS

# What Python's str.splitlines ends a line at. PTBTokenizer, among others, keeps only `\n` apart and then shifts lines.
_LINE_BREAKS = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
# A lone half of a surrogate pair is in no encoding: parquet and Java would raise at it.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069]")
_SPECIAL_TOKENS = re.compile(
    r"<\|[A-Za-z_]{1,30}\|>|</?s>|<(?:unk|pad|bos|eos|sos|mask|start|end|image)>|\[(?:CLS|SEP|PAD|UNK|MASK|BOS|EOS)\]",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")

_KATAKANA = "\u30a1-\u30fa\u30fd-\u30ff\uff66-\uff9d"
_KANA = "\u3041-\u3096\u309d-\u309f" + _KATAKANA
_JAPANESE = _KANA + "\u3005-\u3007\u30fb\u30fc\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3001\u3002\u300c-\u300f"
_AFTER_KATAKANA = re.compile(f"(?<=[{_KATAKANA}ー])[-\u2010-\u2015\u2212\uff0d\u2500]")
_AFTER_KANA = re.compile(f"(?<=[{_KANA}ー])[~\u301c\uff5e]")
_NO_VOWEL = re.compile("(?<=[0-9A-Za-z%\uff10-\uff19\uff05])ー(?=[0-9A-Za-z\uff10-\uff19])")
_SPACE_AT_JAPANESE = re.compile(f"(?<=[{_JAPANESE}]) +| +(?=[{_JAPANESE}])")

_LOUD = re.compile(r"[!?]{2,}")
_REPEATED = re.compile("([,;:、。])\\1+")
_LONG = re.compile("([ー~\u301c])\\1+")
_DOTS = re.compile(r"(?<!\.)\.\.(?!\.)|\.{4,}")
_MIDDLE_DOTS = re.compile("・{2,}")

_BEFORE_PUNCTUATION = re.compile(r"(?<=\S)\s+(?=(?:[,;:!?%]|\.+)(?:[\s\"')\],.;:!?]|$))")
_CLITIC = re.compile(r"(?<=[A-Za-z])\s+(?='(?:s|d|m|re|ve|ll)\b)|(?<=[A-Za-z])\s+(?=n't\b)", re.IGNORECASE)
_INSIDE_BRACKETS = re.compile(r"(?<=[(\[])\s+|\s+(?=[)\]])")
_INSIDE_QUOTES = re.compile(r'"\s*([^"]*?)\s*"')


@dataclass(frozen=True, slots=True)
class Rule:
    """One cleaning rule: `apply` is pure; `examples` are (before, after) and prove it."""

    name: str
    what: str
    apply: Callable[[str], str]
    examples: tuple[tuple[str, str], ...]
    langs: tuple[str, ...] = ()
    """Languages it is for; empty: all."""


def compose(text: str) -> str:
    """Unicode NFC: one code for each composed letter."""
    return unicodedata.normalize("NFC", text)


def unbreak_lines(text: str) -> str:
    """Every Unicode line break becomes a space."""
    return _LINE_BREAKS.sub(" ", text)


def drop_special_tokens(text: str) -> str:
    """Control tokens of tokenisers become a space: in a caption they would be read as commands, not as words."""
    return _SPECIAL_TOKENS.sub(" ", text)


def drop_controls(text: str) -> str:
    """Control characters and half surrogates become a space; what has no width vanishes."""
    return _INVISIBLE.sub("", _CONTROLS.sub(" ", text))


def drop_emojis(text: str) -> str:
    """Emojis become a space: joined ones, flags, keycaps, with skin tones and selectors."""
    return STRAYS.sub("", EMOJI.sub(" ", text))


def mend_long_vowels(text: str) -> str:
    """A dash or tilde typed for the long-vowel mark becomes that mark; the mark typed for a dash becomes a dash."""
    return _NO_VOWEL.sub("-", _AFTER_KANA.sub("ー", _AFTER_KATAKANA.sub("ー", text)))


def narrow(text: str) -> str:
    """NFKC: zenkaku letters, digits and punctuation become hankaku, half-width kana full."""
    return unicodedata.normalize("NFKC", text)


def close_up(text: str) -> str:
    """No space beside a Japanese character: neither between two of them nor between Japanese and Latin."""
    return _SPACE_AT_JAPANESE.sub("", text)


def calm_punctuation(text: str) -> str:
    """Punctuation repeated becomes one; an ellipsis has three dots."""
    text = _LOUD.sub(lambda run: "!?" if len(set(run[0])) == 2 else run[0][0], text)
    text = _MIDDLE_DOTS.sub("...", text)
    return _DOTS.sub(lambda run: "." if len(run[0]) == 2 else "...", _REPEATED.sub(r"\1", text))


def calm_long_marks(text: str) -> str:
    """Long-vowel marks and tildes in a row become one."""
    return _LONG.sub(r"\1", text)


def close_punctuation(text: str) -> str:
    """English: no space before punctuation and clitics, none inside brackets and quotes."""
    text = _INSIDE_BRACKETS.sub("", _CLITIC.sub("", _BEFORE_PUNCTUATION.sub("", text)))
    return _INSIDE_QUOTES.sub(r'"\1"', text)


def collapse_spaces(text: str) -> str:
    """Runs of white space become one space; none is left at the ends."""
    return _SPACES.sub(" ", text).strip()


RULES: tuple[Rule, ...] = (
    Rule("compose", "one code for each composed letter (NFC)", compose, (("cafe\u0301", "caf\u00e9"), ("犬", "犬"))),
    Rule("unbreak_lines", "every Unicode line break is a space", unbreak_lines,
         (*((f"a{mark}dog", "a dog") for mark in ("\r\n", *"\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")),
          ("a dog", "a dog"))),
    Rule("drop_special_tokens", "control tokens of tokenisers are removed", drop_special_tokens,
         (("空港の<unk>に", "空港の に"), ("<s>a dog</s>", " a dog "), ("a dog<|endoftext|>", "a dog "),
          ("[CLS] a dog [SEP]", "  a dog  "), ("1 < 2 > 0", "1 < 2 > 0"), ("UNKと書かれた", "UNKと書かれた"))),
    Rule("drop_controls", "control and invisible characters are removed", drop_controls,
         (("\ufeffa\x00dog", " a dog"), ("do\u00adg", "dog"), ("\u202ea dog\u202c", "a dog"), ("a\ud83ddog", "a dog"),
          ("👩\u200d👧", "👩\u200d👧"))),
    Rule("drop_emojis", "emojis are removed, joined ones, flags and keycaps too", drop_emojis,
         (("犬😀が走る", "犬 が走る"), ("家族👨\u200d👩\u200d👧\u200d👦です", "家族 です"), ("旗🇯🇵🇫🇷", "旗  "),
          ("番号1️⃣と#⃣", "番号 と "), ("手👍🏽", "手 "), ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f旗", " 旗"),
          ("愛❤️と☀と⭐", "愛 と と "), ("❤️\u200d🔥と🏳️\u200d🌈", " と "), ("㊗️祝", " 祝"), ("㊗と㈱", "㊗と㈱"),
          ("漢字かなカナｶﾅ々〆ゝヾー", "漢字かなカナｶﾅ々〆ゝヾー"), ("2台の#1と*", "2台の#1と*"), ("★と♪と〒", "★と♪と〒"),
          ("葛\U000e0100飾", "葛\U000e0100飾")), ("ja",)),
    Rule("mend_long_vowels", "a dash typed for ー is ー, and ー typed for a dash is a dash", mend_long_vowels,
         (("モニタ－2つ", "モニター2つ"), ("ヌ～が", "ヌーが"), ("40%ー70%OFF", "40%-70%OFF"), ("ケーキ", "ケーキ"),
          ("1-2", "1-2"), ("ビール", "ビール")), ("ja",)),
    Rule("narrow", "zenkaku letters, digits and punctuation are hankaku, half-width kana full (NFKC)", narrow,
         (("ＴＶと２台", "TVと2台"), ("犬！？（白）", "犬!?(白)"), ("ｱｲｽ｡", "アイス。"), ("犬\u3000と", "犬 と"),
          ("「犬」、猫。", "「犬」、猫。")), ("ja",)),
    Rule("calm_punctuation", "repeated punctuation is one", calm_punctuation,
         (("すごい!!!", "すごい!"), ("何!?!?", "何!?"), ("犬。。。", "犬。"), ("犬、、猫", "犬、猫"), ("犬・・・", "犬..."),
          ("a dog..", "a dog."), ("a dog.....", "a dog..."), ("a dog...", "a dog..."), ("3:00, 4:00", "3:00, 4:00")),
         ("en", "ja")),
    Rule("calm_long_marks", "repeated long-vowel marks and tildes are one", calm_long_marks,
         (("すごーーーい", "すごーい"), ("犬~~", "犬~"), ("ケーキ", "ケーキ")), ("ja",)),
    Rule("close_up", "no space beside Japanese characters", close_up,
         (("TV 画面 を見る", "TV画面を見る"), ("犬 が 走る", "犬が走る"), ("MT AIRYの白いバス", "MT AIRYの白いバス")), ("ja",)),
    Rule("close_punctuation", "English: no space before punctuation and clitics, none inside brackets and quotes",
         close_punctuation,
         (("A dog , running .", "A dog, running."), ("Who 's it ?", "Who's it?"), ("It does n't", "It doesn't"),
          ("two ( small ) dogs", "two (small) dogs"), ('a sign " stop " here', 'a sign "stop" here'),
          ("a .5 m fish", "a .5 m fish"), ("wait ... what", "wait... what"), ("50 % of it", "50% of it"),
          ("a dog.", "a dog.")), ("en",)),
    Rule("collapse_spaces", "one space for many, none at the ends", collapse_spaces,
         (("  a dog \t on  sand ", "a dog on sand"), ("a dog", "a dog"), (" \u3000 ", ""))),
)  # fmt: skip
"""In the order in which they are applied; their names go into the manifest."""

_ROUNDS = 8


def rules_for(lang: str) -> tuple[Rule, ...]:
    """The rules that a caption in `lang` passes: those of all languages, and its own."""
    return tuple(rule for rule in RULES if not rule.langs or lang in rule.langs)


_BY_LANG = {lang: rules_for(lang) for lang in ("en", "ja", "")}


def clean_caption(text: str, lang: str = "en") -> str:
    """The caption by all rules of its language; empty when nothing is left. Applying it twice changes nothing more."""
    return clean_caption_counted(text, lang)[0]


def clean_caption_counted(text: str, lang: str = "en") -> tuple[str, list[str]]:
    """The cleaned caption, and the names of the rules that changed it."""
    rules = _BY_LANG.get(lang, _BY_LANG[""])
    changed: dict[str, None] = {}
    for _ in range(_ROUNDS):  # what one rule leaves may be another's business, as `<<unk>unk>` is
        before = text
        for rule in rules:
            after = rule.apply(text)
            if after != text:
                changed[rule.name] = None
                text = after
        if text == before:
            break
    return text, list(changed)


def caption_key(text: str, lang: str = "en") -> str:
    """The caption with case and closing punctuation taken away, to tell whether two captions say the same."""
    return clean_caption(text, lang).casefold().rstrip(" .!。")
