"""`raycap serve`: a model behind HTTP."""

from __future__ import annotations

import argparse

from raycap.cli.common import VARIANTS, add_plain, add_settings, config_for_model, model_folder

NAME = "serve"
HELP = "serve a run's winner or any model folder over HTTP until Ctrl-C"
EXAMPLES = """\
examples:
  raycap serve results/shapes-git
  raycap serve results/shapes-git serve.port=9000 serve.replicas=2
  curl -F images=@photo.jpg http://127.0.0.1:8000/v1/captions
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="a run folder (its promoted model), or a model folder")
    add_settings(parser)
    parser.add_argument("--variant", choices=VARIANTS, help="which model of a run; default: the one it promoted")
    add_plain(parser)


def run(args: argparse.Namespace) -> int:
    model, run_folder = model_folder(args.model, args.variant)
    config = config_for_model(model, run_folder, args.settings)
    from raycap.pipeline import serve

    serve(config, model, plain=args.plain)
    return 0
