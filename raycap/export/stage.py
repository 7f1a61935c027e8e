"""What follows a sweep on a machine with the model: captions of each variant, the merges, the gate.

One function from plain values to files and plain values, so that it runs in this process or as a task on another node.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.config import Config, from_dict
from raycap.data.shards import Shards, open_shards
from raycap.errors import GateError, ModelError
from raycap.export.captioner import Captioner

if TYPE_CHECKING:
    from raycap.export.card import CardFacts

CHUNK_IMAGES = 256
"""Images decoded and held at once."""


def caption_split(
    captioner: Captioner, shards: Shards, split: str, image_ids: Sequence[str] | None = None
) -> dict[str, str]:
    """Image id -> caption for a split, or for `image_ids` of it; memory stays bounded by CHUNK_IMAGES pictures."""
    from PIL import Image

    wanted = set(image_ids) if image_ids is not None else None
    captions: dict[str, str] = {}
    ids, pixels = [], []

    def flush() -> None:
        captions.update(zip(ids, captioner.caption(pixels)))
        ids.clear()
        pixels.clear()

    for row in shards.iter_rows(split, ("image_id", "image")):
        if wanted is not None and row["image_id"] not in wanted:
            continue
        ids.append(row["image_id"])
        pixels.append(captioner.prepare(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")))
        if len(ids) == CHUNK_IMAGES:
            flush()
    if ids:
        flush()
    return captions


def load_base(config: Config, *, adapter: Path | str | None = None) -> Captioner:
    """The base as it was trained on (NF4 where the run quantises), with an adapter's modules put in by plain peft.

    Computes in fp32 on a CPU, as every exported model does, so that variants differ in their weights alone.
    """
    import torch

    from raycap.models import load_model
    from raycap.models.prompt import apply_prompt, is_prompt

    dtype = None if torch.cuda.is_available() else "fp32"
    model = load_model(config.model, config.data, compute_dtype=dtype, lang=config.evaluate.lang)
    if adapter is not None:
        from peft import PeftModel

        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"{adapter} is no adapter: it has no adapter_config.json")
        if is_prompt(adapter):
            apply_prompt(model, adapter)
        else:
            PeftModel.from_pretrained(model.model, str(adapter))  # puts its modules into model.model in place
    model.model.eval()
    return Captioner(model, config)


def export_stage(
    settings: dict[str, Any],
    shards_folder: str,
    run_dir: str,
    adapter: str,
    *,
    default: str | None = None,
    worst: str | None = None,
    worst_ids: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
    memory: bool = False,
    threads: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Caption val and test with the base and the winner, merge, gate, and caption test with what came out.

    Returns: captions {split: {variant: {image_id: caption}}}, gate (its dict), refused (the gate's message or ""),
    seconds {phase: s}, memory {trial: bytes} (with `memory`, where it can be predicted). `default` is the adapter of the
    preset's own settings, captioned as the winner is. `worst` is a trial's adapter whose captions of the test images
    `worst_ids` are wanted for the report; it is not scored.
    """
    import torch

    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.tokenise import quick_tokeniser
    from raycap.export.card import CardFacts
    from raycap.export.folder import read_manifest
    from raycap.export.gate import run_gate
    from raycap.models.prompt import is_prompt

    if threads:
        torch.set_num_threads(threads)
    config, shards, folder = from_dict(settings), open_shards(shards_folder), Path(run_dir)
    shards = shards.speaking(config.evaluate.lang)
    references = shards.references("val")
    lang = config.evaluate.lang
    scorer = CiderScorer(references, quick_tokeniser(lang), lang=lang)
    captions: dict[str, dict[str, dict[str, str]]] = {"val": {}, "test": {}}
    seconds: dict[str, float] = {}

    def timed(phase: str, began: float) -> None:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began

    began = time.monotonic()
    say("captions of the base, before any training")
    base = load_base(config)
    for split in captions:
        captions[split]["zero-shot"] = caption_split(base, shards, split)
    del base
    say("captions of the winner's adapter")
    winner = load_base(config, adapter=adapter)
    for split in captions:
        captions[split]["adapter"] = caption_split(winner, shards, split)
    del winner
    if default:
        say("captions of the preset's default trial")
        ordinary = load_base(config, adapter=default)
        for split in captions:
            captions[split]["default"] = caption_split(ordinary, shards, split)
        del ordinary
    if worst and worst_ids:
        captions["test"]["worst"] = caption_split(load_base(config, adapter=worst), shards, "test", worst_ids)
    timed("adapter", began)
    if is_prompt(adapter):
        refused = (
            "prompt tuning cannot be merged: what it learnt is input and no weight, so that there is no model to promote and "
            f"nothing is served. best/adapter holds it, for plain peft on {config.model.path}."
        )
        return {"captions": captions, "gate": {}, "refused": refused, "seconds": seconds, "memory": {}}

    def score(model_folder: Path, variant: str) -> float:
        found = caption_split(Captioner.load(config, model_folder), shards, "val")
        captions["val"][variant] = found
        return scorer.score(found)[0]

    began = time.monotonic()
    refused = ""
    card: CardFacts = CardFacts(**(facts or {"name": config.run.name or "model", "base": config.model.path}))
    try:
        run_gate(
            config, Path(adapter), scorer.score(captions["val"]["adapter"])[0], score,
            folder / "best", folder / "gate.json", facts=card, progress=say,
        )  # fmt: skip
    except GateError as error:
        refused = error.message
    timed("gate", began)

    began = time.monotonic()
    from raycap.files import read_json

    gate = read_json(folder / "gate.json")
    kept = captions["val"].pop("merged-dequantised", None)
    if kept is not None and gate["merged_dequantised"] >= gate["merged"]:
        captions["val"]["merged"] = kept
    packed = {onto: captions["val"].pop(f"merged-nf4-{onto}", None) for onto in ("original", "dequantised")}
    captions["val"]["merged-nf4"] = packed[read_manifest(folder / "best" / "merged-nf4")["onto"]]
    for variant in ("merged", "merged-nf4"):
        say(f"captions of {variant}")
        model = Captioner.load(config, folder / "best" / variant)
        captions["test"][variant] = caption_split(model, shards, "test")
    timed("merged", began)
    return {"captions": captions, "gate": gate, "refused": refused, "seconds": seconds,
            "memory": _memory(settings, say) if memory else {}}  # fmt: skip


def _memory(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, int]:
    """What each trial takes of a GPU alone, for the report; nothing, where that cannot be told."""
    from raycap.tune.memory import trial_memory

    try:
        return trial_memory(settings, say=say)
    except Exception as error:  # a model of somebody's own: no figure is no reason to lose a run
        say(f"what each trial would take of a GPU cannot be told ({type(error).__name__}: {error})")
        return {}


def facts_dict(facts: CardFacts) -> dict[str, Any]:
    """Plain values of a card's facts, to travel to another process."""
    return dataclasses.asdict(facts)
