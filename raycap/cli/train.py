"""`raycap train`: one setting, trained to the end; a sweep of one trial."""

from __future__ import annotations

import argparse
from pathlib import Path

from raycap.cli.common import add_json, add_plain, add_settings, preset_list
from raycap.cli.sweep import dry_run, finished, new_config, resumed_config

NAME = "train"
HELP = "train one adapter with the preset's own settings, and take it the same way as a sweep's winner"
EXAMPLES = f"""\
examples:
  raycap train shapes-git lora.r=8 train.lr=2e-3
  raycap train photos-git-tiny data.source=my-photos train.steps=300
  raycap train --resume results/shapes-git

{preset_list()}; the path of your own .yaml works too
"""
ONE_TRIAL = (
    "tune.trials=1", "tune.slots=1", "tune.packs=1", "tune.scheduler=none", "tune.grace_steps=0", "tune.space={}",
    "tune.default_trial=false", "tune.confirm_seeds=0",
)  # fmt: skip
"""A pack of one that nobody prunes: the preset's own point, not one drawn from its space."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help="a preset, your own .yaml, or with --resume a run folder")
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and the predicted cost, run nothing")
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.resume:
        config = resumed_config(args.preset, args.settings)
        from raycap.report.ledger import run_status

        if run_status(config.run.dir) == "finished":
            return finished(Path(config.run.dir), as_json=args.json)
    else:
        config = new_config(args.preset, [*args.settings, *ONE_TRIAL])
    if args.dry_run:
        return dry_run(config, as_json=args.json)
    from raycap.pipeline import train

    folder = train(config, resume=args.resume, plain=args.plain, command=args.command)
    return finished(folder, as_json=args.json)
