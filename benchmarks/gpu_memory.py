"""Predicted memory of each preset at full size against what a GPU takes, with random weights.

    python -m benchmarks.gpu_memory [PRESET ...] [--out FILE]

Prints JSON; exits with 1 where a prediction is off by more than a tenth, or 001's limits do not hold. The work is that of
the prediction (raycap.train.memory), run for real: a step of a pack, the tower, validation, decoding a whole batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raycap.config import Config, load_config
from raycap.models import load_family, resolve_path
from raycap.models.base import CaptionModel
from raycap.models.quantise import load_weights
from raycap.train.features import TOWER_BATCH
from raycap.train.memory import BlankProcessor, Predictor

PRESETS = ("pokemon-git", "iu-xray-blip", "stair-qwen2vl", "flickr30k-clip-tinyllama", "risc-paligemma")
BOUND = 0.1
LIMITS = {"iu-xray-blip": {"training": 3.5e9, "serving": 1e9, "checkpoint": 0.45e9}}
"""What 001 needed 3.9, 1.5 and 0.9 GB for."""


class CudaWatch:
    """Bytes that a block takes of a GPU on top of what is there, by torch's own count."""

    def __enter__(self) -> CudaWatch:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated() - self.before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


class Measured(Predictor):
    """The predictor's work on a model that is there."""

    device = values_on = torch.device("cuda")
    watch = CudaWatch  # type: ignore[assignment]

    def __init__(self, config: Config, folder: Path, **options: Any):
        super().__init__(config, **options)
        self.folder = folder
        self.held = 0

    def base(self, quantisation: str) -> CaptionModel:
        with self.watch() as watch:
            cm = self.load(quantisation)
            gc.collect()
            self.held = watch.now
        return cm

    def load(self, quantisation: str) -> CaptionModel:
        family = load_family(self.config.model.family, self.config.model)
        model, kind = load_weights(
            family, str(self.folder), quantisation, self.dtype, self.device, trust_remote_code=False,
            double=self.config.model.double_quantisation,
        )  # fmt: skip
        return CaptionModel(
            family=family, model=model.requires_grad_(False).eval(), processor=BlankProcessor(), path=str(self.folder),
            quantisation=kind, compute_dtype=self.dtype, device=self.device, prompt="",
            max_text_tokens=self.config.data.max_text_tokens,
        )  # fmt: skip

    def weights(self, cm: CaptionModel, *, stored: bool = False) -> int:
        if not stored:
            return self.held
        with tempfile.TemporaryDirectory() as folder:
            cm.model.save_pretrained(folder)
            return sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))

    def _tower(self, engine: Any) -> tuple[int, torch.Tensor | None]:
        if not engine.images.stored:
            return 0, None
        with self.watch() as watch:
            values = engine.cm.family.blank_images(self.described, TOWER_BATCH)
            features = engine.cm.family.encode_images(engine.cm, values)
        return watch.peak, features[:1].cpu()

    def _decoding(self, cm: CaptionModel, images: Any, *, told: bool = False) -> int:
        return super()._decoding(cm, images, told=told)


@contextmanager
def random_weights(config: Config, device: torch.device) -> Iterator[Path]:
    """A folder with a model of the preset's architecture and weights of no meaning, in bf16; a folder as it is."""
    predictor = Predictor(config)
    if not predictor.known:
        yield Path(resolve_path(config.model.path))
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = predictor.family.build(predictor.described)
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()
        yield Path(folder)


def compare(name: str, config: Config, measured: type[Measured] = Measured, **options: Any) -> dict[str, Any]:
    """Each figure of one preset, predicted and measured; `wrong` says what is off."""
    told = Predictor(config, **options)
    rows, wrong = [], []
    limits = LIMITS.get(name, {})
    with random_weights(config, measured.device) as folder:
        there = measured(config, folder, **options)
        for slots in sorted({1, config.tune.slots}):
            rows.append(_row(f"training, {slots} slots", told.training(slots), there.training(slots)))
        del there
        served = measured(config, folder, **options).serving()
        predicted = told.serving()
        rows.append(_row(f"serving {served.variant}", predicted, served))
    for row in rows:
        if abs(row["ratio"] - 1) > BOUND:
            wrong.append(f"{row['what']}: measured {row['ratio']:.2f} times the prediction")
    reached = {"training": rows[0]["measured"]["total"], "serving": rows[-1]["measured"]["total"],
               "checkpoint": served.checkpoint}  # fmt: skip
    wrong += [
        f"{what}: {reached[what]} bytes, at most {limit:.0f}" for what, limit in limits.items() if reached[what] > limit
    ]
    return {"preset": name, "rows": rows, "wrong": wrong}


def _row(what: str, predicted: Any, measured: Any) -> dict[str, Any]:
    figures = {
        side: {**vars(found), "total": found.total}
        for side, found in (("predicted", predicted), ("measured", measured))
    }
    return {"what": what, "ratio": figures["measured"]["total"] / figures["predicted"]["total"], **figures}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here; `raycap sweep PRESET --dry-run` prints the predictions", file=sys.stderr)
        return 2
    found = {
        "device": torch.cuda.get_device_name(),
        "presets": [compare(n, load_config(n)) for n in args.presets or PRESETS],
    }
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 1 if any(preset["wrong"] for preset in found["presets"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
