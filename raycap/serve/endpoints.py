"""The HTTP endpoints as a FastAPI app over any captioner: no Ray and no model here, so that tests call it directly."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raycap.config import Config
from raycap.errors import RaycapError
from raycap.serve.meter import Admission, Meter
from raycap.serve.requests import (
    Picture,
    Refusal,
    check_length,
    open_image,
    parse_chat,
    parse_multipart,
    parse_score_lines,
    read_body,
    require_images,
)

if TYPE_CHECKING:
    from PIL import Image

STEADY_IMAGES = 50
"""Below it CIDEr, whose document frequencies come from the scored set, is not stable; the answer says so."""
_log = logging.getLogger("raycap.serve")


class Captioning(Protocol):
    """What the endpoints need: a name, and captions for images."""

    name: str

    async def caption(self, images: list[Image.Image]) -> list[str]: ...


def build_app(service: Captioning, config: Config, meter: Meter) -> FastAPI:
    """The app: /v1/captions, /v1/chat/completions, /v1/score, /v1/models, /healthz, /metrics."""
    limits = config.serve
    admission = Admission(limits.max_queue)
    # Neither docs page: both would load their scripts from elsewhere. /openapi.json describes the endpoints.
    app = FastAPI(title="raycap", docs_url=None, redoc_url=None)

    async def answer(request: Request, endpoint: str, work: Callable[[bytes], Awaitable[dict[str, Any]]]) -> Response:
        begun = time.monotonic()
        status = 500
        try:
            with admission.place():
                meter.waiting.set(admission.held)
                check_length(request.headers.get("content-length"), limits.max_body_bytes)
                body = await read_body(request.stream(), limits.max_body_bytes)
                response = JSONResponse(await work(body))
        except Refusal as refusal:
            meter.error(refusal.code)
            response = _refused(refusal)
        except Exception as error:
            _log.exception("%s failed", endpoint)
            meter.error("internal")
            shown = error.message if isinstance(error, RaycapError) else f"{type(error).__name__}: {error}"
            response = _refused(Refusal(500, f"the server failed: {shown}", code="internal"))
        finally:
            meter.waiting.set(admission.held)
        status = response.status_code
        meter.request(endpoint, status, time.monotonic() - begun)
        return response

    async def caption(pictures: list[Picture]) -> list[str]:
        # Opened one after another in one thread: a request cannot take all cores from the model.
        opened = await asyncio.to_thread(lambda: [open_image(p.data, limits.max_image_px) for p in pictures])
        return await service.caption(require_images(pictures, opened))

    @app.post("/v1/captions", openapi_extra=_body("multipart/form-data", _CAPTIONS))
    async def captions(request: Request) -> Response:
        """One caption for each of the `images` files, in their order."""

        async def work(body: bytes) -> dict[str, Any]:
            pictures = await parse_multipart(request.headers.get("content-type"), body, limits.max_images)
            texts = await caption(pictures)
            rows = [{"filename": p.name, "caption": text} for p, text in zip(pictures, texts, strict=True)]
            return {"captions": rows, "model": service.name}

        return await answer(request, "/v1/captions", work)

    @app.post("/v1/chat/completions", openapi_extra=_body("application/json", _CHAT))
    async def chat(request: Request) -> Response:
        """OpenAI's chat shape: one image as a data: URL, answered with its caption."""

        async def work(body: bytes) -> dict[str, Any]:
            (text,) = await caption([await asyncio.to_thread(parse_chat, body, service.name)])
            return {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": service.name,
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"},
                ],
            }

        return await answer(request, "/v1/chat/completions", work)

    @app.post("/v1/score", openapi_extra=_body("application/x-ndjson", _SCORE))
    async def score(request: Request) -> Response:
        """JSONL of images with references -> captions and metrics over these images alone."""

        async def work(body: bytes) -> dict[str, Any]:
            items = await asyncio.to_thread(parse_score_lines, body, limits.max_images)
            texts = await caption([item.picture for item in items])
            predictions = {item.image_id: text for item, text in zip(items, texts, strict=True)}
            references = {item.image_id: item.references for item in items}
            metrics = await asyncio.to_thread(_metrics, predictions, references, config)
            rows = [{"image_id": image_id, "caption": text} for image_id, text in predictions.items()]
            reply = {"captions": rows, "metrics": metrics, "images": len(items), "model": service.name}
            if len(items) < STEADY_IMAGES:
                reply["warning"] = (
                    f"{len(items)} images: CIDEr's document frequencies come from the scored set, "
                    f"so below {STEADY_IMAGES} its scale is not stable, and scores of parts must not be averaged"
                )
            return reply

        return await answer(request, "/v1/score", work)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "raycap"}]}

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "model": service.name, "requests_in_progress": admission.held}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return _refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code="http"))

    return app


def _refused(refusal: Refusal) -> Response:
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else None
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)


def _metrics(predictions: dict[str, str], references: dict[str, list[str]], config: Config) -> dict[str, dict]:
    from raycap.evaluate import score

    scores = score(predictions, references, config.evaluate.metrics, config.evaluate.lang)
    return {name: {"score": float(s.score), "signature": s.signature} for name, s in scores.items()}


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


_CAPTIONS = {
    "type": "object",
    "required": ["images"],
    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}
_CHAT = {
    "type": "object",
    "required": ["messages"],
    "properties": {"model": {"type": "string"}, "messages": {"type": "array", "items": {"type": "object"}}},
}
_SCORE = {
    "type": "object",
    "description": "one object a line",
    "required": ["image", "references"],
    "properties": {
        "image_id": {"type": "string"},
        "image": {"type": "string", "description": "base64, or a data: URL"},
        "references": {"type": "array", "items": {"type": "string"}},
    },
}
