"""Limits and parsing, without a server."""

from __future__ import annotations

import asyncio
import base64
import json
import random

import pytest
from PIL import Image

from raycap.serve.requests import (
    Picture,
    Refusal,
    check_length,
    decode_data_url,
    open_image,
    parse_chat,
    parse_multipart,
    parse_score_lines,
    read_body,
    require_images,
)
from tests.serve.conftest import bomb, encode, picture


def refused(call, *arguments) -> Refusal:
    with pytest.raises(Refusal) as caught:
        result = call(*arguments)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    return caught.value


def chunks(*parts: bytes):
    async def stream():
        for part in parts:
            yield part

    return stream()


def form(*files: tuple[str, str, bytes]) -> tuple[str, bytes]:
    body = b"".join(
        f'--B\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for field, name, data in files
    )
    return "multipart/form-data; boundary=B", body + b"--B--\r\n"


def chat(*urls, **more) -> bytes:
    parts = [{"type": "text", "text": "what?"}, *({"type": "image_url", "image_url": {"url": u}} for u in urls)]
    return json.dumps({"messages": [{"role": "user", "content": parts}], **more}).encode()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_body_is_limited_by_header_and_by_count():
    check_length("10", 10)
    check_length(None, 10)
    assert refused(check_length, "11", 10).status == 413
    assert refused(check_length, "-1", 10).status == 400
    assert asyncio.run(read_body(chunks(b"12345", b"67890"), 10)) == b"1234567890"
    assert refused(read_body, chunks(b"12345", b"67890", b"1"), 10).status == 413


def test_multipart_keeps_order_and_names():
    pictures = asyncio.run(parse_multipart(*form(("images", "b.png", b"1"), ("images", "a.png", b"2")), 4))
    assert pictures == [Picture("b.png", b"1"), Picture("a.png", b"2")]


@pytest.mark.parametrize(
    ("content_type", "body", "status", "says"),
    [
        ("application/json", b"{}", 415, "application/json"),
        (None, b"x", 415, "missing"),
        ("multipart/form-data; boundary=B", b"", 400, "empty"),
        ("multipart/form-data", b"x", 400, "cannot be read"),
        ("multipart/form-data; boundary=B", b"--B--\r\n", 400, "no images"),
        ("multipart/form-data; boundary=B", b"\x00garbage", 400, "multipart"),
        (*form(("pictures", "a.png", b"1")), 422, "'pictures'"),
        (*form(*[("images", f"{i}.png", b"1") for i in range(5)]), 413, "at most 4"),
        (*form(*[("images", f"{i}.png", b"1") for i in range(50)]), 413, "at most 4"),
    ],
)
def test_bad_multipart_says_why(content_type, body, status, says):
    refusal = refused(parse_multipart, content_type, body, 4)
    assert (refusal.status, says in refusal.message) == (status, True), refusal.message


def test_unknown_form_field_is_refused():
    body = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhello\r\n--B--\r\n'
    assert "'prompt'" in refused(parse_multipart, "multipart/form-data; boundary=B", body, 4).message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (picture(1)[:-40], "truncated"),
        (picture(1)[:20], "read"),
        (bomb(1500, 1000), "at most 1,000,000"),
        (bomb(60_000, 60_000), "pixels"),
        (picture(1, size=(4, 4)), "4x4"),
    ],
)
def test_bad_image_says_why(data, says):
    reason = open_image(data, 1_000_000)
    assert isinstance(reason, str)
    assert says in reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(kind):
    image = open_image(picture(200, kind=kind), 1_000_000)
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif), 1_000_000)
    assert image.size == (20, 40)


def test_every_bad_image_is_named():
    pictures = [Picture("a.png", b""), Picture("b.png", b"x"), Picture("c.png", b"y")]
    refusal = refused(require_images, pictures, ["empty", Image.new("RGB", (8, 8)), "damaged"])
    assert refusal.status == 422
    assert refusal.items == [{"filename": "a.png", "reason": "empty"}, {"filename": "c.png", "reason": "damaged"}]
    assert "2 of 3" in refusal.message and "c.png: damaged" in refusal.message


def test_chat_image():
    assert parse_chat(chat(data_url(b"abc"), model="m", n=1), "m").data == b"abc"
    text = {"role": "system", "content": "You caption."}
    body = json.dumps({"messages": [text, *json.loads(chat(data_url(b"abc")))["messages"]]}).encode()
    assert parse_chat(body, "m") == Picture("messages[1].content[1].image_url", b"abc")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "list"),
        (b"{}", 400, "messages"),
        (b'{"messages": [3]}', 400, "messages[0]"),
        (b'{"messages": [{"content": 3}]}', 400, "content"),
        (b'{"messages": [{"content": [3]}]}', 400, "content[0]"),
        (b'{"messages": [{"content": [{"type": "input_audio"}]}]}', 400, "input_audio"),
        (b'{"messages": [{"content": [{"type": "image_url"}]}]}', 400, "NoneType"),
        (chat(), 400, "0 images"),
        (chat(data_url(b"a"), data_url(b"b")), 400, "2 images"),
        (chat("http://169.254.169.254/latest/meta-data"), 400, "'http'"),
        (chat("HTTPS://example.com/a.png"), 400, "'HTTPS'"),
        (chat("file:///etc/passwd"), 400, "'file'"),
        (chat("data:image/png,abc"), 400, ";base64,"),
        (chat("data:image/png;base64,%%%"), 400, "not base64"),
        (chat(data_url(b"a"), stream=True), 400, "stream"),
        (chat(data_url(b"a"), n=2), 400, "n=2"),
        (chat(data_url(b"a"), tools=[{}]), 400, "tools"),
        (chat(data_url(b"a"), model="gpt"), 404, "'gpt'"),
    ],
)
def test_bad_chat_says_why(body, status, says):
    refusal = refused(parse_chat, body, "m")
    assert (refusal.status, says in refusal.message) == (status, True), refusal.message


def test_data_url_with_parameters_and_line_breaks():
    assert decode_data_url("data:image/png;charset=utf-8;base64,YW\nJj") == b"abc"


def line(**row) -> str:
    return json.dumps({"image": base64.b64encode(b"abc").decode(), "references": ["a cat"], **row}, ensure_ascii=False)


def test_score_lines():
    body = "\n".join([line(image_id="x"), "", line(image=data_url(b"abc")), line(references=["a\u2028b"])]).encode()
    items = parse_score_lines(body, 4)
    assert [i.image_id for i in items] == ["x", "line-3", "line-4"]
    assert [i.picture.data for i in items] == [b"abc"] * 3
    assert items[2].references == ["a\u2028b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no images"),
        ("{", "line 1 is not JSON"),
        (line() + "\n[]", "line 2 is a JSON list"),
        (line(image=None), "`image` is NoneType"),
        (line(image="http://x/a.png"), "'http'"),
        (line(image="***"), "not base64"),
        (line(references=[]), "`references`"),
        (line(references="a cat"), "`references`"),
        (line(references=[""]), "each reference"),
        (line(references=["a", 3]), "each reference"),
        (line(image_id=[1]), "`image_id`"),
        (line(image_id="x") + "\n" + line(image_id="x"), "line 2: image_id 'x' is that of line 1"),
        (line(reference=["a"]), "unknown key 'reference'"),
        ("\n".join([line()] * 5), "at most 4"),
    ],
)
def test_bad_score_line_says_which(text, says):
    assert says in refused(parse_score_lines, text.encode(), 4).message


def test_score_body_that_is_not_utf8():
    assert "UTF-8" in refused(parse_score_lines, b"\xff\xfe", 4).message


def test_damaged_bytes_never_raise():
    """Flipped bytes of each format end in a picture or a reason, never in another exception."""
    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        good = picture(90, kind=kind)
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(rng.randint(1, 8)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            assert open_image(bytes(bad[: rng.randint(1, len(bad))]), 1_000_000) is not None


def test_real_pictures_open(shared_data):
    files = sorted(f for f in shared_data.rglob("images/*") if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif"))
    assert files
    for file in files:
        image = open_image(file.read_bytes(), 50_000_000)
        assert not isinstance(image, str), f"{file.name}: {image}"
        assert image.mode == "RGB"
