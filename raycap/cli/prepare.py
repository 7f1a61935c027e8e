"""`raycap prepare`: images with captions -> checked parquet shards with a manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from raycap.cli.common import add_json, add_plain, add_settings, preset_list, print_json
from raycap.config import Config, load_config, preset_names
from raycap.errors import UsageError, did_you_mean
from raycap.places import hint, kept

NAME = "prepare"
HELP = "check an image set row by row and write it as shards that train, Ray Data and datasets read"
EXAMPLES = f"""\
examples:
  raycap prepare my-photos --out my-shards
  raycap prepare my-photos --out my-shards data.splits=0.9,0.05,0.05
  raycap prepare shapes-git --out shapes-shards data.shapes_images=300,50,50
  raycap prepare my-photos --out my-shards model.path=microsoft/git-base     captions cut, unknown tokens

What is dropped is in my-shards/rejected.jsonl with its reason. Layouts of an image set: docs/data.md.
{preset_list()}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="PRESET|SET", help="an image set: folder, file or hub id; or a preset")
    add_settings(parser)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the shards go; new, or an unfinished one")
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    config = source_config(args.source, args.settings)
    out = kept(args.out)
    from raycap.pipeline import prepare

    tokens = prepare(config, out, tokens=names_model(args.source, args.settings), plain=args.plain)

    from raycap.data.parquet import open_shards

    manifest = open_shards(out).manifest
    if args.json:
        print_json({"folder": str(out), **manifest, **({"tokens": tokens} if tokens else {})})
        return 0
    counts = ", ".join(f"{n:,} {split}" for split, n in manifest["counts"].items())
    rows = manifest["rows"]
    print(f"{out}: {counts}; {rows['kept']:,} rows kept, {rows['rejected']:,} rejected")
    if rows["rejected"]:
        print(f"why: {out / 'rejected.jsonl'}")
    if tokens:
        from raycap.report.tokens import token_line

        for lang, found in tokens.items():
            print(f"{found['tokeniser']}, {lang}: {token_line(found)}")
    print(f"next: raycap sweep photos-git-tiny data.source={out}")
    return 0


def names_model(source: str, settings: list[str]) -> bool:
    """Whether a model is named: of a folder alone none is known, and the defaults' tokeniser would say nothing of it."""
    preset = source in preset_names() or source.endswith((".yaml", ".yml"))
    return preset or any(s.startswith(("model.path=", "model.family=")) for s in settings)


def source_config(source: str, settings: list[str]) -> Config:
    """Settings that prepare a preset's data or, by the defaults, a folder."""
    if source in preset_names() or source.endswith((".yaml", ".yml")):
        return load_config(source, settings)
    place = Path(source).expanduser()
    if not place.exists():
        from raycap.data.sources.hub import is_hub_id

        if not is_hub_id(source):
            raise UsageError(
                f"'{source}' is neither a folder nor a preset, nor a file or a hub id; "
                f"{did_you_mean(source, preset_names())}{hint(source)}"
            )
    return load_config("shapes-git", [f"run.name={place.name}", f"data.source={place}", *settings])
