"""`raycap sweep`: the main job, from images with captions to a served, scored model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raycap.cli.common import (
    add_json,
    add_plain,
    add_settings,
    is_run,
    preset_list,
    print_json,
    run_config,
)
from raycap.config import Config, load_config
from raycap.errors import ConfigError, UsageError
from raycap.places import found, kept

NAME = "sweep"
HELP = "train many trials, export the winner through the gate, serve it, score it, report"
EXAMPLES = f"""\
examples:
  raycap sweep shapes-git
  raycap sweep photos-git-tiny data.source=my-photos tune.trials=16 train.steps=300
  raycap sweep shapes-git tune.space.lora.r=[4,8,16] --dry-run
  raycap sweep risc-paligemma --tiny
  raycap sweep --resume results/shapes-git

{preset_list()}; the path of your own .yaml works too
"""
CHANGEABLE = ("run.dir", "run.cache_dir", "serve.", "export.")
"""Settings that may differ when a run goes on: they touch nothing that was trained or scored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help="a preset, your own .yaml, or with --resume a run folder")
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, trials and the predicted cost, run nothing"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the preset's whole way with a tiny random twin on a drawn set: minutes, no downloads, scores that mean nothing",
    )
    parser.add_argument("--keep-serving", action="store_true", help="leave the winner's server up until Ctrl-C")
    add_plain(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.keep_serving and args.json:
        raise UsageError("--keep-serving stays until Ctrl-C and --json prints at the end: give one of them")
    if args.tiny:
        return run_tiny(args)
    config = resumed_config(args.preset, args.settings) if args.resume else new_config(args.preset, args.settings)
    if args.dry_run:
        return dry_run(config, as_json=args.json)
    if args.resume:
        from raycap.report.ledger import run_status

        if run_status(config.run.dir) == "finished":
            if args.keep_serving:
                raise UsageError(f"{config.run.dir} is finished already: `raycap serve {config.run.dir}` serves it")
            return finished(Path(config.run.dir), as_json=args.json)
    from raycap.pipeline import sweep

    folder = sweep(config, resume=args.resume, plain=args.plain, keep_serving=args.keep_serving, command=args.command)
    return finished(folder, as_json=args.json)


def run_tiny(args: argparse.Namespace) -> int:
    """`--tiny`: the run, then what the preset is for beyond it."""
    from raycap.pipeline.tiny import beyond, tiny_plan, tiny_sweep

    for option in ("resume", "keep_serving"):
        if getattr(args, option):
            raise UsageError(
                f"--{option.replace('_', '-')} and --tiny: give one of them; a tiny run is resumed without --tiny"
            )
    plan = tiny_plan(new_config(args.preset, []), args.settings)
    if args.dry_run:
        return dry_run(plan.config, as_json=args.json)
    folder = tiny_sweep(plan, plain=args.plain, command=args.command)
    found = beyond(plan, folder, plain=args.plain)
    code = finished(folder, as_json=args.json, more=found)
    if args.json:
        return code
    if "outside" in found:
        from raycap.cli.evaluate import sets_table

        print(f"\nraycap evaluate {folder} --also {plan.outside}\n{sets_table(found['outside']['sets'])}")
    if "grid" in found:
        from raycap.report.grid import table_text

        print(f"\n{table_text(found['grid']['rows'])}\ntable, captions and plots: {folder / 'grid' / 'test'}")
    return code


def finished(folder: Path, *, as_json: bool, more: dict[str, Any] | None = None) -> int:
    """Print what a run came to, with `more` where it is for machines; the exit code says whether that is a served winner."""
    from raycap.report.runs import load_run
    from raycap.report.summary import run_summary, text_summary

    run_read = load_run(folder)
    if as_json:
        print_json(run_summary(run_read) | (more or {}))
    else:
        print(text_summary(run_read))
    return 0 if run_read.finished else 1


def new_config(preset: str, settings: list[str]) -> Config:
    """A preset's settings; a run folder in its place is a slip that is told as such."""
    if is_run(preset):
        again = f"`raycap sweep {preset}/config.yaml` runs it anew"
        raise UsageError(f"{preset} is a run folder: `--resume` goes on with it, {again}")
    return load_config(preset, settings)


def resumed_config(place: str, settings: list[str]) -> Config:
    """The settings of the run to go on with: a run folder, or a preset with `run.dir`.

    Raises:
        UsageError: no run is there, or a setting differs that the trials so far were trained with.
    """
    fetch(str(found(place)), settings)
    if is_run(found(place)):
        folder = found(place)
        given = load_config(str(folder / "config.yaml"), settings)
    else:
        if Path(place).is_dir():
            raise UsageError(f"{place} holds no run to resume: there is no config.yaml in it")
        given = load_config(place, settings)
        if not given.run.dir:
            raise UsageError(f"--resume needs to know which run: name its folder, or add run.dir=... to '{place}'")
        folder = kept(given.run.dir)
        if not is_run(folder):
            raise UsageError(f"run.dir={folder} holds no run to resume: there is no config.yaml in it")
    started = _flat(run_config(folder))
    for key, value in _flat(given).items():
        if value != started[key] and not key.startswith(CHANGEABLE) and key != "run.name":
            raise ConfigError(
                f"{key}={value!r} differs from the run's {started[key]!r} in {folder / 'config.yaml'}: its trials "
                "would not be comparable. Start a new run for it, or resume without that setting."
            )
    changed = {k: v for k, v in _flat(given).items() if k.startswith(CHANGEABLE) and v != started[k]}
    changed.pop("run.dir", None)
    return run_config(folder, [f"{k}={v}" for k, v in changed.items()])


def fetch(place: str, settings: list[str]) -> None:
    """Bring a run folder that is not on this machine from the storage that `run.storage=...` names."""
    storage = next((s.partition("=")[2] for s in settings if s.startswith("run.storage=")), "")
    if not storage or is_run(place):
        return
    from raycap.storage import Storage
    from raycap.tune.mirror import fetch_record

    runs = Storage.open(storage) / "runs"
    if not runs.has(f"{Path(place).name}/config.yaml"):
        return
    fetch_record(runs / Path(place).name, Path(place))


def dry_run(config: Config, *, as_json: bool) -> int:
    """Print the resolved settings, the trials and what they would cost; nothing is loaded or written."""
    from raycap.report.ledger import choose_run_dir
    from raycap.report.predict import memory_lines, predict
    from raycap.train.memory import plan
    from raycap.tune.space import sweep_trials

    specs = sweep_trials(config)
    trials = [t.to_dict() | {"scale": t.scale} for t in specs]
    folder = choose_run_dir(config, claim=False)
    cost = predict(config)
    memory = plan(config, specs)
    if as_json:
        shown = {"config": config.to_dict(), "trials": trials, "folder": str(folder), "predicted": cost}
        print_json({**shown, "memory": memory})
        return 0
    import yaml

    print(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    print(_trials_table(trials))
    print(f"\nfolder: {folder}")
    for name, text in cost.items():
        print(f"{name}: {text}")
    print("\n".join(memory_lines(memory)))
    return 0


def _trials_table(trials: list[dict[str, Any]]) -> str:
    """The settings that trials usually differ in, and whatever else these differ in."""
    usual = ("trial_id", "r", "alpha", "scale", "lr", "dropout", "seed")
    heads = (*usual, *(name for name in trials[0] if name not in usual and len({str(t[name]) for t in trials}) > 1))
    cells = [[_cell(t[h]) for h in heads] for t in trials]
    widths = [max(len(head), *(len(row[n]) for row in cells)) for n, head in enumerate(heads)]
    lines = [heads, *cells]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value) or "-"


def _flat(config: Config) -> dict[str, Any]:
    return {f"{section}.{name}": v for section, values in config.to_dict().items() for name, v in values.items()}
