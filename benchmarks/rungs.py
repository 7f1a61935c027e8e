"""Do early rungs foretell the end? A sweep that prunes nothing, kept for the reports of sweeps that do; prints JSON.

    python benchmarks/rungs.py --out results/reference-shapes-git.json          shapes-git, shortened: some minutes on two cores
    python benchmarks/rungs.py iu-xray-blip train.steps=600 --out results/reference-iu-xray.json
    python benchmarks/rungs.py --from results/my-run --out results/reference-mine.json     a run made with tune.scheduler=none

Of each rung: Spearman's correlation of its CIDEr and its validation loss with the CIDEr at the end, with a 95 % interval, and
whether halving there would have kept the best trial. A report quotes the file whose base and images are its run's own, from
beside the run folder or from this repository's results/. A sweep that prunes cannot tell: its late rungs know the survivors alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycap.errors import RaycapError
from raycap.report.rungs import reference_json, reference_of, rung_rows, write_reference

SHORT = ["train.steps=333", "tune.trials=24", "tune.slots=12"]
ALWAYS = ["tune.scheduler=none", "tune.default_trial=false", "tune.prune_collapsed=false", "tune.confirm_seeds=0"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="shapes-git")
    parser.add_argument("settings", metavar="key=value", nargs="*", help=f"default: {' '.join(SHORT)}")
    parser.add_argument("--from", dest="run", metavar="RUN", help="a finished run folder in place of a sweep")
    parser.add_argument("--out", type=Path, help="file to keep it in, named reference-*.json")
    args = parser.parse_intermixed_args(arguments)
    if args.out and not (args.out.name.startswith("reference-") and args.out.suffix == ".json"):
        parser.error(f"--out {args.out}: reports look for files named reference-*.json")
    try:
        found = from_run(Path(args.run)) if args.run else from_sweep(args.preset, args.settings or SHORT)
    except RaycapError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    rows = rung_rows(found["trials"], found["config"]["tune"]["eta"])
    if not rows:
        print("error: too few trials reached the end, or there is one rung alone", file=sys.stderr)
        return 1
    if args.out:
        write_reference(args.out, found)
    told = {k: found[k] for k in ("command", "commit", "written", "seconds")}
    print(json.dumps({**told, "steps": found["config"]["train"]["steps"], "rungs": rows}, indent=2))
    return 0


def from_run(folder: Path) -> dict[str, Any]:
    """What to keep of a run whose sweep pruned nothing."""
    from raycap.errors import RunError
    from raycap.report.runs import load_run

    run = load_run(folder)
    if reference_of(run) is None or run.config["tune"]["scheduler"] != "none":
        raise RunError(f"{folder} is no finished sweep with tune.scheduler=none and a few trials that reached the end")
    return reference_json(run.trials, run.config, run.entry)


def from_sweep(preset: str, settings: Sequence[str]) -> dict[str, Any]:
    """Prepare and train, without export and serving: rungs are all that is asked for."""
    from raycap.cluster import connect
    from raycap.config import load_config
    from raycap.data.shards import open_shards, prepare_if_needed
    from raycap.pipeline.tools import prepare_tools
    from raycap.report.provenance import commit, versions
    from raycap.tune.sweep import run_sweep

    config = load_config(preset, [*settings, *ALWAYS])
    shards = prepare_if_needed(config, None, prepare_tools(config))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="raycap-rungs-") as folder, connect(config):
        done = run_sweep(config, Path(folder) / "rungs", shards, on_progress=_say)
    entry = {
        "command": shlex.join(["python", "benchmarks/rungs.py", preset, *settings]),
        "commit": commit()[0],
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
        "data_sha256": open_shards(shards).content_sha256,
    }
    return reference_json([t.to_dict() for t in done.trials], config.to_dict(), entry)


def _say(snapshot: dict[str, Any]) -> None:
    from raycap.report.livetable import totals_line

    print(f"\r{totals_line(snapshot)}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
