"""What decoding settings become for one batch: tokens that no caption may hold, and draws that belong to an image.

Shapes: B rows, V vocabulary.

A draw by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the largest of logits plus Gumbel noise is a sample of
their softmax. The noise is a hash of (seed, the image's resized pixels, position, token), so that an image's caption does
not depend on the batch it is in, its order, or how often a generator was asked before.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raycap.config import DecodeSettings
from raycap.errors import ConfigError
from raycap.models.dropout import mix

_LOW, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDecode(DecodeSettings):
    """Decoding settings of one batch of one model."""

    image_keys: tuple[int, ...] = ()
    """64 bits for each row; empty where nothing is drawn by them."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()


def for_batch(
    decode: DecodeSettings, processor: Any, pixels: np.ndarray | Callable[[], np.ndarray], *, times: int = 1
) -> DecodeSettings:
    """`decode` for the uint8 images `pixels` [n, C, H, W] (or what gives them), `times` over; unchanged where it needs neither.

    Raises:
        ConfigError: a word of `bad_words` that the tokeniser cannot write.
    """
    draws = decode.do_sample and decode.num_beams == 1
    if not draws and not decode.bad_words:
        return decode
    keys: tuple[int, ...] = ()
    if draws:
        keys = image_keys(pixels() if callable(pixels) else pixels) * times
    ids = bad_token_ids(processor.tokenizer, decode.bad_words)
    own = {f.name: getattr(decode, f.name) for f in dataclasses.fields(DecodeSettings)}
    return BatchDecode(**own, image_keys=keys, bad_token_ids=ids)


def image_keys(pixels: np.ndarray) -> tuple[int, ...]:
    """A 64-bit hash of each of uint8 images [n, C, H, W]."""
    made = (hashlib.blake2b(np.ascontiguousarray(p).tobytes(), digest_size=8).digest() for p in pixels)
    return tuple(int.from_bytes(digest, "little") for digest in made)


def bad_token_ids(tokenizer: Any, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The ways in which a tokeniser writes `words`: at the start of a text, inside one, in lower case and with a capital."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        written = dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:]))
        ways = []
        for text in [form for way in written for form in (way, f" {way}")]:
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and getattr(tokenizer, "unk_token_id", None) not in ids:
                ways.append(ids)
        if not ways:
            raise ConfigError(f"decode.bad_words: the model's tokeniser cannot write {word!r}: remove it")
        found.update(dict.fromkeys(ways))
    return tuple(found)


def batch_options(decode: DecodeSettings) -> dict[str, Any]:
    """Keywords of transformers' generate for draws and bad words."""
    options: dict[str, Any] = {}
    if decode.bad_words:
        if not isinstance(decode, BatchDecode):
            raise ConfigError("decode.bad_words needs the model's tokeniser: pass the settings through `for_batch`")
        options["bad_words_ids"] = [list(ids) for ids in decode.bad_token_ids]
    if not decode.do_sample:
        return options
    if decode.num_beams > 1:  # transformers draws among beams itself, from torch's generator
        return options | {
            "do_sample": True, "temperature": decode.temperature, "top_k": decode.top_k, "top_p": decode.top_p,
        }  # fmt: skip
    if not isinstance(decode, BatchDecode):
        raise ConfigError("decode.do_sample needs the images' pixels: pass the settings through `for_batch`")
    return options | {"logits_processor": _drawing(decode)}


def _drawing(decode: BatchDecode) -> Any:
    """Temperature, top k, top p as transformers' sampling has them, then the noise; greedy search takes the largest."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Any] = []
    if decode.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(decode.temperature))
    if decode.top_k:
        steps.append(TopKLogitsWarper(decode.top_k))
    if decode.top_p < 1.0:
        steps.append(TopPLogitsWarper(decode.top_p))
    return LogitsProcessorList([*steps, KeyedGumbel(decode.seed, decode.image_keys)])


class KeyedGumbel:
    """Adds Gumbel noise to scores [B, V], one call a position; rows are those of `image_keys`."""

    def __init__(self, seed: int, image_keys: tuple[int, ...]):
        parts = torch.tensor([[k & _LOW, k >> 32] for k in image_keys], dtype=torch.int64)
        seeded = mix(mix(torch.tensor(seed & _LOW) ^ _GOLDEN) ^ (seed >> 32 & _LOW))
        self._rows = mix(mix(parts[:, 0] ^ seeded) ^ parts[:, 1])
        self._position = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = mix(self._rows ^ mix(torch.tensor(self._position + _GOLDEN & _LOW))).to(scores.device)
        self._position += 1
        tokens = mix((torch.arange(scores.shape[1], device=scores.device) * _GOLDEN + 1) & _LOW)
        hashes = mix(mix(rows[:, None] ^ tokens) ^ rows[:, None])
        uniform = (hashes.double() + 0.5) / 2**32
        return scores + -torch.log(-torch.log(uniform)).to(scores.dtype)
