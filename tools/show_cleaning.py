"""What the cleaning rules of a language change in the captions of JSON-lines files.

    python tools/show_cleaning.py --lang ja stair_shichimi_ja/val.jsonl stair_shichimi_ja/test.jsonl

Takes `captions` (a list) and, where a row has them, `candidates` ({"caption": ...}) of each row; prints a Markdown table: the rule,
how many captions it changed, and some of them before and after all rules.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from raycap.data.text_rules import clean_caption_counted, rules_for
from raycap.files import read_jsonl

EXAMPLES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", required=True)
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    captions = []
    for file in arguments.files:
        for row in read_jsonl(file):
            captions += [*row["captions"], *(c["caption"] for c in row.get("candidates", []))]
    changed: Counter[str] = Counter()
    shown: dict[str, dict[str, str]] = {}
    altered = 0
    for caption in captions:
        cleaned, rules = clean_caption_counted(caption, arguments.lang)
        altered += cleaned != caption
        for rule in rules:
            changed[rule] += 1
            examples = shown.setdefault(rule, {})
            if len(examples) < EXAMPLES:
                examples.setdefault(caption, cleaned)
    print(f"{altered:,} of {len(captions):,} captions changed\n")
    print("| rule | captions | before | after |\n|---|---|---|---|")
    for rule in rules_for(arguments.lang):
        pairs = list(shown.get(rule.name, {}).items()) or [("", "")]
        for n, (before, after) in enumerate(pairs):
            head = f"| `{rule.name}` | {changed[rule.name]:,} |" if n == 0 else "| | |"
            print(f"{head} {_cell(before)} | {_cell(after)} |")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
