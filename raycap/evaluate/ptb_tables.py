"""What the Penn Treebank tokeniser of Stanford CoreNLP 3.4.1 makes of single characters and abbreviations.

Found by asking the Java program about every character of the basic plane and every word of up to four letters; ranges
are in hexadecimal.
"""

from __future__ import annotations

import unicodedata

_ALONE = (
    "a1 a5-a9 ac ae-b4 b6-b9 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a 66d "
    "6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044 2070 2074-207e "
    "2080-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 "
    "214a-214d 214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 "
    "ffe5-ffe6 "
)
"""Signs that are tokens of their own."""

_JOIN = (
    "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 "
    "615-61a 64b-65e 660-669 670 6d6-6e4 6e7-6ed 6f0-6f9 6fd-6fe 70f 711 730-74c 7a6-7b0 7c0-7c9 7eb-7f3 900-903 "
    "93c 93e-94e 951-955 962-963 966-96f 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 9e6-9ef a01-a03 a3c "
    "a3e-a4f a66-a6f a81-a83 abc abe-acf ae6-aef b66-b6f b82 bbe-bc2 bc6-bc8 bca-bcd be6-bef c01-c03 c3e-c56 "
    "c66-c6f ce6-cef d3e-d44 d46-d48 d66-d6f e31 e34-e3a e47-e4e e50-e59 eb1 eb4-ebc ec8-ecd ed0-ed9 f20-f29 "
    "1040-1049 1090-1099 17e0-17e9 1810-1819 1885-1886 1946-194f 19d0-19d9 1a80-1a89 1a90-1a99 1b50-1b59 1bb0-1bb9 "
    "1c40-1c49 1c50-1c59 a620-a629 a8d0-a8d9 a900-a909 a9d0-a9d9 aa50-aa59 abf0-abf9 ff10-ff19 "
)
"""Marks, digits and signs, beside the letters, that are part of a word."""

_LATE = (
    "37f 528-52f 560 588 5ef 860-86a 870-887 889-88e 8a1 8ad-8c9 978 980 9fc af9 c34 c5a c5d c80 cdd d04 d54-d56 "
    "d5f e86 e89 e8c e8e-e93 e98 ea0 ea8-ea9 eac 13f5 13f8-13fd 16f1-16f8 170d 171f 1878 191d-191e 19b0-19c0 "
    "19c8-19c9 1b4c 1c80-1c88 1c90-1cba 1cbd-1cbf 1cf2-1cf3 1cfa 2c2f 2c5f 312e-312f 31bb-31bf 4db6-4dbf 9fcd-9fff "
    "a698-a69d a78f a794-a79f a7ab-a7ca a7d0-a7d1 a7d3 a7d5-a7d9 a7f2-a7f7 a8fd-a8fe a9e0-a9e4 a9e6-a9ef a9fa-a9fe "
    "aa7e-aa7f ab30-ab5a ab5c-ab69 ab70-abbf "
)
"""Letters younger than the tokeniser: it drops them."""

_KEEP_STOP = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr "
    "co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov "
    "govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mlle mme "
    "mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pvt rd rep reps rev rt sen "
    "sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis "
    "wisc wm wyo"
)
ABBREVIATIONS = frozenset(_KEEP_STOP.split())
"""Keep their full stop, in any case of letters."""
ABBREVIATIONS_NOT_UPPER = frozenset(("mfg", "mtg", "ppte", "ppty", "pte", "ptes", "pty", "ptys"))
"""The same, but not in capitals throughout."""
ABBREVIATIONS_CAPITAL = frozenset(("ark", "az", "del", "ill", "la", "mass", "miss", "ore", "pa", "tex", "wash"))
"""Words of the language unless they begin with a capital."""
ABBREVIATIONS_NUMBERED = frozenset(("art", "ca", "fig", "figs", "no", "nos", "op", "pp", "prop"))
"""Keep their full stop before a number."""
ALL_ABBREVIATIONS = ABBREVIATIONS | ABBREVIATIONS_NOT_UPPER | ABBREVIATIONS_CAPITAL | ABBREVIATIONS_NUMBERED

LETTER, ALONE, GONE = "é", "§", "\0"
"""How other characters look to the rules: part of a word, a token of its own, or nothing but an end of tokens."""

_AS = {
    "\xa0": " ", "֊": "-", "‐": "-", "‑": "-", "’": "'", "\x92": "'",
    "‘": "“", "“": "“", "”": "“", "\x91": "“", "\x93": "“", "\x94": "“",
    "\x80": ALONE, "¤": ALONE, "₠": ALONE, "€": ALONE, "£": ALONE, "¢": ALONE,
    "¼": ALONE, "½": ALONE, "¾": ALONE, "⅓": ALONE, "⅔": ALONE, "⁄": "⁄",
}  # fmt: skip
WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\x80": "$", "¤": "$", "₠": "$", "€": "$", "£": "#", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}  # fmt: skip
"""Tokens that are written otherwise than they came."""


def _codes(ranges: str) -> frozenset[int]:
    found: set[int] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


class Classes(dict):
    """A table for `str.translate` from characters beyond ASCII to what the rules see; filled as characters come."""

    def __init__(self) -> None:
        super().__init__({ord(char): seen for char, seen in _AS.items()})
        self._alone, self._join, self._late = _codes(_ALONE), _codes(_JOIN), _codes(_LATE)

    def __missing__(self, code: int) -> str | int:
        if 32 <= code < 127:
            seen: str | int = code
        elif code in self._alone:
            seen = ALONE
        elif code > 0xFFFF or code in self._late:
            seen = GONE
        elif code in self._join or unicodedata.category(chr(code))[0] == "L":
            seen = LETTER
        else:
            seen = GONE
        self[code] = seen
        return seen
