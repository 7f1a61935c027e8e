"""Images as the shards store them when they are resized at once: lossless PNG, JPEG at a stated quality, or plain pixels.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

STORES = ("original", "resized", "pixels")


def encode_stored(
    data: bytes, resize: Callable[[Any], np.ndarray], store: str, quality: int
) -> tuple[bytes, dict[str, Any]]:
    """An image file, resized and written as `store` says, and what changed with it: width, height, sha256 of the pixels.

    `resized` is a PNG (quality 0, lossless) or a JPEG of that quality; `pixels` is a PPM file: a header of a line, then
    the bytes as they are, which every reader of images takes and no one has to decode.
    """
    from PIL import Image

    from raycap.data.images import pixel_sha256

    with Image.open(io.BytesIO(data)) as image:
        array = np.ascontiguousarray(np.asarray(resize(image.convert("RGB"))).transpose(1, 2, 0))
    if store == "pixels":
        stored = to_ppm(array)
    else:
        buffer = io.BytesIO()
        picture = Image.fromarray(array)
        if quality:
            picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
        else:
            picture.save(buffer, format="PNG", compress_level=3)
        stored = buffer.getvalue()
    with Image.open(io.BytesIO(stored)) as back:
        facts = {"width": back.width, "height": back.height, "sha256": pixel_sha256(back.convert("RGB"))}
    return stored, facts


def decode_stored(data: bytes) -> np.ndarray:
    """uint8 [C, H, W] of an image that `encode_stored` wrote; a view that is not contiguous."""
    if data.startswith(b"P6\n"):
        end = data.index(b"\n255\n")
        width, height = (int(n) for n in data[3:end].split())
        array = np.frombuffer(data, dtype=np.uint8, offset=end + 5).reshape(height, width, 3)
    else:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            array = np.asarray(image.convert("RGB"))
    return array.transpose(2, 0, 1)


def to_ppm(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a binary PPM file (netpbm's P6)."""
    height, width, _ = array.shape
    return b"P6\n%d %d\n255\n" % (width, height) + array.tobytes()


def sizes_on_disk(images: list[bytes], total_bytes: int, rows: int, resize: Any, quality: int) -> dict[str, int]:
    """Bytes that `rows` images of `total_bytes` take under each `data.store`; `resized` is told from a sample of them."""
    sizes = {"original": total_bytes}
    if resize is not None and images:
        sample = [len(encode_stored(data, resize, "resized", quality)[0]) for data in images]
        channels, height, width = resize.describe()["shape"]
        sizes["resized"] = round(sum(sample) / len(sample) * rows)
        sizes["pixels"] = rows * channels * height * width
    return sizes
