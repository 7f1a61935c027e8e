"""`raycap evaluate`: one or several models on one or several image sets, captioned and scored by the same code."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect
from raycap.config import Config
from raycap.errors import DataError
from raycap.pipeline.remote import in_worker
from raycap.pipeline.tools import prepare_tools
from raycap.pipeline.verbs import caption_through, pictures
from raycap.settings import prompt_for
from raycap.trial import apply_overrides

if TYPE_CHECKING:
    from raycap.data.shards import Shards
    from raycap.report.live import Progress


def evaluate(
    config: Config,
    model: Path,
    *,
    split: str,
    out: Path | None = None,
    plain: bool = False,
    also: Sequence[str] = (),
    zero_shot: bool = False,
    exclude: Path | None = None,
) -> dict[str, Any]:
    """Caption a split with a model folder through its HTTP endpoint, and score the answers.

    `also` names further image sets (out of the domain that the model was trained in), each as `data.source` does;
    `zero_shot` has the base that `model.path` names do the same first. `exclude` is a reviewed file of flagged captions: its
    images are left out of the figures of the first set, beside which those of the whole set stand (CIDEr of both by the
    document frequencies of the whole).

    Returns: split, images, metrics {name: {score, signature}}, collapse, parameters, peak_memory_bytes; `excluded` {images,
    unknown, whole {images, metrics}} with `exclude`; `sets`, a row {source, model, images, metrics, collapse, parameters,
    peak_memory_bytes} a model and set, where there are several; predictions and flagged (files) where `out` was given.
    """
    from raycap.evaluate.collapse import excluded
    from raycap.files import read_rows, write_json
    from raycap.models import resolve_path
    from raycap.report.live import Progress

    left_out = excluded(read_rows(exclude, ("image_id",)), str(exclude)) if exclude else set()
    phases = ("prepare", "serve", "score")
    with Progress(f"evaluate · {model}", plain=plain, phases=phases) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        sets = {config.data.source: _open(config, split, progress)}
        for source in also:
            if source in sets:
                raise DataError(f"--also {source}: that is the first set already")
            sets[source] = _open(apply_overrides(config, {"data.source": source}), split, progress)
        models = {"zero-shot": Path(resolve_path(config.model.path))} if zero_shot else {}
        models[_called(model)] = model
        rows: list[dict[str, Any]] = []
        with connect(config) as ray:
            for name, folder in models.items():
                rows += _one_model(ray, config, name, folder, sets, split, progress, left_out, out)
    # The first set of the model that was asked for is what the verb is about; the rest stands beside it.
    first = next(row for row in rows if row["model"] == _called(model) and row["source"] == config.data.source)
    found: dict[str, Any] = {"split": split, **{k: v for k, v in first.items() if k not in ("source", "model")}}
    if len(rows) > 1:
        found["sets"] = [{k: v for k, v in row.items() if k not in ("predictions", "flagged")} for row in rows]
    if out is not None:
        write_json(out / "metrics.json", found)
    return found


def _one_model(
    ray: Any,
    config: Config,
    name: str,
    model: Path,
    sets: Mapping[str, Shards],
    split: str,
    progress: Progress,
    left_out: Collection[str],
    out: Path | None,
) -> list[dict[str, Any]]:
    from raycap.report.provenance import MemoryMeter
    from raycap.serve.app import serving

    rows = []
    with MemoryMeter() as memory:
        progress.phase("serve", f"starting Ray Serve with {model}")
        said: dict[str, dict[str, str]] = {}
        with serving(config, model, port=0) as served:
            for source, shards in sets.items():
                progress.phase("serve", f"{name} captions the {split} images of {source}")
                said[source] = caption_through(served.url, shards, split, config.serve.max_batch)
        memory.sample()
    for number, (source, shards) in enumerate(sets.items()):
        progress.phase("score", f"{name} on {source}: {', '.join(config.evaluate.metrics)}")
        row: dict[str, Any] = {"source": source, "model": name}
        row |= _scored(ray, config, shards, split, said[source], model, progress, left_out if number == 0 else ())
        row |= {"parameters": parameter_count(model), "peak_memory_bytes": memory.peak_bytes}
        if out is not None:
            row |= _written(config, shards, split, said[source], out, "" if not rows and name != "zero-shot" else
                            f"{name}.{number}.")  # fmt: skip
        rows.append(row)
    return rows


def _scored(
    ray: Any,
    config: Config,
    shards: Shards,
    split: str,
    captions: Mapping[str, str],
    model: Path,
    progress: Progress,
    left_out: Collection[str],
) -> dict[str, Any]:
    from raycap.evaluate import score
    from raycap.evaluate.collapse import collapse

    references = shards.references(split)
    names = tuple(m for m in config.evaluate.metrics if m != "perplexity")
    images = pictures(config, shards, split)

    def metrics(ids: Collection[str]) -> dict[str, Any]:
        if not names:
            return {}
        with warnings.catch_warnings():
            # All references give the document frequencies, so that both figures are on one scale.
            warnings.filterwarnings("ignore", message=".*have no prediction and are not scored")
            found = score(
                {i: captions[i] for i in ids}, {i: references[i] for i in captions}, names, lang=config.evaluate.lang,
                images=images, clip=config.evaluate.clip,
            )  # fmt: skip
        return {name: {"score": s.score, "signature": s.signature} for name, s in found.items()}

    kept = [i for i in captions if i not in left_out]
    if not kept:
        raise DataError(f"all {len(captions)} images of {split} are excluded: nothing is left to score")
    lang = config.evaluate.lang
    told = collapse(
        list(captions.values()),
        [references[i] for i in captions],
        prompt=prompt_for(config.data.prompt, lang),
        lang=lang,
    )
    row: dict[str, Any] = {"images": len(kept), "metrics": metrics(kept), "collapse": told}
    if left_out:
        row["excluded"] = {
            "images": len(captions) - len(kept),
            "unknown": sorted(set(left_out) - set(captions)),
            "whole": {"images": len(captions), "metrics": metrics(list(captions))},
        }
    if "perplexity" in config.evaluate.metrics:
        from raycap.export.perplexity import perplexity_task

        log = config.cache_dir / "logs" / "perplexity.log"
        found = in_worker(
            ray, perplexity_task, config.to_dict(), str(shards.folder), split, str(model),
            log=log, say=lambda said: progress.phase("score", said),
        )  # fmt: skip
        row["metrics"]["perplexity"] = {"score": found["score"], "signature": found["signature"]}
    return row


def _written(
    config: Config, shards: Shards, split: str, captions: Mapping[str, str], out: Path, prefix: str
) -> dict[str, str]:
    """The captions, and those of them that a person should look at."""
    from raycap.evaluate.collapse import flagged
    from raycap.files import write_jsonl

    references = shards.references(split)
    rows = [{"image_id": i, "caption": c, "references": references[i]} for i, c in captions.items()]
    found = {"predictions": str(write_jsonl(out / f"{prefix}{split}.jsonl", rows))}
    lang = config.evaluate.lang
    odd = flagged(captions, references, prompt=prompt_for(config.data.prompt, lang), lang=lang)
    found["flagged"] = str(write_jsonl(out / f"{prefix}{split}.flagged.jsonl", odd))
    return found


def parameter_count(folder: Path) -> int | None:
    """Parameters of a model folder, from its safetensors' headers; a 4-bit weight counts as the two in each byte."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if any(part in name for part in (".absmax", ".quant_map", ".quant_state", ".nested_")):
                    continue
                sizes, kind = tensors.get_slice(name).get_shape(), tensors.get_slice(name).get_dtype()
                many = 1
                for size in sizes:
                    many *= size
                total += many * (2 if kind == "U8" else 1)
    return total or None


def _open(config: Config, split: str, progress: Progress) -> Shards:
    from raycap.data.shards import open_shards, prepare_if_needed

    folder = prepare_if_needed(config, progress.count, prepare_tools(config))
    shards = open_shards(folder).speaking(config.evaluate.lang, (split,))
    shards.references(split)  # a split without rows is told before a server starts
    return shards


def _called(model: Path) -> str:
    """A run's best/merged goes by the run's name and the variant's."""
    return f"{model.parent.parent.name}/{model.name}" if model.parent.name == "best" else model.name
