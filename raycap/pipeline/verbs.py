"""The parts of the main job that a person asks for alone: prepare, caption, serve; evaluation.py has evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect
from raycap.config import Config
from raycap.errors import ConfigError, ModelError
from raycap.pipeline.tools import prepare_tools
from raycap.settings import prompt_for
from raycap.stop import stoppable

if TYPE_CHECKING:
    from raycap.data.shards import Shards
    from raycap.report.live import Progress
    from raycap.report.tokens import ModelTokens


def prepare(config: Config, out: Path, *, tokens: bool = False, plain: bool = False) -> dict[str, dict[str, Any]]:
    """Write `config.data.source` as shards into `out`.

    Returns: with `tokens`, by language, what the tokeniser of `config.model` makes of the captions; else nothing.
    """
    from raycap.data.shards import open_shards
    from raycap.data.shards import prepare as write_shards
    from raycap.report.live import Progress
    from raycap.report.tokens import tokens_of_shards

    with Progress(f"prepare · {out}", plain=plain, phases=("prepare",)) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        write_shards(config, out, progress.count, prepare_tools(config))
        if not tokens:
            return {}
        progress.phase("prepare", f"tokens of {config.model.path}")
        try:
            return tokens_of_shards(open_shards(out), _model_tokens(config))
        except (ModelError, ConfigError) as error:  # the shards are whole without it
            progress.line(f"captions are not counted in tokens: {error.message}")
            return {}


def explore(
    config: Config,
    out: Path,
    *,
    sample: int = 2000,
    tokens: bool = True,
    clip: str | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """Describe `config.data.source`; writes explore.html and explore.json into `out`, returns what the latter holds.

    `tokens` adds lengths in the tokens of `config.model`, `clip` names an open_clip model for cosines of texts.
    """
    from raycap.data.shards import open_shards, prepare_if_needed
    from raycap.files import write_atomic, write_json
    from raycap.report.explore import explore as describe
    from raycap.report.explore_page import random_pictures, render
    from raycap.report.live import Progress

    with Progress(f"explore · {out}", plain=plain, phases=("prepare", "explore")) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        shards = open_shards(prepare_if_needed(config, progress.count, prepare_tools(config)))
        progress.phase("explore", "reading captions")
        found = describe(
            shards,
            seed=config.run.seed,
            sample=sample,
            model=_model_tokens(config) if tokens else None,
            clip=_clip_texts(clip) if clip else None,
            clip_name=clip or "",
            progress=progress.count,
        )
        write_json(out / "explore.json", found)
        name = config.run.name or Path(config.data.source).name
        write_atomic(out / "explore.html", render(found, random_pictures(shards, config.run.seed), name))
    return found


def _model_tokens(config: Config) -> Callable[[str], ModelTokens]:
    """Language -> the tokeniser of `config.model`, under that language's prompt."""
    from raycap.models import load_processor
    from raycap.report.tokens import ModelTokens

    family, processor = load_processor(config.model.family, config.model.path, config.model)

    def encode(captions: Sequence[str]) -> list[Sequence[int]]:
        return processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"]

    alone = len(encode(["a"])[0])

    def of(lang: str) -> ModelTokens:
        prompt, limit = prompt_for(config.data.prompt, lang), config.data.max_text_tokens
        whole, _, _ = family.encode(processor, "a", prompt, limit)
        return ModelTokens(config.model.path, encode, family.unknown_token(processor), limit, len(whole) - alone)

    return of


def _clip_texts(model: str) -> Any:
    from raycap.models.clip_score import shared

    scorer = shared(model)
    return lambda captions: scorer.text_features(captions, prefix="")[0]


def caption(config: Config, model: Path, pictures: Sequence[Path]) -> list[str]:
    """Captions of picture files, in order, in this process.

    Raises:
        DataError: a file that is no picture, named.
    """
    import io

    from PIL import Image

    from raycap.data.images import BadImage, check_image
    from raycap.errors import DataError
    from raycap.export.captioner import Captioner

    checked = []
    for picture in pictures:
        found = check_image(picture.read_bytes())
        if isinstance(found, BadImage):
            raise DataError(f"{picture}: {found.error}")
        checked.append(found.data)
    captioner = Captioner.load(config, model)
    return captioner.caption([captioner.prepare(Image.open(io.BytesIO(data)).convert("RGB")) for data in checked])


def serve(config: Config, model: Path, *, plain: bool = False) -> None:
    """Serve a model folder until Ctrl-C or SIGTERM."""
    from raycap.report.live import Progress
    from raycap.serve.app import serving

    with Progress(f"serve · {model}", plain=plain, phases=("serve",)) as progress:
        progress.phase("serve", "starting Ray Serve")
        with stoppable(), connect(config), serving(config, model) as served:
            stay(progress, served)


def caption_through(url: str, shards: Shards, split: str, batch: int) -> dict[str, str]:
    """Image id -> caption of a whole split, asked of a server in requests of `batch` images."""
    from raycap.serve.client import caption_images

    ids: list[str] = []

    def named() -> Iterator[tuple[str, bytes]]:
        for row in shards.iter_rows(split, ("image_id", "image")):
            ids.append(row["image_id"])
            yield row["image_id"], row["image"]["bytes"]

    answers = caption_images(url, named(), batch=batch)
    return dict(zip(ids, answers, strict=True))


def pictures(config: Config, shards: Shards, split: str) -> dict[str, bytes] | None:
    """Encoded images of a split by id, where a metric of `evaluate.metrics` looks at them; else None."""
    if "clipscore" not in config.evaluate.metrics:
        return None
    return {row["image_id"]: row["image"]["bytes"] for row in shards.iter_rows(split, ("image_id", "image"))}


def stay(progress: Progress, served: Any) -> None:
    progress.done(
        f"serving {served.name} at {served.url} until Ctrl-C. Caption a picture of yours:\n"
        f"  curl -F images=@photo.jpg {served.url}/v1/captions"
    )
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
