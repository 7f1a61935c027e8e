"""`raycap evaluate`: caption a split with a model and score it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raycap.cli.common import (
    VARIANTS,
    add_json,
    add_plain,
    add_settings,
    config_for_model,
    model_folder,
    print_json,
)
from raycap.errors import UsageError
from raycap.places import kept

NAME = "evaluate"
HELP = "caption a split with a run's winner or any model folder, and score the captions"
EXAMPLES = """\
examples:
  raycap evaluate results/shapes-git --split val
  raycap evaluate results/shapes-git --variant merged-nf4 data.source=other-shards
  raycap evaluate results/risc --grid prompts=A,B,C decode=greedy,beam-sample
  raycap evaluate my-model data.source=my-shards model.quantisation=none --out scored
  raycap evaluate results/stair data.source=stair --also yj --zero-shot
  raycap evaluate results/shapes-git --out scored, then edit scored/test.flagged.jsonl, then
  raycap evaluate results/shapes-git --exclude scored/test.flagged.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="a run folder, or a model folder in the hub's layout")
    add_settings(parser)
    parser.add_argument("--variant", choices=VARIANTS, help="which model of a run; default: the one it promoted")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--out", metavar="FOLDER", help="write predictions and metrics there too")
    parser.add_argument(
        "--also",
        metavar="SOURCE",
        action="append",
        default=[],
        help="a further image set, out of domain; may be repeated",
    )
    parser.add_argument("--zero-shot", action="store_true", help="the base that model.path names does the same")
    parser.add_argument(
        "--exclude", metavar="FILE", type=Path, help="leave out the images of a reviewed file of flagged captions"
    )
    parser.add_argument(
        "--grid",
        metavar="axis=a,b",
        nargs="+",
        help="all combinations of prompts=, decode=, seeds= and models=; names from evaluate.prompts and evaluate.decodings",
    )
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    model, run_folder = model_folder(args.model, args.variant)
    if args.grid:
        return run_grid(args, model, run_folder)
    config = config_for_model(model, run_folder, args.settings)
    from raycap.pipeline import evaluate

    out = _out(args.out)
    if args.exclude and not args.exclude.is_file():
        raise UsageError(f"--exclude {args.exclude}: there is no such file")
    found = evaluate(
        config, model, split=args.split, out=out, plain=args.plain,
        also=args.also, zero_shot=args.zero_shot, exclude=args.exclude,
    )  # fmt: skip
    if args.json:
        print_json(found)
        return 0
    print(f"{model} on {found['split']}, {found['images']:,} images")
    print(_metrics(found["metrics"]))
    if found.get("collapse", {}).get("collapsed"):
        print(f"! the captions look collapsed: {'; '.join(found['collapse']['reasons'])}")
    if excluded := found.get("excluded"):
        print(
            f"{excluded['images']} images are left out by {args.exclude}; with them, {excluded['whole']['images']:,} images:"
        )
        print(_metrics(excluded["whole"]["metrics"]))
        if excluded["unknown"]:
            print(f"note: {len(excluded['unknown'])} ids of the file are not in this split: {excluded['unknown'][0]}")
    if found.get("sets"):
        print(sets_table(found["sets"]))
    if found.get("predictions"):
        print(f"captions: {found['predictions']}")
    if found.get("flagged"):
        print(f"to review: {found['flagged']}")
    return 0


def _metrics(metrics: dict[str, Any]) -> str:
    wide = max(map(len, metrics), default=0)
    return "\n".join(
        f"  {name:<{wide}} {found['score']:>9.4f}   {found['signature']}" for name, found in metrics.items()
    )


def _out(text: str | None) -> Path | None:
    """The folder of --out; a file there is told before anything is captioned."""
    out = kept(text) if text else None
    if out and out.exists() and not out.is_dir():
        raise UsageError(f"--out {text}: a file has that name; give a folder")
    return out


def sets_table(rows: list[dict[str, Any]]) -> str:
    """Models by image sets, with what each needs; scores of different sets do not compare, those of a set do."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    heads = ["model", "images of", "images", "parameters", "memory", *names, ""]
    cells = [heads]
    for row in rows:
        scores = [f"{row['metrics'][n]['score']:.3f}" if n in row["metrics"] else "" for n in names]
        parameters = f"{row['parameters'] / 1e6:,.1f} M" if row.get("parameters") else "?"
        memory = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
        cells.append([row["model"], row["source"], f"{row['images']:,}", parameters, memory, *scores, _marked(row)])
    widths = [max(len(line[n]) for line in cells) for n in range(len(heads))]
    return "\n".join(
        "  ".join([c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(line[:-1], widths))] + line[-1:])
        .rstrip() for line in cells
    )  # fmt: skip


def _marked(row: dict[str, Any]) -> str:
    """A mark beside captions that look as if nobody had looked at the pictures."""
    told = row.get("collapse") or {}
    return f"! {'; '.join(told['reasons'])}" if told.get("collapsed") else ""


def run_grid(args: argparse.Namespace, model: Path, run_folder: Path | None) -> int:
    """`--grid`: the table on the terminal, its files in --out or in the run's grid/<split>."""
    from raycap.evaluate.grid import cells, read_axes

    for option in ("also", "zero_shot", "exclude"):
        if getattr(args, option, None):
            raise UsageError(f"--{option.replace('_', '-')} has no effect with --grid: ask for it alone")
    axes, settings = read_axes(args.grid)
    config = config_for_model(model, run_folder, [*args.settings, *settings])
    if not args.out and run_folder is None:
        raise UsageError("--grid writes a table, captions and plots: name a folder with --out")
    out = _out(args.out) or run_folder / "grid" / args.split
    models = [model, *(model_folder(text, None)[0] for text in axes.get("models", ()))]
    wanted = cells(config, axes)
    from raycap.pipeline import evaluate_grid
    from raycap.report.grid import table_text

    found = evaluate_grid(config, models, wanted, split=args.split, out=out, plain=args.plain)
    if args.json:
        print_json(found)
        return 0
    print(f"{args.split}, {found['images']:,} images")
    print(table_text(found["rows"]))
    print(f"table, captions and plots: {out}")
    return 0
