"""`raycap compare`: are one run's captions better than another's, or is the difference chance?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from raycap.cli.common import add_json, print_json, require_folder
from raycap.errors import DataError, UsageError

if TYPE_CHECKING:
    from raycap.report.runs import Run

NAME = "compare"
HELP = "compare runs on the pictures they share: paired bootstrap of a metric, Holm over the runs"
EXAMPLES = """\
examples:
  raycap compare results/shapes-git results/shapes-git-2
  raycap compare results/a results/b results/c --split val --variant adapter --json
  raycap compare results/a results/b --metric bleu4
  raycap compare results/a results/b --out results/a-against-b

Every run is compared with the first. Document frequencies come from the shared references, so that all runs are
measured by one scale. --out writes a report of them side by side (report.html, metrics.csv, plots as SVG and PNG).
"""
PREFERRED = ("served", "merged", "adapter", "merged-nf4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, the one to compare with first")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--variant", help="which captions; default: the furthest on the way to served that all have")
    parser.add_argument(
        "--metric", default="cider", choices=("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor"),
        help="default: %(default)s; meteor is compared by the mean of its segments",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", metavar="N", type=int, default=10_000, help="of the bootstrap (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="write a report, metrics.csv and plots there")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if len(args.runs) < 2:
        raise UsageError("compare needs at least two run folders")
    if args.resamples < 100:
        raise UsageError(f"--resamples {args.resamples} is too few for a 95 % interval: take at least 1000")
    from raycap.report.runs import load_run

    runs = [load_run(require_folder(r, "a run folder")) for r in args.runs]
    found = compare(runs, args.split, args.variant, args.resamples, args.seed, args.metric)
    report = None
    if args.out:
        from raycap.places import kept
        from raycap.report.comparison import write_comparison

        report = write_comparison(kept(args.out), runs, found, args.command)
    if args.json:
        print_json({**found, **({"report": report.as_posix()} if report else {})})
        return 0
    print(f"{found['variant']} captions on {found['images']:,} {found['split']} pictures that all runs have")
    for warning in found["warnings"]:
        print(f"note: {warning}")
    width = max(len(r["run"]) for r in found["runs"])
    for row in found["runs"]:
        line = f"  {row['run']:<{width}}  {args.metric} {row['score']:.4f}"
        if "difference" in row:
            line += f"  {row['difference']:+.4f} [{row['low']:.4f}, {row['high']:.4f}]  p {row['p']:.4f}"
            line += f", Holm {row['p_holm']:.4f}: {row['verdict']}"
        print(line)
    for row in found["runs"][1:]:
        print(row["sentence"])
    print(f"signature: {found['signature']}")
    if report:
        print(f"report: {report.as_posix()}")
    return 0


def compare(
    runs: list[Run], split: str, variant: str | None, resamples: int, seed: int, metric: str = "cider"
) -> dict[str, Any]:
    """Every run against the first.

    Raises:
        UsageError: no variant that all runs have. DataError: no shared pictures, or other references for one.
    """
    from raycap.evaluate.verdict import model_verdicts

    variant = variant or _shared_variant(runs, split)
    rows = [{r["image_id"]: r for r in run.predictions(split, variant)} for run in runs]
    shared = [i for i in rows[0] if all(i in other for other in rows[1:])]
    if not shared:
        raise DataError(f"the runs share no picture on {split}: they were scored on different data")
    for run, other in zip(runs[1:], rows[1:]):
        different = [i for i in shared if other[i]["references"] != rows[0][i]["references"]]
        if different:
            raise DataError(
                f"{run.folder} has other references than {runs[0].folder} for {len(different)} pictures (first: "
                f"{different[0]}): their scores measure different things"
            )
    groups = _groups(runs[0], split)
    languages = {run.config.get("evaluate", {}).get("lang", "en") for run in runs}
    if len(languages) > 1:
        raise DataError(
            f"the runs are of different languages ({', '.join(sorted(languages))}): no metric compares them"
        )
    results = model_verdicts(
        {
            run.folder.as_posix() if n == 0 else f"{run.folder.as_posix()}{_again(runs, n)}": {
                i: other[i]["caption"] for i in shared
            }
            for n, (run, other) in enumerate(zip(runs, rows))
        },
        {i: rows[0][i]["references"] for i in shared},
        metric=metric,
        groups=groups,
        lang=languages.pop(),
        resamples=resamples,
        seed=seed,
    )
    return {
        "split": split,
        "variant": variant,
        "metric": metric,
        "images": len(shared),
        "runs": [
            {"run": row.pop("name"), **({metric: row["score"]} if metric == "cider" else {}), **row} for row in results
        ],
        "signature": results[0]["signature"],
        "warnings": _warnings(runs, rows, shared, groups is not None) + _signatures(runs, split, variant, metric),
    }


def _again(runs: list[Run], n: int) -> str:
    """Sets a run apart that is named twice."""
    same = sum(run.folder == runs[n].folder for run in runs[:n])
    return f" ({same + 1})" if same else ""


def _signatures(runs: list[Run], split: str, variant: str, metric: str) -> list[str]:
    """A warning where the runs' own stored scores were computed differently; here all are computed anew, alike."""
    from raycap.evaluate.signature import differences

    stored = [run.metrics.get(split, {}).get(variant, {}).get(metric, {}).get("signature") for run in runs]
    found = []
    for run, signature in zip(runs[1:], stored[1:]):
        if stored[0] and signature and (apart := differences(stored[0], signature)):
            said = ", ".join(f"{key} {a or 'none'} against {b or 'none'}" for key, (a, b) in apart.items())
            found.append(
                f"the stored {metric} of {run.folder} is not on the scale of {runs[0].folder}'s ({said}): do not set the "
                "two side by side; here both were scored anew on the shared pictures"
            )
    return found


def _shared_variant(runs: list[Run], split: str) -> str:
    common = set.intersection(*(set(run.variants(split)) for run in runs))
    for variant in PREFERRED:
        if variant in common:
            return variant
    listed = "; ".join(f"{run.folder} has {', '.join(run.variants(split)) or 'none'}" for run in runs)
    raise UsageError(f"the runs share no variant's predictions on {split}: {listed}")


def _groups(run: Run, split: str) -> dict[str, str] | None:
    """Image id -> group (pictures that are resampled together), from the run's shards while they are there."""
    from raycap.data.parquet import is_shards_folder, open_shards

    folder = run.entry.get("data", {}).get("folder", "")
    return open_shards(folder).groups(split) if folder and is_shards_folder(folder) else None


def _warnings(runs: list[Run], rows: list[dict[str, Any]], shared: list[str], grouped: bool) -> list[str]:
    found = []
    if any(len(r) != len(shared) for r in rows):
        found.append("the runs were not scored on the same pictures: only those that all have are compared")
    if not grouped:
        found.append("the first run's shards are not here: each picture is resampled by itself, whatever its group")
    data = {run.entry.get("data_sha256", "") for run in runs}
    if len(data) > 1:
        found.append("the runs were prepared from different data (data_sha256)")
    if len(shared) < 50:
        found.append(f"document frequencies come from only {len(shared)} pictures: CIDEr is unstable below 50")
    prompts = {str(run.config.get("data", {}).get("prompt", "")) for run in runs}
    decoding = {str(run.config.get("decode")) for run in runs}
    if len(prompts) > 1 or len(decoding) > 1:
        found.append("the runs differ in prompt or decoding, so a difference may come from that")
    return found
