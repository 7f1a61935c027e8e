"""`raycap explore`: what an image set holds, printed and as an offline page."""

from __future__ import annotations

import argparse
from pathlib import Path

from raycap.cli.common import add_json, add_plain, add_settings, preset_list, print_json
from raycap.cli.prepare import names_model, source_config
from raycap.errors import UsageError

NAME = "explore"
HELP = "describe an image set: counts, lengths, words, repetition, likeness of captions, sizes, leaks"
EXAMPLES = f"""\
examples:
  raycap explore my-photos
  raycap explore my-shards --out about-my-photos --json
  raycap explore my-photos model.path=microsoft/git-base        lengths in that model's tokens too
  raycap explore my-photos --clip ViT-B-32/openai               cosines of CLIP's text embeddings too

The page is FOLDER/explore.html, the figures FOLDER/explore.json. What each figure is: docs/explore.md.
{preset_list()}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="PRESET|FOLDER", help="an image set, shards of it, or a preset with data.source"
    )
    add_settings(parser)
    parser.add_argument("--out", metavar="FOLDER", help="where the page goes (default: results/explore-<name>)")
    parser.add_argument(
        "--sample", type=int, default=2000, metavar="N", help="images whose captions are compared (2000)"
    )
    parser.add_argument("--clip", metavar="MODEL", help="an open_clip model: name/weights, or a folder")
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.sample < 1:
        raise UsageError(f"--sample {args.sample} must be at least 1")
    named = any(s.startswith("data.leaks=") for s in args.settings)
    # A set is looked at to learn of its leaks: they are told, and stop nothing.
    config = source_config(args.source, args.settings if named else ["data.leaks=allow", *args.settings])
    out = Path(args.out or f"results/explore-{config.run.name or args.source}").expanduser()
    tokens = names_model(args.source, args.settings)
    from raycap.pipeline import explore

    found = explore(config, out, sample=args.sample, tokens=tokens, clip=args.clip, plain=args.plain)
    if args.json:
        print_json({"folder": str(out), **found})
        return 0
    from raycap.report.explore import table

    rows = table(found)
    wide = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{wide}}  {value}")
    for note in found["notes"]:
        print(f"note: {note}")
    print(f"page: {out / 'explore.html'}")
    return 0
