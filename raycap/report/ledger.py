"""The run folder: where a run puts what it found, each file whole or not there, and `run.json` last."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from raycap.config import Config
from raycap.data.lock import FileLock
from raycap.errors import RunError
from raycap.files import read_json, read_whole, set_aside, write_atomic, write_json, write_jsonl
from raycap.places import kept
from raycap.report.provenance import commit, versions

RUN_JSON, CONFIG, TRIALS, METRICS, GATE, REPORT = (
    "run.json", "config.yaml", "trials.csv", "metrics.csv", "gate.json", "report.html",
)  # fmt: skip
CURVES = "plots/trials.json"
"""Each trial's learning curve and signs of collapse, which have no place in a table; the report is drawn from it."""
CLOCK = "checkpoints/clock.json"
"""Seconds by phase so far, so that a resumed run adds to them."""
LOCK = "checkpoints/.lock"
PLAN = "checkpoints/plan.json"
TRIAL_COLUMNS = (
    "trial_id", "state", "rank", "alpha", "scale", "lr", "dropout", "targets", "steps", "rung",
    "val_loss", "cider", "cider_se", "seconds", "reason",
)  # fmt: skip
METRIC_COLUMNS = ("split", "variant", "metric", "score", "signature")
VARIANTS = ("constant", "zero-shot", "default", "adapter", "merged", "merged-nf4", "served")
"""In the order of a table: the floor, the start, then the winner's way to production."""
STATUSES = ("finished", "failed", "interrupted")


def choose_run_dir(config: Config, *, root: Path | str = "results", claim: bool = True) -> Path:
    """The folder of a new run: `run.dir` if given, else results/<name>, then <name>-2, <name>-3, ...

    In a job, a relative one lies where it is kept (raycap.places).

    A folder that is there already and not empty is some other run's, finished or not. With `claim` the folder is made,
    so that two runs started together never share one.

    Raises:
        RunError: `run.dir` holds a run or other files, or cannot be made.
    """
    if config.run.dir:
        folder = kept(config.run.dir)
        _refuse_taken(folder)
        if claim:
            _make(folder)  # or an empty one that was there: its lock decides between two runs
        return folder
    name = config.run.name or "run"
    number = 1
    while True:
        folder = kept(root) / (name if number == 1 else f"{name}-{number}")
        if not _taken(folder) and (not claim or _make(folder)):
            return folder
        number += 1


class Ledger:
    """Writes one run folder. One process at a time holds it; the lock ends with the process.

    Predictions are written before they are scored, and `finish` comes last: a folder without run.json is unfinished.
    """

    def __init__(self, folder: Path, config: Config, command: str, lock: FileLock):
        self.folder = folder
        self.config = config
        self.command = command
        self.metrics = read_metrics(folder / METRICS)
        self._lock = lock
        clock = read_whole(folder / CLOCK)
        self._clock: dict[str, float] = clock if isinstance(clock, dict) else {}

    @classmethod
    def create(cls, config: Config, folder: Path | str | None = None, *, command: str = "") -> Ledger:
        """Open a new run's folder (`choose_run_dir` unless given) and write its config.yaml."""
        folder = Path(folder) if folder is not None else choose_run_dir(config)
        lock = _hold(folder)
        if (folder / RUN_JSON).exists():
            lock.release()
            _refuse_taken(folder)
        write_atomic(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        return cls(folder, config, command, lock)

    @classmethod
    def reopen(cls, folder: Path | str, config: Config, *, command: str = "") -> Ledger:
        """Open an unfinished run to go on with it; the entry of an interrupted or failed try is kept as run.<n>.json.

        Raises:
            RunError: no run is there, it is finished, or another process works on it.
        """
        folder = Path(folder)
        if not mend_config(folder):
            raise RunError(
                f"{folder} holds no run to resume: there is no {CONFIG}. Start one with `raycap sweep PRESET`."
            )
        lock = _hold(folder)
        entry = folder / RUN_JSON
        if entry.is_file():
            if run_status(folder) == "finished":
                lock.release()
                raise RunError(f"{folder} is finished: its entry is never overwritten. Look at {folder / REPORT}.")
            number = 1
            while (folder / f"run.{number}.json").exists():
                number += 1
            os.replace(entry, folder / f"run.{number}.json")
        return cls(folder, config, command, lock)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under `name`, also when it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock[name] = self._clock.get(name, 0.0) + time.monotonic() - began
            write_json(self.folder / CLOCK, self._clock)

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        return dict(self._clock)

    def write_trials(self, trials: Iterable[Mapping[str, Any]]) -> Path:
        """trials.csv, and the learning curves beside the plots, from TrialRecord.to_dict() of each."""
        rows = sorted((dict(t) for t in trials), key=lambda t: t["trial_id"])
        write_json(self.folder / CURVES, rows)
        return write_atomic(self.folder / TRIALS, csv_text(TRIAL_COLUMNS, map(_trial_row, rows)))

    def write_predictions(
        self, split: str, variant: str, captions: Mapping[str, str], references: Mapping[str, list[str]]
    ) -> Path:
        """predictions/<split>.<variant>.jsonl, in the order of `captions`."""
        rows = [{"image_id": i, "caption": c, "references": list(references[i])} for i, c in captions.items()]
        return write_jsonl(self.folder / "predictions" / f"{split}.{variant}.jsonl", rows)

    def add_metrics(self, split: str, variant: str, scores: Mapping[str, Any]) -> None:
        """Note the scores (name -> Score, or {"score", "signature"}) of a variant, and rewrite metrics.csv."""
        noted = self.metrics.setdefault(split, {}).setdefault(variant, {})
        for name, score in scores.items():
            value = score if isinstance(score, Mapping) else {"score": score.score, "signature": score.signature}
            noted[name] = {"score": value["score"], "signature": value["signature"]}
        write_atomic(self.folder / METRICS, csv_text(METRIC_COLUMNS, metric_rows(self.metrics)))

    def finish(
        self,
        status: str = "finished",
        *,
        best_trial: str = "",
        data_sha256: str = "",
        base_sha256: str = "",
        peak_memory_bytes: int = 0,
        **facts: Any,
    ) -> Path:
        """Write run.json. `facts` are further keys: `verdicts`, `sentence`, `data`, `device`, `reason`, ...

        Raises:
            RunError: an entry is there already.
        """
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {STATUSES}")
        revision, dirty = commit()
        entry = {
            "name": self.config.run.name,
            "status": status,
            "command": self.command,
            "seed": self.config.run.seed,
            "seconds": round(sum(self._clock.values()), 3),
            "seconds_by_phase": {k: round(v, 3) for k, v in self._clock.items()},
            "peak_memory_bytes": int(peak_memory_bytes),
            "versions": versions(),
            "commit": revision,
            "dirty": dirty,
            "data_sha256": data_sha256,
            "base_sha256": base_sha256,
            "best_trial": best_trial,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": self.metrics,
        }
        path = write_new(self.folder / RUN_JSON, {**entry, **{k: v for k, v in facts.items() if k not in entry}})
        self.close()
        return path

    def close(self) -> None:
        """Let go of the folder; nothing is written."""
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_new(path: Path, value: Any) -> Path:
    """Write JSON to a path where nothing is yet: a link to a complete file, which the system refuses over another."""
    complete = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(complete, value)
    try:
        os.link(complete, path)
    except FileExistsError as error:
        raise RunError(
            f"{path} is there already and is never overwritten. Choose another folder with run.dir=..."
        ) from error
    except OSError:  # a file system without hard links
        if path.exists():
            raise RunError(f"{path} is there already and is never overwritten. Choose another run.dir.") from None
        os.replace(complete, path)
    finally:
        complete.unlink(missing_ok=True)
    return path


def metric_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of metrics.csv from metrics[split][variant][metric]."""
    for split, variants in metrics.items():
        for variant in sorted(variants, key=variant_order):
            for metric, found in variants[variant].items():
                yield {"split": split, "variant": variant, "metric": metric, **found}


def read_metrics(path: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """metrics[split][variant][metric] from a metrics.csv; empty when there is none."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                score = float(row["score"]) if row["score"] else None
                variants = found.setdefault(row["split"], {}).setdefault(row["variant"], {})
                variants[row["metric"]] = {"score": score, "signature": row["signature"]}
    except (FileNotFoundError, ValueError, KeyError, csv.Error):
        pass  # what a crash cut short is scored again
    return found


def variant_order(variant: str) -> tuple[int, str]:
    return (VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant)


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Comma separated, empty cells for what is not known, floats as short as they read back equal."""
    names = list(columns)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow(["" if v is None or v != v else repr(float(v)) if isinstance(v, float) else v for v in cells])
    return out.getvalue()


def _trial_row(trial: Mapping[str, Any]) -> dict[str, Any]:
    targets = trial["targets"]
    return {**trial, "targets": targets if isinstance(targets, str) else " ".join(targets)}


def _taken(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def _refuse_taken(folder: Path) -> None:
    if not _taken(folder):
        return
    elsewhere = "choose another folder with run.dir=..."
    go_on = f"go on with it by `raycap sweep --resume {folder}`, or {elsewhere}"
    status = run_status(folder)
    if status == "finished":
        raise RunError(
            f"run.dir={folder} holds a finished run, which is never overwritten: {elsewhere}, "
            "or leave run.dir out for a numbered folder."
        )
    if status:
        raise RunError(f"run.dir={folder} holds a run that ended as '{status}': {go_on}.")
    if (folder / CONFIG).is_file():
        raise RunError(f"run.dir={folder} holds an unfinished run: {go_on}.")
    raise RunError(f"run.dir={folder} is not empty and holds no run: {elsewhere}.")


def run_status(folder: Path | str) -> str:
    """Of the run's entry; `damaged` for one that cannot be read, empty without one."""
    if not (Path(folder) / RUN_JSON).is_file():
        return ""
    try:
        return read_json(Path(folder) / RUN_JSON)["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def mend_config(folder: Path | str) -> bool:
    """Whether a run's settings are there. Those that were lost or cut short come back from the sweep's plan."""
    folder = Path(folder)
    plan = read_whole(folder / PLAN)
    kept = plan.get("config") if isinstance(plan, dict) else None
    if isinstance(kept, dict):
        try:
            found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
            whole = all(set(found[section]) >= set(values) for section, values in kept.items())
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            whole = False
        if not whole:
            set_aside(folder / CONFIG)
            write_atomic(folder / CONFIG, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    return (folder / CONFIG).is_file()


def _make(folder: Path) -> bool:
    """Make the folder; False when it is there already, so that of two runs one alone gets it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            if not folder.is_dir():
                raise
            return False
    except OSError as error:
        raise RunError(
            f"cannot make the run folder {folder}: {error.strerror}. Choose another with run.dir=..."
        ) from error
    return True


def _hold(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    if not lock.try_acquire():
        raise RunError(
            f"{folder} is in use by {lock.holder}: wait for it to end, stop it, or choose another folder with run.dir=..."
        )
    return lock
