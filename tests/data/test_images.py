import io

import numpy as np
import pytest
from PIL import Image

from raycap.data import images
from raycap.data.images import BadImage, CheckedImage, check_image


def saved(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def photo(size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def pixels(checked):
    assert isinstance(checked, CheckedImage), checked
    image = Image.open(io.BytesIO(checked.data))
    assert image.mode == "RGB" and image.size == (checked.width, checked.height)
    return np.asarray(image)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_sound_image_is_kept_byte_for_byte(fmt):
    data = saved(photo(), fmt)
    checked = check_image(data)
    assert checked.data is data and not checked.changed and (checked.width, checked.height) == (40, 30)


def test_hash_is_of_the_pixels_and_the_size():
    image = photo()
    assert check_image(saved(image)).sha256 == check_image(saved(image, "BMP")).sha256
    turned = Image.frombytes("RGB", (30, 40), image.tobytes())
    assert check_image(saved(turned)).sha256 != check_image(saved(image)).sha256


def test_exif_orientation_is_applied():
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = pixels(check_image(saved(image, exif=exif)))
    assert np.array_equal(upright, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_modes_become_rgb(mode):
    source = photo().convert(mode)
    data = saved(source, "TIFF" if mode == "CMYK" else "PNG")
    assert pixels(check_image(data)).shape == (30, 40, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    assert np.array_equal(pixels(check_image(saved(Image.fromarray(values))))[..., 0], values >> 8)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.putpixel((3, 4), (0, 0, 255, 255))
    flat = pixels(check_image(saved(image)))
    assert tuple(flat[0, 0]) == (255, 255, 255) and tuple(flat[4, 3]) == (0, 0, 255)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    checked = check_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert tuple(pixels(checked)[0, 0]) == (255, 0, 0) and "first of 2 frames" in checked.changed


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_at_any_place(fmt, share):
    data = saved(photo((200, 150)), fmt)
    bad = check_image(data[: int(len(data) * share)])
    assert isinstance(bad, BadImage) and bad.reason == "image-damaged" and bad.error


def test_damaged_inside():
    data = bytearray(saved(photo((200, 150))))
    data[5000:5400] = b"\xff" * 400
    assert isinstance(check_image(bytes(data)), BadImage)


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg/>"])
def test_no_image_at_all(data):
    assert check_image(data).reason == "image-damaged"


@pytest.mark.parametrize("size", [(7, 100), (100, 1), (8, 300)])
def test_absurd_sizes(size):
    assert check_image(saved(photo(size))).reason == "image-size"


def test_decompression_bombs_are_not_decoded(monkeypatch):
    data = saved(Image.new("1", (20_000, 20_000)))  # 50 kB that say 400 million pixels
    bad = check_image(data)
    assert bad.reason == "image-size" and len(data) < 200_000
    monkeypatch.setattr(images, "MAX_IMAGE_PX", 1000)
    assert check_image(saved(photo())).reason == "image-size"


def test_float_pixels_are_refused():
    assert check_image(saved(Image.new("F", (20, 20)), "TIFF")).reason == "image-mode"
