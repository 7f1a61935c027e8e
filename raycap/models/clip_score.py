"""CLIPScore and RefCLIPScore (Hessel et al. 2021) through open_clip; the same cosines choose a caption an image.

Shapes: N images or texts, E width of CLIP's common space. Features are fp32 numpy arrays of length 1.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycap.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from raycap.evaluate.metrics import Prepared, Result

DEFAULT_MODEL = "ViT-B-32/openai"
PREFIX = "A photo depicts "
"""Put before every text by the paper's code."""
WEIGHT = 2.5
"""CLIPScore is this times the cosine, cut off at 0 (the paper's w); RefCLIPScore uses it too."""
BATCH = 64


class ClipScorer:
    """One CLIP, loaded once; cosines between pictures and texts.

    Args:
        model: `architecture/weights` as open_clip lists them, a local folder in open_clip's layout
            (open_clip_config.json beside the weights), or `architecture=file` for weights in a file.
        device: a torch device; a GPU where there is one when None. Scores of CPU and GPU differ in the 4th decimal.

    Raises:
        ModelError: the weights are not here, or are not what they are said to be.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, device: str | None = None):
        import torch

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.preprocess, self.tokenise = _load(model, self.device)
        self.name = _name(model)
        """What a signature calls it."""
        self.context_tokens = int(self.tokenise.context_length)

    def image_features(self, pictures: Iterable[Any]) -> np.ndarray:
        """[N, E] of pictures: PIL images, encoded bytes, or paths."""
        import torch

        found, part = [], []

        def flush() -> None:
            with torch.inference_mode():
                found.append(_numpy(self.model.encode_image(torch.stack(part).to(self.device))))
            part.clear()

        for picture in pictures:
            part.append(self.preprocess(_open(picture)))
            if len(part) == BATCH:
                flush()
        if part:
            flush()
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def text_features(self, texts: Sequence[str], *, prefix: str = PREFIX) -> tuple[np.ndarray, int]:
        """([N, E], how many texts were longer than the context and lost their end, as in the paper's code)."""
        import torch

        texts = [prefix + text for text in texts]
        found = []
        for begin in range(0, len(texts), BATCH):
            with torch.inference_mode():
                found.append(
                    _numpy(self.model.encode_text(self.tokenise(texts[begin : begin + BATCH]).to(self.device)))
                )
        cut = sum(self._tokens(text) > self.context_tokens for text in texts)
        return (np.concatenate(found) if found else np.zeros((0, 0), np.float32)), cut

    def cosines(self, pictures: Iterable[Any], captions: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], int]:
        """Per picture the cosine of each of its captions, and how many captions were cut to the context."""
        counts = [len(own) for own in captions]
        images = self.image_features(pictures)
        if len(images) != len(counts):
            raise DataError(f"{len(images)} pictures for {len(counts)} lists of captions")
        texts, cut = self.text_features([c for own in captions for c in own])
        each = (np.repeat(images, counts, axis=0) * texts).sum(axis=1)
        return np.split(each, np.cumsum(counts)[:-1]), cut

    def _tokens(self, text: str) -> int:
        """Tokens of a text before it is cut, start and end included."""
        if len(text) < self.context_tokens - 2:  # a token is at least one character
            return 0
        if not hasattr(self.tokenise, "encode"):
            return 0
        return len(self.tokenise.encode(text)) + 2


@functools.lru_cache(maxsize=2)
def shared(model: str = DEFAULT_MODEL) -> ClipScorer:
    """The scorer of this process for a model."""
    return ClipScorer(model)


def clipscore(data: Prepared) -> list[Result]:
    """clip_cosine (raw), clipscore (2.5 times it, at least 0) and refclipscore (harmonic mean with the best reference).

    As the paper's code: texts after the prefix "A photo depicts ", cut to 77 tokens; the references' part is the largest
    cosine between caption and reference, unscaled.

    Raises:
        ConfigError: there are no images to look at.
    """
    from raycap.evaluate.metrics import Result

    if data.images is None:
        raise ConfigError(
            "metrics: clipscore looks at the pictures: give `images` (`--images FOLDER` of `raycap score`)"
        )
    missing = [i for i in data.ids if i not in data.images]
    if missing:
        raise DataError(f"clipscore: {len(missing)} of {len(data.ids)} captions have no picture, first {missing[0]!r}")
    scorer = shared(data.clip or DEFAULT_MODEL)
    pictures = scorer.image_features(data.images[i] for i in data.ids)
    captions, cut = scorer.text_features(data.captions)
    flat, cut_references = scorer.text_features([r for own in data.raw_references for r in own])
    cosine = (pictures * captions).sum(axis=1)
    scaled = WEIGHT * np.clip(cosine, 0, None)
    counts = [len(own) for own in data.raw_references]
    alike = (np.repeat(captions, counts, axis=0) * flat).sum(axis=1)
    best = np.maximum.reduceat(alike, np.cumsum([0, *counts[:-1]]))
    total = scaled + best
    both = np.divide(2 * scaled * best, total, out=np.zeros_like(total), where=total > 0)
    parts = {"clip": scorer.name, "tok": "clip", "cut": str(scorer.context_tokens)}
    notes = [
        f"{count} of {many} {what} are longer than CLIP's {scorer.context_tokens} tokens and are cut, as in the paper's code"
        for what, count, many in (("captions", cut, len(captions)), ("references", cut_references, len(flat)))
        if count
    ]
    return [
        Result("clip_cosine", float(cosine.mean()), cosine, {**parts, "variant": "raw"}, tuple(notes)),
        Result("clipscore", float(scaled.mean()), scaled, {**parts, "variant": f"w{WEIGHT}"}),
        Result("refclipscore", float(both.mean()), both, {**parts, "variant": f"w{WEIGHT}"}),
    ]


def _load(model: str, device: str) -> tuple[Any, Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ModelError("CLIP comes from open_clip, which is not installed: `pip install open_clip_torch`") from error
    folder = Path(model).expanduser()
    if folder.is_dir():
        name, weights = f"local-dir:{folder}", None
    elif "=" in model:
        name, weights = model.split("=", 1)
        if not Path(weights).expanduser().is_file():
            raise ModelError(f"CLIP {model}: there is no file {weights}")
    elif model.startswith("hf-hub:"):
        name, weights = model, None
    else:
        name, _, weights = model.partition("/")
        known = open_clip.list_pretrained_tags_by_model(name)
        if weights not in known:
            listed = f"open_clip's weights of {name} are {', '.join(known)}" if known else "open_clip has no such model"
            raise ModelError(
                f"CLIP {model!r} is not known: {listed}. Write architecture/weights ({DEFAULT_MODEL}), a folder with "
                "open_clip_config.json and weights, or architecture=file."
            )
    try:
        loaded, preprocess = open_clip.create_model_from_pretrained(name, weights, device=device, precision="fp32")
        tokenise = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise of many kinds; all mean that the weights are not usable
        raise ModelError(
            f"CLIP {model} cannot be loaded: {' '.join(str(error).split())[:300]} Where there is no network, copy its folder "
            "(open_clip_config.json and weights) here and name that folder."
        ) from error
    return loaded.eval().requires_grad_(False), preprocess, tokenise


def _name(model: str) -> str:
    """A name for signatures without a path of this machine: a folder's weights are named by their hash."""
    from raycap.files import sha256_file, sha256_folder

    folder = Path(model).expanduser()
    if folder.is_dir():
        return f"folder@{sha256_folder(folder)[:8]}"
    if "=" in model:
        architecture, file = model.split("=", 1)
        return f"{architecture}@{sha256_file(Path(file).expanduser())[:8]}"
    return model


def _open(picture: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture))
        elif isinstance(picture, (str, Path)):
            picture = Image.open(picture)
        return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"CLIP cannot read a picture: {error}") from error


def _numpy(features: Any) -> np.ndarray:
    found = features.float().cpu().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)
