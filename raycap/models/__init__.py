"""Model families by name, and loading one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from raycap.config import DataSettings, ModelSettings
    from raycap.models.base import CaptionModel, Family

FAMILIES: dict[str, str] = {"git": "raycap.models.git:Git"}
BUILTIN = "builtin:"


def register(name: str, place: str) -> None:
    """Add a family as "module:attribute"; a name that is taken is refused."""
    if name in FAMILIES:
        raise ConfigError(f"model family '{name}' is registered already, as {FAMILIES[name]}")
    FAMILIES[name] = place


def load_family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"model.family={name!r}; {did_you_mean(name, FAMILIES)}")
    module, attribute = FAMILIES[name].split(":")
    return getattr(import_module(module), attribute)()


def resolve_path(path: str | Path) -> str:
    """A local folder or hub id as transformers takes it; `builtin:tiny-git` is the folder that ships in the package."""
    text = str(path)
    if text.startswith(BUILTIN):
        name = text.removeprefix(BUILTIN)
        shipped = {"tiny-git": "tiny/git"}
        if name not in shipped:
            raise ConfigError(f"model.path={text!r}; {did_you_mean(text, [BUILTIN + s for s in shipped])}")
        return str(Path(__file__).parent / shipped[name])
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"model.path={text}: there is no such folder, and it is no hub id (owner/name)")
    return text


def load_model(
    model: ModelSettings,
    data: DataSettings,
    *,
    path: str | Path | None = None,
    quantisation: str | None = None,
    compute_dtype: str | None = None,
    device: str | None = None,
) -> CaptionModel:
    """Load the base (or the model in `path`) with its processor.

    A folder that was saved in NF4 loads as such whatever `quantisation` says.

    Raises:
        ModelError: the files are not there or not those of the family.
    """
    import torch

    from raycap.models.base import CaptionModel
    from raycap.models.quantise import compute_in, load_options, mend, pick_dtype

    family = load_family(model.family)
    place = resolve_path(path if path is not None else model.path)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = pick_dtype(compute_dtype or model.compute_dtype, where)
    wanted = quantisation or model.quantisation
    try:
        options, kind = load_options(family, place, wanted, dtype, where, trust_remote_code=model.trust_remote_code)
        loaded = family.load_weights(place, **options)
        processor = family.load_processor(place, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{place} cannot be loaded as a {family.name} model: {error}") from error
    if kind == "nf4":
        compute_in(loaded, dtype)
    mend(loaded, materialise=model.materialise)
    loaded.requires_grad_(False)
    if "device_map" not in options:
        loaded.to(where)
    return CaptionModel(family, loaded, processor, place, kind, dtype, where, data.prompt, data.max_text_tokens)


def row_preparer(
    family: str, path: str, prompt: str, max_text_tokens: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A picklable function: shard row -> {row, image_id, pixels uint8 [3, H, W], token_ids, prompt_lens, truncated}."""
    return RowPreparer(family, str(path), prompt, max_text_tokens)


class RowPreparer:
    """Loads the processor alone, once a process."""

    def __init__(self, family: str, path: str, prompt: str, max_text_tokens: int):
        self.family, self.path, self.prompt, self.max_text_tokens = family, path, prompt, max_text_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import io

        from PIL import Image

        family, processor = _processor(self.family, self.path)
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        coded = [family.encode(processor, c, self.prompt, self.max_text_tokens) for c in row["captions"]]
        return {
            "row": row["row"],
            "image_id": row["image_id"],
            "pixels": family.resize(processor, image),
            "token_ids": [ids for ids, _, _ in coded],
            "prompt_lens": [length for _, length, _ in coded],
            "truncated": [int(cut) for _, _, cut in coded],
        }


@lru_cache(maxsize=4)
def _processor(family: str, path: str) -> tuple[Any, Any]:
    loaded = load_family(family)
    return loaded, loaded.load_processor(resolve_path(path))
