"""One full decode of each image: what can be mended is, what cannot is refused with its reason."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MIN_SIDE_PX = 8
MAX_ASPECT = 32.0
MAX_IMAGE_PX = 100_000_000
"""Above it an image is taken for a decompression bomb: 100 MP decode to 300 MB."""

THUMBNAIL_PX = 16
_HASH_PX, _HASH_WAVES = 32, 8


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
    look: Look
    """To find pictures that are nearly the same."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture looks like in 776 bytes: a perceptual hash to find by, a thumbnail to compare with."""

    phash: int
    """64 bits: pHash, the signs of the slowest waves of the grey picture about their median."""
    thumbnail: bytes
    """RGB, uint8 [16, 16, 3]."""


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
        if 2 <= image.getexif().get(0x0112, 1) <= 8:  # other values are damaged, and turn nothing
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
    return CheckedImage(data, rgb.width, rgb.height, pixel_sha256(rgb), ", ".join(changes), look_of(rgb))


def pixel_sha256(image: Image.Image) -> str:
    """Hash of an RGB image's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}\0".encode() + image.tobytes()).hexdigest()


def look_of(image: Image.Image) -> Look:
    """Perceptual hash and thumbnail of an RGB image.

    pHash after Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010): the grey picture at
    32x32, its discrete cosine transform, the 8x8 slowest waves without the mean, each against their median.
    """
    import numpy as np
    from PIL import Image

    small = image.resize((_HASH_PX, _HASH_PX), Image.Resampling.BOX, reducing_gap=None)
    pixels = np.asarray(small, dtype=np.float32)
    waves = _cosines()
    spectrum = waves @ (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)) @ waves.T
    slow = spectrum.ravel()[1:]
    # Rounded, so that a flat picture's hash does not hang on the last bit of a sum.
    bits = np.round(slow - np.median(slow), 2) > 0
    phash = int.from_bytes(np.packbits(np.concatenate([bits, [False]])).tobytes(), "big")
    side = _HASH_PX // THUMBNAIL_PX
    thumbnail = pixels.reshape(THUMBNAIL_PX, side, THUMBNAIL_PX, side, 3).mean((1, 3)).round().astype(np.uint8)
    return Look(phash, thumbnail.tobytes())


@functools.cache
def _cosines() -> np.ndarray:
    """[8, 32]: the slowest rows of the orthonormal DCT-II."""
    import numpy as np

    k, x = np.arange(_HASH_WAVES)[:, None], np.arange(_HASH_PX)[None]
    waves = np.cos(np.pi * k * (2 * x + 1) / (2 * _HASH_PX)) * np.sqrt(2 / _HASH_PX)
    waves[0] /= np.sqrt(2)
    return waves.astype(np.float32)


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
