"""Kill processes of a sweep at random moments, resume it, and compare every adapter with an undisturbed run's.

    python tools/chaos.py --kills 5 --seed 1
    python tools/chaos.py shapes-git train.steps=300 --kills 20 --targets driver,pack
    python tools/chaos.py --whole --kills 3         the whole job, not its training alone

It stands outside: it starts drivers as a person would, looks at the machine's process table, and sends SIGKILL. Where the
driver dies it is started again with --resume. Prints JSON; exit code 0 when all adapters are bitwise equal. Run it with
one pack (with several, which pack a trial goes to is a matter of time) and in fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "data.shapes_images=48,16,16", "train.steps=60", "train.batch=4", "train.val_images=8", "train.warmup_steps=2",
    "train.checkpoint_every_s=1", "tune.trials=3", "tune.slots=2", "tune.grace_steps=20", "decode.max_new_tokens=8",
    "evaluate.metrics=cider", "evaluate.resamples=100", "model.compute_dtype=fp32",
    "train.features=on",  # a measurement may decide otherwise the next time
]  # fmt: skip
TITLES = {
    "pack": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "board": "ray::BoardActor",
    "client": "ray::ImplicitFunc",
    "raylet": "raylet",
    "gcs": "gcs_server",
}
"""How the titles of a sweep's processes begin; the driver is known by its pid."""
FATAL = ("driver", "raylet", "gcs")
"""Targets that take the driver with them."""
PATIENCE_S = 300.0


def drive(settings: list[str], folder: Path, shards: str) -> None:
    """In a driver: train the trials, or what is left of them, into `folder`."""
    from raycap.config import load_config
    from raycap.tune.sweep import run_sweep

    config = load_config(settings[0], settings[1:])
    run_sweep(config, folder, shards, resume=(folder / "checkpoints" / "plan.json").exists())


class Drivers:
    """One run folder, and the drivers that come and go over it."""

    def __init__(self, settings: list[str], folder: Path, shards: str, whole: bool):
        self.settings, self.folder, self.shards, self.whole = settings, folder, shards, whole
        self.log = folder.with_suffix(".log")
        self.pack_log = folder / "logs" / "pack-0.log"
        self.process: subprocess.Popen | None = None
        self.starts = self.logged = 0

    def start(self) -> None:
        if self.whole and (self.folder / "config.yaml").exists():
            command = ["-m", "raycap", "sweep", "--resume", str(self.folder), "--plain"]
        elif self.whole:
            command = ["-m", "raycap", "sweep", *self.settings, f"run.dir={self.folder}", "--plain"]
        else:
            command = [__file__, "--drive", str(self.folder), "--shards", self.shards, *self.settings]
        self.starts += 1
        self.logged = len(self.said())
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    def said(self) -> str:
        return self.pack_log.read_text() if self.pack_log.exists() else ""

    def training(self) -> bool:
        """Whether this driver's pack trains, or the driver has ended before."""
        new = self.said()[self.logged :]
        return self.process.poll() is not None or "admitted" in new or "resumed" in new

    def nearly_done(self) -> bool:
        """Whether a trial has had its full budget: the moment to kill must not fall behind the end of the run."""
        return self.process.poll() is not None or "finished at step" in self.said()[self.logged :]

    def find(self, target: str) -> psutil.Process | None:
        if self.process.poll() is not None:
            return None
        driver = psutil.Process(self.process.pid)
        if target == "driver":
            return driver
        for child in driver.children(recursive=True):
            try:
                title = (child.cmdline() or [""])[0]
            except psutil.Error:
                continue
            if title.startswith(TITLES[target]) or Path(title).name == TITLES[target]:
                return child
        return None

    def finish(self) -> int:
        """Wait for the driver's end."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise SystemExit(f"a driver did not end in {PATIENCE_S:.0f} s; its log is {self.log}") from None

    def end(self) -> None:
        """Leave no process of ours behind."""
        if self.process is None or self.process.poll() is not None:
            return
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            try:
                process.kill()
            except psutil.Error:
                pass
        self.process.wait()


def adapters(folder: Path) -> dict[str, str]:
    """Hash of every trial's weights, with the trial's state."""
    found = {}
    for file in sorted((folder / "checkpoints" / "adapters").glob("[!.]*/trial.json")):
        weights = file.parent / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "no adapter"
        found[file.parent.name] = f"{json.loads(file.read_text())['state']} {digest}"
    return found


def wait_until(ready, patience_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + patience_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def chaos(settings: list[str], work: Path, *, kills: int, seed: int, targets: list[str], whole: bool) -> dict:
    """An undisturbed run and a disturbed one under `work`; what was done, and whether they came to the same."""
    from raycap.config import load_config
    from raycap.data.shards import prepare_if_needed

    shards = str(prepare_if_needed(load_config(settings[0], settings[1:])))
    began = time.monotonic()
    calm = Drivers(settings, work / "undisturbed", shards, whole)
    calm.start()
    wait_until(calm.training)
    trained = time.monotonic()
    if calm.finish() != 0:
        raise SystemExit(f"the undisturbed run failed; its log is {calm.log}")
    seconds, train_s = time.monotonic() - began, time.monotonic() - trained

    rng, done, began = random.Random(seed), [], time.monotonic()
    drivers = Drivers(settings, work / "disturbed", shards, whole)
    try:
        drivers.start()
        code = None
        for _ in range(kills):
            target = rng.choice(targets)
            after_s = round(rng.uniform(0, 0.4 * train_s), 2)
            if not wait_until(drivers.training):
                raise SystemExit(f"a driver did not begin to train in {PATIENCE_S:.0f} s; its log is {drivers.log}")
            wait_until(drivers.nearly_done, after_s)
            # Some are there for a moment only, or start anew just now.
            wait_until(lambda t=target: drivers.process.poll() is not None or drivers.find(t) is not None, 10)
            victim = drivers.find(target)
            if victim is None and (code := drivers.process.poll()) == 0:
                done.append({"target": target, "after_s": after_s, "killed": False, "why": "the run had finished"})
                break
            if victim is not None:
                try:
                    victim.send_signal(signal.SIGKILL)
                except psutil.Error:
                    victim = None
            done.append({"target": target, "after_s": after_s, "killed": victim is not None})
            if target in FATAL and victim is not None:
                drivers.finish()
            if (code := drivers.process.poll()) not in (None, 0):
                drivers.start()
        for _ in range(3):
            if (code := drivers.finish()) == 0:
                break
            drivers.start()
    finally:
        drivers.end()
    wanted, found = adapters(calm.folder), adapters(drivers.folder)
    different = sorted(t for t in {*wanted, *found} if wanted.get(t) != found.get(t))
    return {
        "seed": seed,
        "kills": done,
        "killed": sum(kill["killed"] for kill in done),
        "drivers": drivers.starts,
        "finished": code == 0,
        "trials": len(wanted),
        "different": different,
        "equal": code == 0 and bool(wanted) and not different,
        "seconds_undisturbed": round(seconds, 1),
        "seconds_disturbed": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="preset and key=value settings; default: a small shapes-git sweep")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="driver,pack,controller,board,client", help="also: raylet, gcs")
    parser.add_argument("--work", help="folder for the two runs; default: a temporary one, removed at the end")
    parser.add_argument("--whole", action="store_true", help="run the whole job, export and serving included")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    given = args.settings if args.settings and "=" not in args.settings[0] else ["shapes-git", *args.settings]
    if args.drive:
        drive(given, Path(args.drive), args.shards)
        return 0
    settings = [given[0], *SMALL, *given[1:]]
    targets = args.targets.split(",")
    for target in targets:
        if target not in (*TITLES, "driver"):
            parser.error(f"no target {target}; there are driver, {', '.join(TITLES)}")
    with tempfile.TemporaryDirectory(prefix="raycap-chaos-") as temporary:
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = chaos(settings, work, kills=args.kills, seed=args.seed, targets=targets, whole=args.whole)
    print(json.dumps(found, indent=2))
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
