"""`raycap evaluate`: caption a split with a model and score it."""

from __future__ import annotations

import argparse

from raycap.cli.common import (
    VARIANTS,
    add_json,
    add_plain,
    add_settings,
    config_for_model,
    model_folder,
    print_json,
)
from raycap.places import kept

NAME = "evaluate"
HELP = "caption a split with a run's winner or any model folder, and score the captions"
EXAMPLES = """\
examples:
  raycap evaluate results/shapes-git --split val
  raycap evaluate results/shapes-git --variant merged-nf4 data.source=other-shards
  raycap evaluate my-model data.source=my-shards model.quantisation=none --out scored
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="a run folder, or a model folder in the hub's layout")
    add_settings(parser)
    parser.add_argument("--variant", choices=VARIANTS, help="which model of a run; default: the one it promoted")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--out", metavar="FOLDER", help="write predictions and metrics there too")
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    model, run_folder = model_folder(args.model, args.variant)
    config = config_for_model(model, run_folder, args.settings)
    from raycap.pipeline import evaluate

    out = kept(args.out) if args.out else None
    found = evaluate(config, model, split=args.split, out=out, plain=args.plain)
    if args.json:
        print_json(found)
        return 0
    print(f"{model} on {found['split']}, {found['images']:,} images")
    for name, scored in found["metrics"].items():
        print(f"  {name:<8} {scored['score']:.4f}   {scored['signature']}")
    if found.get("predictions"):
        print(f"captions: {found['predictions']}")
    return 0
