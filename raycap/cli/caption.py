"""`raycap caption`: pictures -> captions, in this process."""

from __future__ import annotations

import argparse

from raycap.cli.common import (
    VARIANTS,
    add_json,
    config_for_model,
    existing_files,
    model_folder,
    print_json,
)

NAME = "caption"
HELP = "caption pictures with a run's winner or any model folder"
EXAMPLES = """\
examples:
  raycap caption results/shapes-git photo.jpg
  raycap caption results/shapes-git my-photos/ --json
  raycap caption results/shapes-git/best/merged-nf4 *.png --set decode.num_beams=4
"""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="a run folder (its promoted model), or a model folder")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="image files, or folders of them")
    parser.add_argument("--variant", choices=VARIANTS, help="which model of a run; default: the one it promoted")
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="a setting, as decode.num_beams=4"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    model, run_folder = model_folder(args.model, args.variant)
    pictures = existing_files(args.pictures, PICTURES)
    config = config_for_model(model, run_folder, args.set)
    from raycap.pipeline import caption

    captions = caption(config, model, pictures)
    if args.json:
        print_json([{"image": str(p), "caption": c} for p, c in zip(pictures, captions, strict=True)])
        return 0
    for picture, text in zip(pictures, captions, strict=True):
        print(f"{picture}\t{text}" if len(pictures) > 1 else text)
    return 0
