"""Pictures good and bad, and the endpoints over a captioner whose answers are known."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from raycap.config import from_dict


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(red: int, size=(64, 64), kind: str = "PNG") -> bytes:
    return encode(Image.new("RGB", size, (red, 20, 30)), kind)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def config():
    return from_dict(
        {
            "run": {"name": "t"},
            "serve": {"max_body_bytes": 200_000, "max_image_px": 1_000_000, "max_images": 4, "max_queue": 2},
        }
    )


class RedReader:
    """Says how red each picture's corner is, so that a test sees which picture an answer belongs to."""

    name = "t-red"

    def __init__(self):
        self.wait = None

    async def caption(self, images):
        if self.wait is not None:
            await self.wait()
        if any(image.getpixel((0, 0))[0] == 13 for image in images):
            raise ZeroDivisionError("thirteen")
        return [f"red {image.getpixel((0, 0))[0]}" for image in images]


@pytest.fixture
def service():
    return RedReader()


@pytest.fixture
def app(service, config):
    from raycap.serve.endpoints import build_app
    from raycap.serve.meter import Meter

    return build_app(service, config, Meter(model=service.name, replica="r0"))


@pytest.fixture
def client(app):
    from starlette.testclient import TestClient

    with TestClient(app, raise_server_exceptions=False) as http:
        yield http
