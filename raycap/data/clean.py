"""Cleaning rules: pure functions on a caption's text, and one full decode of each image."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE_PX = 8
MAX_ASPECT = 32.0
MAX_IMAGE_PX = 100_000_000
"""Above it an image is taken for a decompression bomb: 100 MP decode to 300 MB."""

# What Python's str.splitlines ends a line at. PTBTokenizer, among others, keeps only `\n` apart and then shifts lines.
_LINE_BREAKS = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_SPACES = re.compile(r"\s+")


def compose(text: str) -> str:
    """Unicode NFC: one code for each composed letter."""
    return unicodedata.normalize("NFC", text)


def unbreak_lines(text: str) -> str:
    """Every Unicode line break becomes a space."""
    return _LINE_BREAKS.sub(" ", text)


def drop_controls(text: str) -> str:
    """Control characters and byte-order marks become a space."""
    return _CONTROLS.sub(" ", text)


def collapse_spaces(text: str) -> str:
    """Runs of white space become one space; none is left at the ends."""
    return _SPACES.sub(" ", text).strip()


RULES: tuple[Callable[[str], str], ...] = (compose, unbreak_lines, drop_controls, collapse_spaces)
"""Applied in this order; their names go into the manifest."""


def clean_caption(text: str) -> str:
    """The caption by all rules; empty when nothing is left. Applying it twice changes nothing more."""
    for rule in RULES:
        text = rule(text)
    return text


def caption_key(text: str) -> str:
    """The caption with case and closing punctuation taken away, to tell whether two captions say the same."""
    return clean_caption(text).casefold().rstrip(" .!。")


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that decodes in full, upright and in RGB."""

    data: bytes
    """The file as it came, or a lossless PNG where orientation, mode or frames had to be changed."""
    width: int
    height: int
    sha256: str
    """Of size and RGB pixels, so that two files of the same picture are seen to be equal."""
    changed: str
    """What was changed, empty when the file was kept."""


@dataclass(frozen=True, slots=True)
class BadImage:
    reason: str
    error: str


def check_image(data: bytes) -> CheckedImage | BadImage:
    """Decode `data` in full; return it fit for a shard, or say why it cannot be used."""
    from PIL import Image, ImageOps

    if not data:
        return BadImage("image-damaged", "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image = Image.open(io.BytesIO(data))
        width, height = image.size
        if size_error := _size_error(width, height):
            return BadImage("image-size", size_error)
        # MPO is a camera's JPEG with a preview behind the picture, not an animation.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        changes = [f"first of {frames} frames"] if frames > 1 else []
        upright = ImageOps.exif_transpose(image)
        if image.getexif().get(0x0112, 1) != 1:
            changes.append("turned upright")
        rgb = _to_rgb(upright)
        if isinstance(rgb, BadImage):
            return rgb
        if upright.mode != "RGB" or "transparency" in image.info:
            changes.append(f"{upright.mode} to RGB")
    except Image.DecompressionBombError as error:
        return BadImage("image-size", str(error))
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more for damaged bytes.
        return BadImage("image-damaged", f"{type(error).__name__}: {error}")
    if changes:
        buffer = io.BytesIO()
        rgb.save(buffer, format="PNG")
        data = buffer.getvalue()
    return CheckedImage(data, rgb.width, rgb.height, pixel_sha256(rgb), ", ".join(changes))


def pixel_sha256(image: Image.Image) -> str:
    """Hash of an RGB image's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}\0".encode() + image.tobytes()).hexdigest()


def _size_error(width: int, height: int) -> str:
    if min(width, height) < MIN_SIDE_PX:
        return f"{width}x{height} pixels, the shorter side must have at least {MIN_SIDE_PX}"
    if width * height > MAX_IMAGE_PX:
        return f"{width}x{height} pixels, at most {MAX_IMAGE_PX:,} are decoded"
    if max(width, height) / min(width, height) > MAX_ASPECT:
        return f"{width}x{height} pixels, one side is over {MAX_ASPECT:g} times the other"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image | BadImage:
    """RGB of any mode: 16 bits scaled to 8 (PIL would clip them), transparency laid on white."""
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        return BadImage("image-mode", "its pixels are floating-point numbers, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            return BadImage("image-mode", f"its pixels reach from {values.min()} to {values.max()}, expected 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
