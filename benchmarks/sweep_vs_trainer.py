"""A sweep by raycap against the same sweep by `transformers.Trainer`, alone and under Ray Tune's ASHA.

    python benchmarks/sweep_vs_trainer.py > figures.json                           the built-in shapes, 12 trials
    python benchmarks/sweep_vs_trainer.py --data ../shared/data/flickr8k           a folder with captions.jsonl
    python benchmarks/sweep_vs_trainer.py --quick                                  does it work? (figures mean nothing)

All sides get the same trials, the same samples at the same step, the same shards, NF4 base, tokeniser, rungs,
validation images and decoding. Each runs in a fresh process that starts with empty caches; its seconds are those of the
process. Rounds go through the sides in turn. Preparing the shards comes before, once, and is not counted for anybody.
Figures as JSON on stdout, progress on stderr. What is compared, and how the peers were tuned: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import figures  # noqa: E402
from benchmarks.peers.sampler import TreeSampler  # noqa: E402

SIDES = {
    "trainer": "benchmarks.peers.trainer_sequence",
    "asha": "benchmarks.peers.tune_asha",
    "raycap": "benchmarks.peers.raycap_sweep",
    "raycap-full": "benchmarks.peers.raycap_sweep",
}
"""raycap-full is raycap without halving: every trial to the full budget."""
QUICK = ("train.steps=18", "train.batch=8", "train.val_images=16", "train.warmup_steps=2", "tune.slots=3",
         "data.limit=64")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the side that runs is ended too
    out = Path(options.out or tempfile.mkdtemp(prefix="raycap-benchmark-")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    config = settings(options, out)
    shared = shared_job(config, options, out)
    say(f"{len(shared['trials'])} trials of {shared['steps']} steps, rungs {shared['rungs']}; files in {out}")
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        # Every other round backwards: what drifts (heat, caches of the system) meets each side alike.
        for side in options.sides if number % 2 == 0 else options.sides[::-1]:
            found = run_side(side, shared, out / f"{side}-{number}", options.timeout)
            rounds[side].append(found)
            say(f"round {number + 1}, {side}: {found['seconds']:.1f} s, best CIDEr {found['best']['cider']:.3f}")
    print(json.dumps(summary(rounds, shared, config, options, out), indent=2))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings in place of the preset's")
    parser.add_argument("--data", default="shapes", help="`shapes`, or a folder that `raycap prepare` can read")
    parser.add_argument("--preset", help="default: shapes-git, or photos-git-tiny for a folder")
    parser.add_argument("--trials", type=int, help="default: the preset's; 3 with --quick")
    parser.add_argument("--steps", type=int, help="full budget of a trial; default: the preset's; 18 with --quick")
    parser.add_argument("--rounds", type=int, default=1, help="the median counts")
    parser.add_argument("--sides", default="trainer,asha,raycap", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours; only says that it works")
    parser.add_argument("--out", help="folder for the sides' files; default: a temporary one")
    parser.add_argument("--dataloader-workers", type=int, default=0, help="of the Trainer peers")
    parser.add_argument("--asha-cpus", type=int, default=1, help="CPUs of one ASHA trial; the others run beside it")
    parser.add_argument("--asha-gpus", type=float, default=0.25, help="share of a GPU of one ASHA trial")
    parser.add_argument("--trainer-eval", choices=("end", "rungs"), default="end", help="when peer 1 makes captions")
    parser.add_argument("--timeout", type=float, default=6 * 3600.0, help="seconds that one side may take")
    options = parser.parse_intermixed_args(arguments)
    options.sides = [side.strip() for side in options.sides.split(",") if side.strip()]
    for side in options.sides:
        if side not in SIDES:
            parser.error(f"--sides: no side '{side}'; valid: {', '.join(SIDES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def settings(options: argparse.Namespace, out: Path) -> Any:
    from raycap.config import load_config

    shapes = options.data == "shapes"
    source = options.data if shapes else str(Path(options.data).expanduser().resolve())
    # The default trial, which is never pruned, is for a verdict; here all sides train the same sampled trials.
    chosen = [f"data.source={source}", f"run.cache_dir={out / 'shards'}", "tune.default_trial=false"]
    if options.quick:
        chosen += [*QUICK, "tune.trials=3"]
        if shapes:
            chosen.append("data.shapes_images=64,32,32")
    elif shapes:  # as many test images as it takes for the comparison of the winners to be able to fail
        chosen.append("data.shapes_images=1500,256,1536")
    if options.trials:
        chosen.append(f"tune.trials={options.trials}")
    if options.steps:
        chosen.append(f"train.steps={options.steps}")
    return load_config(options.preset or ("shapes-git" if shapes else "photos-git-tiny"), [*chosen, *options.settings])


def shared_job(config: Any, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What all sides are given: shards, trials, the sample order, rungs, decoding."""
    import numpy as np
    import torch

    from raycap.cluster import usable_cores
    from raycap.data.order import Sampler
    from raycap.data.shards import open_shards, prepare_if_needed
    from raycap.models import load_family, load_model, resolve_path
    from raycap.models.quantise import pick_dtype
    from raycap.train.validate import Validator
    from raycap.tune.schedule import rungs
    from raycap.tune.space import sample_trials

    say("preparing the shards")
    shards = open_shards(prepare_if_needed(config))
    counts = np.array([len(row["captions"]) for row in shards.iter_rows("train", ("captions",))])
    sampler = Sampler(counts, config.data.captions, config.train.batch, config.run.seed)
    np.save(out / "order.npy", np.stack([sampler.pairs(step) for step in range(config.train.steps)]))
    held_out = SimpleNamespace(image_ids=list(shards.references("val")), langs=shards.langs("val"))
    family = load_family(config.model.family)
    cm = load_model(config.model, config.data, quantisation="none", device="cpu")
    trials = [
        {**t.to_dict(), "modules": family.lora_targets(cm.model, config.lora.scope, t.targets)}
        for t in sample_trials(config)
    ]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    dtype = pick_dtype(config.model.compute_dtype, torch.device(device))
    return {
        "config": config.to_dict(),
        "shards": str(shards.folder),
        "files": {split: [str(f) for f in shards.files(split)] for split in shards.splits},
        "order": str(out / "order.npy"),
        "model": resolve_path(config.model.path),
        "skip_modules": family.skip_modules(cm.model.config),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": usable_cores(),
        "gpus": torch.cuda.device_count(),
        "trials": trials,
        "steps": config.train.steps,
        "batch": config.train.batch,
        "rungs": rungs(config.train.steps, config.tune.grace_steps, config.tune.eta),
        "eta": config.tune.eta,
        "prompt": config.data.prompt,
        "max_text_tokens": config.data.max_text_tokens,
        "val_rows": Validator(None, None, config).rows(held_out).tolist(),
        "decode": config.to_dict()["decode"],
        "dataloader_workers": options.dataloader_workers,
        "asha_cpus": options.asha_cpus,
        "asha_gpus": options.asha_gpus,
        "trainer_eval": options.trainer_eval,
    }


def run_side(side: str, shared: dict[str, Any], work: Path, timeout: float) -> dict[str, Any]:
    """One side once, in a fresh process; raises RuntimeError with the end of what it said when it fails."""
    work.mkdir(parents=True)
    config = json.loads(json.dumps(shared["config"]))
    config["run"] |= {"cache_dir": str(work / "cache"), "dir": "", "name": side}
    if side == "raycap-full":
        config["tune"] |= {"scheduler": "none", "grace_steps": 0}
    job = {**shared, "config": config, "work": str(work)}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", SIDES[side], str(work / "job.json")]
    load = os.getloadavg()[0]
    began, before = time.time(), time.perf_counter()
    with open(work / "output.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        sampler = TreeSampler(process.pid)
        sampler.start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"nothing within {timeout:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.perf_counter() - before
    cpu, peak = sampler.stop()
    if code != 0:
        tail = (work / "output.log").read_text(encoding="utf-8", errors="replace")[-4000:]
        raise RuntimeError(f"{side} ended with {code}:\n{tail}")
    return side_figures(work, began, seconds, cpu, peak, load, shared["cores"])


def side_figures(work: Path, began: float, seconds: float, cpu: float, peak: int, load: float, cores: int) -> dict:
    result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    if "trials" in result:
        packs = [json.loads(f.read_text()) for f in sorted((work / "run" / "logs").glob("pack-*.seconds.json"))]
        spent, trials = figures.pack_seconds(packs, began, seconds), result["trials"]
    else:
        trials = [json.loads(line) for line in (work / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
        spent = figures.peer_seconds(trials, result["lanes"], began, seconds)
    return {
        "seconds": seconds,
        "best": result["best"],
        "steps": sum(t["steps"] for t in trials),
        "lanes": result["lanes"],
        "lane_seconds": spent,
        "shares": figures.shares(spent),
        "cpu_seconds": cpu,
        "cpu_idle_share": max(0.0, 1 - cpu / (seconds * cores)),
        "peak_memory_bytes": peak,
        "load_before": load,
        "trials": [{k: t.get(k) for k in ("trial_id", "steps", "loss", "curve")} for t in trials],
    }


def summary(rounds: dict[str, Any], shared: dict[str, Any], config: Any, options: Any, out: Path) -> dict[str, Any]:
    sides = {side: figures.median_side(found) for side, found in rounds.items()}
    report: dict[str, Any] = {
        "benchmark": "sweep_vs_trainer",
        "quick": options.quick,
        "data": {"source": config.data.source, "train_samples_a_step": config.train.batch},
        "trials": len(shared["trials"]),
        "steps": shared["steps"],
        "rungs": shared["rungs"],
        "machine": machine(shared),
        "sides": sides,
    }
    ours = sides.get("raycap")
    if ours is None:
        return report
    from raycap.data.shards import open_shards

    shards = open_shards(shared["shards"])
    peers = [side for side in ("trainer", "asha") if side in sides]
    report["ratios"] = {side: figures.ratios(sides[side], ours, side) for side in peers}
    if "raycap-full" in sides:
        report["ratios_measured_without_halving"] = {
            side: sides[side]["seconds"] / sides["raycap-full"]["seconds"] for side in peers
        }
    say("comparing the winners' captions")
    named = {side: sides[side]["best"]["adapter"] for side in (*peers, "raycap")}
    own = {side: json.loads((Path(a) / "val_captions.json").read_text(encoding="utf-8")) for side, a in named.items()}
    every = shards.references("val")
    report["val"] = verdicts(own, {i: every[i] for i in own["raycap"]}, shards.groups("val"), config)
    if "test" in shards.splits:
        # Chosen on val, so val flatters each side's choice; test flatters nobody.
        captions = decode_all(shared, "test", named, out)
        report["test"] = verdicts(captions, shards.references("test"), shards.groups("test"), config)
    return report


def verdicts(captions: dict[str, dict[str, str]], references: Any, groups: Any, config: Any) -> dict[str, Any]:
    return {
        side: figures.non_inferior(
            captions["raycap"], texts, references, groups, resamples=config.evaluate.resamples, seed=config.run.seed
        )
        for side, texts in captions.items()
        if side != "raycap"
    }


def decode_all(shared: dict[str, Any], split: str, adapters: dict[str, str], out: Path) -> dict[str, dict[str, str]]:
    job, found = out / "winners.json", out / f"winners-{split}.json"
    job.write_text(json.dumps({**shared, "work": str(out)}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.peers.score_winners", str(job), split, str(found)]
    command += [f"{side}={folder}" for side, folder in adapters.items()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return json.loads(found.read_text(encoding="utf-8"))["captions"]


def machine(shared: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    names = ("ray", "torch", "transformers", "peft", "bitsandbytes")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cores": shared["cores"],
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "dtype": shared["dtype"],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
