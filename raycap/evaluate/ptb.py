"""Penn Treebank tokenisation of English captions in pure Python, as pycocoevalcap has it done in Java.

The rules are those that CoreNLP's PTBTokenizer shows from outside: of all rules that match at a place the longest match
is the token, and the first rule among equals. Lower case comes last, and pycocoevalcap's list of punctuation is left
out. tests/evaluate/test_ptb.py compares it with the Java program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from raycap.evaluate import ptb_tables as tables

# Where Python, Java or Unicode end a line. In Java's input each would begin a new caption.
LINE_BREAKS = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""pycocoevalcap's list. Lower case comes before it, so brackets stay in the caption as -lrb- and -rrb-."""

L = "[A-Za-zé]"
X = "[A-Za-zé0-9]"
_WORD = f"{L}{X}*"
_HYPHENED = f"{X}+(?:-{X}+)*"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z][A-Za-z0-9]*)*"
_EMAIL = r"[A-Za-z0-9][^ \"<>|(){}]*@(?:[^ \"<>|(){}.]+\.)*[^ \"<>|(){}.]+"

# A rule with groups takes its first group as the token; what follows it is looked at, and counts as length.
_ALNUM_RULES = [
    rf"({L}+)('(?i:[msd]|re|ve|ll))(?![A-Za-z])",
    rf"({L}*[A-MO-Za-mo-zé])([Nn]['`][Tt])",
    r"[Nn]['`][Tt]",
    rf"{_WORD}(?:[.!?]{_WORD})*",
    rf"{X}+(?:[.,]{X}+)*(?:-{X}+)+",
    r"[A-Za-z](?:\.[A-Za-z])*\.",
    rf"(?:[A-Za-z]\.)+(?:-{X}+)+",
    r"[Pp][Hh]\.[Dd]\.",
    rf"{_HYPHENED}(?:_{_HYPHENED})*",
    rf"({_HYPHENED}(?:_{_HYPHENED})*\.)([,;:])",
    rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
    r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    r"[Cc]\+\+|[CcFf]#|[A-Z]+\$",
    r"(?:[Aa]nti|[Pp]ro)-",
    r"\d+(?:[.:,]\d+)*",
    r"(?:\d{1,4}[- ])?\d{1,4}[/⁄]\d{1,4}",
    r"(?:\d{2,4}[- ])?\d{2,4}[- ]\d{3,4}[- ]?\d{3,5}",
    rf"{X}+(?:\.{X}+)*\.(?:bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|pdf|php|pl|png|ppt"
    rf"|ps|py|sql|tar|txt|wav|x|xml|zip)(?!{X})",
    rf"{_EMAIL}>?",
    r"https?://[^ \0\"<>|()]+[^ \0\"<>|().?!,:;-]",
    r"www\.[^ \0\"<>|()/]+(?:/[^ \0\"<>|()]*)?[^ \0\"<>|().?!,:;-]",
    rf"{X}{X}+(?:\.{X}+)*\.(?:com|net|org|edu)(?:/[^ \0\"<>|()]*[^ \0\"<>|().?!,:;-])?(?!-)",
    r"(?:[Oo]l|[dljDLJ]|[Dd]unkin|[Ss]omethin)'",
    r"([Yy]')(?=[a-z])",
    rf"[A-HJ-XZdlno]'{L}{{2,}}|[Oo]'o",
    rf"{L}+[aeiouy]'[aeiouA-Z]{L}*",
    r"[Cc]ap'n|[Cc]'mon|[Ee]'er|[Ee]v'ry|[Ll]i'l|[Nn]at'l|[Nn]or'easter|[Ss]'mores|[Cc]ont'd\.",
]
_APOSTROPHE_RULES = [
    r"'(?i:[msd]|re|ve|ll)(?![A-Za-z])",
    r"'(?:[Ee][Mm]|[Cc]ause|[Tt]ill?|[Nn]'|[Nn](?![A-Za-zé]))",
    r"('[Tt])([Ii][Ss]|[Ww][Aa][Ss])",
    r"'\d\d(?= |$)|'[2-9]0s",
    r"'_'|''",
]
_CURLY_RULES = [  # the same with a curly one
    r"'(?i:[msd]|re|ve|ll)(?![A-Za-z])",
    r"'(?:[Ee][Mm]|[Cc]ause|[Tt]ill?|[Nn]'?)",
    r"'\d\d(?= |$)|'[2-9]0s",
]
_NUMBER = r"[+-]?\d*(?:[.:,]\d+)+|[+-]\d+"
_SMILEYS = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>']_?[-^x=~<>']\)"
_OTHER_RULES = [
    _NUMBER,
    _SMILEYS,
    r"#[A-Za-zé]+",
    r"@[A-Za-z_][A-Za-z_0-9]*",
    r"[!?]+",
    r"\\\*|\*\*",
    r"#+",
    r"@+",
    r"_+",
    r"-{5,}",
    r"-+",
    r"\((?:\d{2,3})\) ?\d{3,4}[- ]?\d{3,5}",
    r"&(?i:amp|lt|gt|quot|apos|nbsp|[mn]dash);",
    r"&#\d+;|&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq);",
    r"<[!?][A-Za-z-][^>]*>",
    r"</?[A-Za-z][\w:.-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */? *>",
    rf"<{_EMAIL}>?",
    r"<<|>>",
    r".",
]
_ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "",
    "&apos;": "",
    "&nbsp;": "",
    "&mdash;": "",
    "&ndash;": "",
}

_SPLIT = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"),
}  # fmt: skip
# Most of a caption: a plain word, with nothing after it that another rule could take in.
_PLAIN = re.compile(r"([A-Za-z][A-Za-z0-9]*)(?= |$|, |,$)")
_PLAIN_AT_STOP = re.compile(r"([A-Za-z]{2,})\.(?= |$)")
_ABBREVIATION = re.compile(r"([A-Za-z]+)\.")
_BEFORE_NUMBER = re.compile(r" ?\d")
_LETTERS = re.compile(r"[A-Za-zé0-9]")


class Ptb:
    """Tokeniser of one caption at a time; its rules are compiled once."""

    def __init__(self) -> None:
        self._classes = tables.Classes()
        self._alnum = [re.compile(rule) for rule in _ALNUM_RULES]
        self._apostrophe = [re.compile(rule) for rule in [*_APOSTROPHE_RULES, *_OTHER_RULES]]
        self._curly = [re.compile(rule) for rule in [*_CURLY_RULES, *_OTHER_RULES]]
        self._other = [re.compile(rule) for rule in _OTHER_RULES]

    def __call__(self, text: str) -> str:
        """The caption in lower case, its tokens joined by single spaces, without punctuation."""
        return " ".join(self.tokens(text))

    def tokens(self, text: str) -> list[str]:
        text = LINE_BREAKS.sub(" ", text).replace("\xad", "")
        seen = text if text.isascii() and text.isprintable() else text.translate(self._classes)
        found: list[str] = []
        at, end = 0, len(seen)
        while at < end:
            char = seen[at]
            if char == " " or char == tables.GONE:
                at += 1
                continue
            plain = _PLAIN.match(seen, at)
            if plain:
                word = plain[1].lower()
                found.extend(_SPLIT.get(word) or (word,))
                at = plain.end()
                continue
            plain = _PLAIN_AT_STOP.match(seen, at)
            if plain and (word := plain[1].lower()) not in tables.ALL_ABBREVIATIONS:
                found.extend(_SPLIT.get(word) or (word,))
                at = plain.end()
                continue
            at = self._token(text, seen, at, found)
        return found

    def _token(self, text: str, seen: str, at: int, found: list[str]) -> int:
        """Add the token that begins at `at`; returns where it ends."""
        char = seen[at]
        if _LETTERS.match(char):
            rules = self._alnum
        elif char == "'":
            rules = self._apostrophe if text[at] == "'" else self._curly
        else:
            rules = self._other
        length, stop = 0, at + 1
        for rule in rules:
            match = rule.match(seen, at)
            if match and match.end() - at > length:
                length = match.end() - at
                stop = match.end(1) if match.re.groups else match.end()
        abbreviation = _ABBREVIATION.match(seen, at)
        if abbreviation:
            before_number = _BEFORE_NUMBER.match(seen, abbreviation.end())
            ahead = before_number.end() - at if before_number else 0
            if abbreviation.end() - at > length and _abbreviates(abbreviation[1]):
                length, stop = abbreviation.end() - at, abbreviation.end()
            elif ahead > length and abbreviation[1].lower() in tables.ABBREVIATIONS_NUMBERED:
                length, stop = ahead, abbreviation.end()
        if length < 2 and text[at] in _QUOTES:
            return self._quotes(text, at, found)
        token = text[at:stop]
        if token in tables.WRITTEN:
            found.append(tables.WRITTEN[token])
        else:
            self._add(token, found)
        return stop

    def _quotes(self, text: str, at: int, found: list[str]) -> int:
        """Two curly quotes side by side are one token, which the list of punctuation may not know."""
        stop = at
        while stop < min(at + 2, len(text)) and text[stop] in _QUOTES:
            stop += 1
        token = "".join(_QUOTES[char] for char in text[at:stop])
        if token not in PUNCTUATION:
            found.append(token)
        return stop

    def _add(self, token: str, found: list[str]) -> None:
        lower = token.lower()
        if lower in _SPLIT:
            found.extend(_SPLIT[lower])
            return
        if lower in _ENTITIES:
            lower = _ENTITIES[lower]
        elif "(" in lower or ")" in lower:  # smileys and telephone numbers
            lower = lower.replace("(", "-lrb-").replace(")", "-rrb-")
        if lower in _CONTRACTIONS:
            lower = _CONTRACTIONS[lower]
        lower = lower.replace(" ", "\xa0").replace("&amp;", "&")
        if lower and lower not in PUNCTUATION and lower not in _DROPPED:
            found.append(lower)


_QUOTES = {"“": "``", "”": "''", "‘": "`", "’": "'", "`": "`", "\x91": "`", "\x92": "'", "\x93": "``", "\x94": "''"}
_CONTRACTIONS = {f"{a}{c}": f"'{c}" for a in "’\x92" for c in ("s", "d", "m", "re", "ve", "ll")} | {
    "n’t": "n't",
    "n\x92t": "n't",
}
_DROPPED = frozenset(['"', "‐", "‑", "֊", "---", "----"])


def _abbreviates(word: str) -> bool:
    lower = word.lower()
    if lower in tables.ABBREVIATIONS:
        return True
    if lower in tables.ABBREVIATIONS_NOT_UPPER:
        return not word.isupper()
    return lower in tables.ABBREVIATIONS_CAPITAL and word[0].isupper()


def tokenise(captions: Sequence[str]) -> list[str]:
    """Each caption tokenised; the rules are compiled at the first call."""
    global _PTB
    if _PTB is None:
        _PTB = Ptb()
    return [_PTB(caption) for caption in captions]


_PTB: Ptb | None = None
