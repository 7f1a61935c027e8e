"""How often the verdicts speak where nothing is better; prints JSON. Exit code 1 when one of them speaks too often.

    python benchmarks/null_sweep.py                          both nulls over the kept bank, some minutes
    python benchmarks/null_sweep.py --repeats 200 --resamples 1000
    python benchmarks/null_sweep.py --pairs pairs.jsonl      the exchange null alone, over two captions an image of your own
    python benchmarks/null_sweep.py --make-bank results/null-bank.json     train the bank anew, some ten minutes

The bank holds the validation captions of 48 adapters of one setting (shapes, tiny GIT in NF4): twelve seeds of adapter
start and dropout in one pack, for each of four orders of samples. No adapter is better than another but by its seed.

exchange   two adapters of the bank; in every repeat the two captions of each group are swapped at random, so that neither
           side is better, and the model verdict is asked. At most 6 % may speak.
seeds      three adapters drawn from the bank against three others, twice one setting: the setting verdict. At most 6 %.
           Beside it the model verdict on one adapter against one: how often "these captions are better" is said of adapters
           that differ in the seed alone. It may well be true of the captions, and says nothing of a setting.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from raycap.evaluate.cider import CiderScorer
from raycap.evaluate.comparisons import setting_bootstrap
from raycap.evaluate.significance import paired_bootstrap

BANK = Path(__file__).resolve().parents[1] / "results" / "null-bank.json"
ALLOWED = 0.06
ORDERS, SLOTS = 4, 12
SEEDS = 3
TRAIN_IMAGES = 400
SETTING = ["data.source=shapes", "lora.r=16", "lora.dropout=0.1", "train.lr=5e-3", "train.batch=8",
           "train.warmup_steps=5", "tune.default_trial=false", "decode.max_new_tokens=20"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, default=BANK)
    parser.add_argument("--repeats", type=int, default=2_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--make-bank", type=Path, metavar="FILE", help="train the bank and write it there")
    parser.add_argument("--steps", type=int, default=80, help="of an adapter of the bank")
    parser.add_argument("--images", type=int, default=200, help="validation images of the bank")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help='lines {"a", "b", "references"} and, if any, "group"'
    )
    args = parser.parse_args()
    if args.pairs:
        rows = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
        scorer = CiderScorer({n: row["references"] for n, row in enumerate(rows)})
        scores = np.array([scorer.score({n: row[side] for n, row in enumerate(rows)})[1] for side in "ab"])
        groups = [str(row.get("group", n)) for n, row in enumerate(rows)]
        found = exchange(scores, groups, args.repeats, args.resamples, args.seed)
        print(json.dumps({"images": len(rows), "repeats": args.repeats, "resamples": args.resamples, "allowed": ALLOWED,
                          "signature": scorer.signature, "exchange": found}, indent=2))  # fmt: skip
        return int(found["share"] > ALLOWED)
    if args.make_bank:
        make_bank(args.make_bank, args.steps, args.images)
        return 0
    scores, groups, about = read_bank(args.bank)
    found = {
        **about,
        "repeats": args.repeats, "resamples": args.resamples, "seed": args.seed, "allowed": ALLOWED,
        "exchange": exchange(scores, groups, args.repeats, args.resamples, args.seed),
        "seeds": seeds(scores, groups, args.repeats, args.resamples, args.seed),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    spoke = max(found["exchange"]["share"], found["seeds"]["setting_verdict"]["share"])
    return int(spoke > ALLOWED)


def exchange(scores: np.ndarray, groups: list[str], repeats: int, resamples: int, seed: int) -> dict[str, Any]:
    """The best and the worst adapter of the bank, their captions swapped at random by group, asked again and again.

    CIDEr's document frequencies are fixed, so a swapped caption takes its own score with it.
    """
    rng = np.random.default_rng([seed, 1])
    order = np.argsort(scores.mean(axis=1))
    a, b = scores[order[0]], scores[order[-1]]
    number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    index = np.array([number[g] for g in groups])
    began, false = time.process_time(), 0
    for repeat in range(repeats):
        swap = rng.integers(0, 2, len(number)).astype(bool)[index]
        false += paired_bootstrap(
            np.where(swap, b, a), np.where(swap, a, b), groups, resamples=resamples, seed=repeat
        ).p <= 0.05  # fmt: skip
    apart = paired_bootstrap(a, b, groups, resamples=resamples)
    return {**share(false, repeats), "unswapped_difference": apart.difference, "unswapped_p": apart.p,
            "cpu_s": time.process_time() - began}  # fmt: skip


def seeds(scores: np.ndarray, groups: list[str], repeats: int, resamples: int, seed: int) -> dict[str, Any]:
    """Three adapters of one setting against three others of the same."""
    rng = np.random.default_rng([seed, 2])
    began, setting, model = time.process_time(), 0, 0
    for repeat in range(repeats):
        drawn = rng.choice(len(scores), 2 * SEEDS, replace=False)
        a, b = scores[drawn[:SEEDS]], scores[drawn[SEEDS:]]
        setting += setting_bootstrap(a, b, groups, resamples=resamples, seed=repeat).p <= 0.05
        model += paired_bootstrap(a[0], b[0], groups, resamples=resamples, seed=repeat).p <= 0.05
    return {
        "seeds_a_setting": SEEDS,
        "setting_verdict": share(setting, repeats),
        "model_verdict_on_one_adapter_each": share(model, repeats),
        "sd_of_seeds": float(scores.mean(axis=1).std(ddof=1)),
        "cpu_s": time.process_time() - began,
        "note": f"draws from one bank of {len(scores)} adapters overlap: the interval is that of the drawing alone",
    }


def share(count: int, of: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval."""
    z, p = 1.96, count / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return {"share": p, "low": (middle - half) / scale, "high": (middle + half) / scale, "count": int(count)}


def read_bank(path: Path) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """CIDEr [adapters, images] with document frequencies of all the images' references, groups, and what the bank is."""
    bank = json.loads(path.read_text(encoding="utf-8"))
    ids = list(bank["references"])
    scorer = CiderScorer(bank["references"])
    scores = np.array([scorer.score({i: bank["captions"][c] for i, c in zip(ids, said)})[1] for said in bank["said"]])
    means = scores.mean(axis=1)
    about = {"adapters": len(scores), "images": len(ids), "groups": len(set(bank["groups"])), **bank["about"],
             "cider": {"mean": float(means.mean()), "min": float(means.min()), "max": float(means.max())},
             "signature": scorer.signature}  # fmt: skip
    return scores, bank["groups"], about


def make_bank(path: Path, steps: int, images: int) -> None:
    """Train ORDERS packs of SLOTS adapters of one setting, and keep what they say of the validation images."""
    from raycap.config import load_config
    from raycap.data.shapes import generate
    from raycap.data.store import Store
    from raycap.files import write_atomic
    from raycap.models import load_model
    from raycap.train.engine import PackEngine
    from raycap.trial import trial_spec

    scenes = {"train": list(generate(TRAIN_IMAGES, seed=11)), "val": list(generate(images, seed=12))}
    references = {f"val{n:03d}": list(s.captions) for n, s in enumerate(scenes["val"])}
    captions: dict[str, int] = {}
    said: list[list[int]] = []
    for order in range(ORDERS):
        config = load_config("shapes-git", [*SETTING, f"run.seed={order}", f"train.steps={steps}"])
        cm = load_model(config.model, config.data)
        with tempfile.TemporaryDirectory(prefix="raycap-bank-") as folder:
            stores = {}
            for split, found in scenes.items():
                ids = [f"{split}{n:03d}" for n in range(len(found))]
                stores[split] = store = Store.create(
                    Path(folder, split), split, len(ids), cm.family.image_size(cm.processor), image_ids=ids,
                    references={i: list(s.captions) for i, s in zip(ids, found)}, max_tokens=cm.max_text_tokens,
                )  # fmt: skip
                for row, scene in enumerate(found):
                    coded = [cm.family.encode(cm.processor, c, cm.prompt, cm.max_text_tokens) for c in scene.captions]
                    pixels = cm.family.resize(cm.processor, scene.image)[None]
                    store.put([row], pixels, [[c[0] for c in coded]], [[c[1] for c in coded]])
                store.finish()
            engine = PackEngine(cm, stores, config, SLOTS)
            names = [f"o{order}s{k:02d}" for k in range(SLOTS)]
            for k, name in enumerate(names):
                engine.admit(trial_spec(config, name, seed=10_000 * (order + 1) + k))
            began = time.monotonic()
            for step in range(steps):
                engine.step()
                if step % 20 == 19:
                    print(
                        f"order {order}: step {step + 1} of {steps}, {time.monotonic() - began:.0f} s", file=sys.stderr
                    )
            for name in names:
                found = engine.caption(name, "val")
                said.append([captions.setdefault(found[i], len(captions)) for i in references])
            engine.close()
    about = {"setting": [*SETTING, f"train.steps={steps}"], "orders_of_samples": ORDERS, "train_images": TRAIN_IMAGES}
    bank = {
        "about": about,
        "references": references,
        "groups": list(references),
        "captions": list(captions),
        "said": said,
    }
    write_atomic(path, json.dumps(bank, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
