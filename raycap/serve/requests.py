"""What a request may be: limits, multipart, data URLs, OpenAI's shape, JSONL. Bytes in, checked values out."""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""File formats that are decoded. PIL knows more, and some of them (EPS) start other programs."""
MAX_REFERENCES = 64
MAX_TEXT_CHARS = 10_000


class Refusal(Exception):
    """A request that is answered with a 4xx or 503, its reason, and the items that are to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        items: Sequence[Mapping[str, str]] = (),
        retry_after_s: int = 0,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.items = list(items)
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error shape, which its clients can show; `items` names each thing that is wrong."""
        error: dict[str, Any] = {"message": self.message, "type": "invalid_request_error", "code": self.code}
        if self.status >= 500:
            error["type"] = "server_error"
        if self.items:
            error["items"] = self.items
        return {"error": error}


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of a request as it came."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One line of /v1/score."""

    image_id: str
    picture: Picture
    references: list[str]


def check_length(header: str | None, limit: int) -> None:
    """Refuse a body by its Content-Length before a byte of it is read."""
    if header is None:
        return
    if not header.isascii() or not header.isdigit():
        raise Refusal(400, f"Content-Length {header!r} is not a number of bytes")
    if int(header) > limit:
        raise _too_large(f"the body has {int(header):,} bytes", limit)


async def read_body(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """The whole body; a chunked one has no Content-Length, so what arrives is counted too."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise _too_large("the body has more bytes than it may", limit)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(what: str, limit: int) -> Refusal:
    message = f"{what}; at most {limit:,} bytes are taken. Send fewer images a request."
    return Refusal(413, message, code="body_too_large")


async def parse_multipart(content_type: str | None, body: bytes, max_images: int) -> list[Picture]:
    """The `images` files of a multipart form, in order. Any other field is refused: it would have no effect."""
    from starlette.datastructures import Headers, UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    if (content_type or "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(
            415, f"Content-Type is {content_type or 'missing'!s}, expected multipart/form-data with `images` files",
            code="unsupported_media_type",
        )  # fmt: skip
    if not body:
        raise Refusal(400, "the body is empty, expected multipart/form-data with `images` files")

    async def stream():
        yield body

    # One more than allowed is let through, so that the refusal is ours and says how many are allowed.
    parser = MultiPartParser(Headers({"content-type": content_type}), stream(), max_files=max_images + 1, max_fields=16)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many(f"over {max_images}", max_images) from error
        raise Refusal(400, f"the multipart form cannot be read: {error.message}") from error
    except (KeyError, UnicodeDecodeError, ValueError, AssertionError) as error:
        raise Refusal(400, f"the multipart form cannot be read: {type(error).__name__} {error}") from error
    try:
        pictures = []
        for field, value in form.multi_items():
            if field != "images" or not isinstance(value, UploadFile):
                what = f"file field '{field}'" if isinstance(value, UploadFile) else f"form field '{field}'"
                raise Refusal(422, f"unknown {what}: send the pictures as files named 'images'", code="unknown_field")
            pictures.append(Picture(value.filename or f"image-{len(pictures)}", await value.read()))
    finally:
        await form.close()
    return check_count(pictures, max_images)


def check_count(pictures: list[Any], max_images: int) -> list[Any]:
    """`pictures` again, unless there are none or too many."""
    if not pictures:
        raise Refusal(400, "the request has no images: send at least one")
    if len(pictures) > max_images:
        raise _too_many(str(len(pictures)), max_images)
    return pictures


def _too_many(count: str, limit: int) -> Refusal:
    return Refusal(413, f"{count} images in one request, at most {limit} are taken", code="too_many_images")


def open_image(data: bytes, max_px: int) -> Image.Image | str:
    """The picture as `prepare` would have cleaned it (upright RGB), or the reason why it cannot be used.

    The size is read from the header and checked before any pixel is decoded.
    """
    from PIL import Image

    from raycap.data.images import BadImage, check_image

    if not data:
        return "the file is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_px is the limit here
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                width, height = header.size
    except Image.UnidentifiedImageError:
        return f"not an image of a format that is read ({', '.join(FORMATS)})"
    except Image.DecompressionBombError as error:
        return str(error)
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error and more for damaged bytes.
        return f"the image cannot be read: {type(error).__name__}: {error}"
    if width * height > max_px:
        return f"{width}x{height} pixels, at most {max_px:,} are decoded"
    checked = check_image(data)
    if isinstance(checked, BadImage):
        return checked.error
    with Image.open(io.BytesIO(checked.data)) as image:
        return image.convert("RGB")


def require_images(pictures: Sequence[Picture], opened: Sequence[Image.Image | str]) -> list[Image.Image]:
    """The opened images, or a 422 that names every file that is none and says why; nothing is left out silently."""
    bad = [{"filename": p.name, "reason": o} for p, o in zip(pictures, opened, strict=True) if isinstance(o, str)]
    if bad:
        named = "; ".join(f"{b['filename']}: {b['reason']}" for b in bad[:3]) + ("; ..." if len(bad) > 3 else "")
        raise Refusal(422, f"{len(bad)} of {len(pictures)} images cannot be used: {named}", code="bad_image", items=bad)
    return [image for image in opened if not isinstance(image, str)]


def parse_json(body: bytes) -> Any:
    if not body:
        raise Refusal(400, "the body is empty, expected JSON")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error


def decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{name} is not base64: {error}", code="invalid_base64") from error


def decode_data_url(url: Any, name: str = "image_url") -> bytes:
    """Bytes of `data:<type>;base64,<data>`. Any other URL is refused: this server fetches nothing."""
    if not isinstance(url, str):
        raise Refusal(400, f"{name} is {type(url).__name__}, expected a data: URL")
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise Refusal(
            400,
            f"{name} is a '{scheme[:20]}' URL: nothing is fetched, send data:image/jpeg;base64,...",
            code="url_not_allowed",
        )
    kind, comma, payload = rest.partition(",")
    if not comma or not kind.lower().replace(" ", "").endswith(";base64"):
        raise Refusal(400, f"{name} is a data: URL without ';base64,'", code="invalid_data_url")
    return decode_base64(payload, name)


def parse_chat(body: bytes, model_name: str) -> Picture:
    """The one image of a chat request in OpenAI's shape.

    Text beside it is taken and has no effect: the model captions under the prompt it was trained with. What would ask
    for another kind of answer (`stream`, `n` above 1, tools) is refused.
    """
    request = parse_json(body)
    if not isinstance(request, dict):
        raise Refusal(400, f"the body is a JSON {type(request).__name__}, expected an object with `messages`")
    if request.get("model") not in (None, model_name):
        raise Refusal(404, f"no model {request['model']!r} here; this is {model_name!r}", code="model_not_found")
    if request.get("stream"):
        raise Refusal(400, "stream is not supported: a caption comes in one piece", code="unsupported_parameter")
    if request.get("n") not in (None, 1):
        raise Refusal(400, f"n={request['n']!r} is not supported: one caption is given", code="unsupported_parameter")
    if request.get("tools"):
        raise Refusal(400, "tools are not supported by a captioner", code="unsupported_parameter")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "`messages` is missing or empty")
    urls = [url for i, message in enumerate(messages) for url in _image_urls(message, f"messages[{i}]")]
    if len(urls) != 1:
        raise Refusal(400, f"{len(urls)} images in the messages, expected one; several go to /v1/captions")
    where, url = urls[0]
    return Picture(where, decode_data_url(url, where))


def _image_urls(message: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} is {type(message).__name__}, expected an object with `role` and `content`")
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return []
    if not isinstance(content, list):
        raise Refusal(400, f"{where}.content is {type(content).__name__}, expected text or a list of parts")
    urls = []
    for i, part in enumerate(content):
        place = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            value = part.get("image_url")
            urls.append((f"{place}.image_url", value.get("url") if isinstance(value, dict) else value))
        elif kind != "text":
            raise Refusal(400, f"{place} is of type {kind!r}, expected 'text' or 'image_url'")
    return urls


def parse_score_lines(body: bytes, max_images: int) -> list[ScoreItem]:
    """JSONL of `{"image_id"?, "image": base64 or data URL, "references": [...]}`; errors name the line."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error}") from error
    # Not splitlines(): that would cut JSON strings at U+2028.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    check_count(lines, max_images)
    items = [_score_item(n, line) for n, line in lines]
    seen: dict[str, int] = {}
    for (n, _), item in zip(lines, items, strict=True):
        if item.image_id in seen:
            raise Refusal(400, f"line {n}: image_id '{item.image_id}' is that of line {seen[item.image_id]}")
        seen[item.image_id] = n
    return items


def _score_item(number: int, line: str) -> ScoreItem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"line {number} is not JSON: {error}", code="invalid_json") from error
    if not isinstance(row, dict):
        raise Refusal(400, f"line {number} is a JSON {type(row).__name__}, expected an object")
    if unknown := sorted(set(row) - {"image_id", "image", "references"}):
        raise Refusal(400, f"line {number}: unknown key '{unknown[0]}'; expected image_id, image, references")
    image, references = row.get("image"), row.get("references")
    if not isinstance(image, str):
        raise Refusal(400, f"line {number}: `image` is {type(image).__name__}, expected base64 or a data: URL")
    if not isinstance(references, list) or not references or len(references) > MAX_REFERENCES:
        raise Refusal(400, f"line {number}: `references` must be a list of 1 to {MAX_REFERENCES} captions")
    for reference in references:
        if not isinstance(reference, str) or not reference.strip() or len(reference) > MAX_TEXT_CHARS:
            raise Refusal(400, f"line {number}: each reference is a text of 1 to {MAX_TEXT_CHARS} characters")
    image_id = row.get("image_id")
    if image_id is not None and (not isinstance(image_id, (str, int)) or isinstance(image_id, bool)):
        raise Refusal(400, f"line {number}: `image_id` is {type(image_id).__name__}, expected text")
    name = f"line-{number}" if image_id is None else str(image_id)
    where = f"line {number}: image"
    # Base64 has no colon, so whatever has one is a URL, and decode_data_url says which are taken.
    data = decode_data_url(image, where) if ":" in image else decode_base64(image, where)
    return ScoreItem(name, Picture(name, data), list(references))
