"""Model families by name, and how one of their models is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.data.pixels import decode_stored
from raycap.errors import ConfigError, ModelError, did_you_mean
from raycap.settings import prompt_for

if TYPE_CHECKING:
    from raycap.config import DataSettings, ModelSettings
    from raycap.models.base import CaptionModel, Family

FAMILIES: dict[str, str] = {
    "git": "raycap.models.git:Git",
    "blip": "raycap.models.blip:Blip",
    "generic": "raycap.models.generic:Generic",
    "clip_llama": "raycap.models.clip_llama:ClipLlama",
    "paligemma": "raycap.models.paligemma:PaliGemma",
    "qwen2_vl": "raycap.models.qwen2_vl:Qwen2VL",
}
SOME_USE = ("min_pixels", "max_pixels", "vision_path", "vision_cls", "graft_path")
"""Settings of `model.*` that have an effect on some families alone; each says which in `uses`."""
BUILTIN: dict[str, str] = {"builtin:tiny-git": "tiny/git"}


def register_family(name: str, place: str) -> None:
    """Add a family as "module:attribute"; a name that is taken is refused."""
    if name in FAMILIES:
        raise ConfigError(f"model.family '{name}' is registered already, as {FAMILIES[name]}")
    FAMILIES[name] = place


def load_family(name: str, settings: ModelSettings | None = None) -> Family:
    """The family of that name, which loads its models and processors by `settings`.

    Raises:
        ConfigError: there is none; a setting that is for other families.
    """
    if name not in FAMILIES:
        raise ConfigError(f"model.family={name!r} is not known; {did_you_mean(name, FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    family = getattr(import_module(module), attribute)(settings)
    for field in dataclasses.fields(family.settings):
        value = getattr(family.settings, field.name)
        if field.name in SOME_USE and field.name not in family.uses and value != field.default:
            raise ConfigError(f"model.{field.name}={value} has no effect on family {name}: remove it")
    return family


def resolve_path(path: str | Path) -> str:
    """What transformers loads: the folder of a `builtin:` model, a local folder, or a hub id as it is.

    Raises:
        ModelError: a folder that is not there.
        ConfigError: a builtin model that is none.
    """
    text = str(path)
    if text.startswith("builtin:"):
        if text not in BUILTIN:
            raise ConfigError(f"model.path={text} is not shipped; {did_you_mean(text, BUILTIN)}")
        return str(resources.files("raycap.models") / BUILTIN[text])
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"model.path={text}: there is no such folder, and a hub id has the form owner/name")
    return text


def load_model(
    model: ModelSettings,
    data: DataSettings,
    *,
    path: str | Path | None = None,
    quantisation: str | None = None,
    compute_dtype: str | None = None,
    device: str | None = None,
    lang: str = "",
) -> CaptionModel:
    """Load the base that `model` names, or the model in `path`, frozen, with its processor.

    `lang` is the language it captions in, where there is a prompt for each; without it such a model gets none.
    `quantisation`, `compute_dtype` and `device` override the settings; a folder that was saved quantised loads as that.

    Raises:
        ModelError: it cannot be loaded as a model of the family, and why.
        ConfigError: a setting that the model cannot follow.
    """
    import torch

    from raycap.models.base import CaptionModel
    from raycap.models.quantise import load_weights, materialise, pick_dtype

    family = load_family(model.family, model)
    place = resolve_path(model.path if path is None else path)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = pick_dtype(compute_dtype or model.compute_dtype, where)
    remote = model.trust_remote_code
    try:
        loaded, kind = load_weights(
            family, place, quantisation or model.quantisation, dtype, where, trust_remote_code=remote,
            double=model.double_quantisation,
        )  # fmt: skip
        processor = family.load_processor(place, trust_remote_code=remote)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{place} cannot be loaded as a model of family {family.name}: {error}") from error
    loaded.requires_grad_(False).eval()
    positions = family.max_positions(loaded)
    if positions is not None and data.max_text_tokens > positions:
        raise ConfigError(f"data.max_text_tokens={data.max_text_tokens}, but {place} has {positions} text positions")
    if model.materialise and kind != "none":
        materialise(loaded)
    return CaptionModel(
        family=family,
        model=loaded,
        processor=processor,
        path=place,
        quantisation=kind,
        compute_dtype=dtype,
        device=where,
        prompt=prompt_for(data.prompt, lang) if lang or isinstance(data.prompt, str) else "",
        max_text_tokens=data.max_text_tokens,
    )


def row_preparer(
    family: str, path: str, prompt: str | Mapping[str, str], max_text_tokens: int, settings: ModelSettings | None = None
) -> RowPreparer:
    """What a stream applies to each shard row; see RowPreparer. `settings` are those that the processor loads by."""
    return RowPreparer(family, str(path), prompt, max_text_tokens, settings)


class RowPreparer:
    """Shard row -> row, image_id, pixels uint8 [C, H, W], and per caption token_ids, prompt_lens, truncated, unknown.

    Picklable, and light in a task: the processor is loaded once a process, and no weights are.
    """

    def __init__(
        self,
        family: str,
        path: str,
        prompt: str | Mapping[str, str],
        max_text_tokens: int,
        settings: ModelSettings | None = None,
    ):
        self.family, self.path, self.prompt, self.max_text_tokens = family, path, prompt, max_text_tokens
        self.settings = settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import io

        from PIL import Image

        family, processor = load_processor(self.family, self.path, self.settings)
        if row.get("resized_for"):
            if row["resized_for"] != _image_fingerprint(self.family, self.path, self.settings):
                raise ConfigError(
                    f"these shards hold images resized for another model's processor than that of {self.path}: prepare "
                    "the source again for this model, or with data.store=original"
                )
            pixels = decode_stored(row["image"]["bytes"])
        else:
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                pixels = family.resize(processor, image.convert("RGB"))
        prompt = prompt_for(self.prompt, row.get("lang") or "")
        coded = family.encode_all(processor, row["captions"], prompt, self.max_text_tokens)
        unknown = family.unknown_token(processor)
        return {
            "row": row["row"],
            "image_id": row["image_id"],
            "pixels": pixels,
            "token_ids": [ids for ids, _, _ in coded],
            "prompt_lens": [length for _, length, _ in coded],
            "truncated": [int(cut) for _, _, cut in coded],
            "unknown": [0 if unknown is None else ids.count(unknown) for ids, _, _ in coded],
        }


class Resizer:
    """An image as the model's own processor resizes it, for `prepare`; picklable, the processor is loaded in the task."""

    def __init__(self, family: str, path: str, settings: ModelSettings | None = None):
        self.family, self.path, self.settings = family, str(path), settings

    def __call__(self, image: Any) -> Any:
        family, processor = load_processor(self.family, self.path, self.settings)
        return family.resize(processor, image)

    def describe(self) -> dict[str, Any]:
        family, processor = load_processor(self.family, self.path, self.settings)
        shape = [int(n) for n in family.image_size(processor)]
        return {
            "processor": _image_fingerprint(self.family, self.path, self.settings),
            "family": self.family,
            "shape": shape,
        }


@lru_cache(maxsize=4)
def _image_fingerprint(name: str, path: str, settings: ModelSettings | None) -> str:
    family, processor = load_processor(name, path, settings)
    return family.image_fingerprint(processor)


@lru_cache(maxsize=4)
def load_processor(name: str, path: str, settings: ModelSettings | None) -> tuple[Family, Any]:
    """The family called `name`, and the processor that lies at `path` (a folder, a hub id, or builtin:...).

    Raises:
        ModelError: there is none, or it is of another kind.
    """
    family, place = load_family(name, settings), resolve_path(path)
    remote = settings is not None and settings.trust_remote_code
    try:
        return family, family.load_processor(place, trust_remote_code=remote)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{place} has no processor for a model of family {family.name}: {error}") from error
