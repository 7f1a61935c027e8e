"""Captions from a running server: batches, retries while it is full or restarting, its reasons in errors. No Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from raycap.errors import RunError

if TYPE_CHECKING:
    import requests

RETRIED = (500, 502, 503, 504)
"""A replica that dies answers 500 once; asking again is safe, because captioning changes nothing."""
MAX_WAIT_S = 30.0

Named = tuple[str, bytes]
"""(file name, encoded image)"""


class _TooLarge(RunError):
    """The server takes fewer images, or fewer bytes, a request."""


def caption_images(
    url: str,
    images: Iterable[Named],
    batch: int = 16,
    *,
    timeout_s: float = 300.0,
    retries: int = 8,
    in_flight: int = 2,
) -> list[str]:
    """Captions of `images`, in order, through `url`/v1/captions in requests of `batch` images (fewer where too large).

    `in_flight` requests run at once, so that the server decodes one while its model runs another.

    Raises:
        RunError: the server refused (its reason, the file's name), cannot be reached, or stays full over all retries.
    """
    captions: list[str] = []
    with ThreadPoolExecutor(max_workers=in_flight) as pool:
        waiting = []
        for part in _batches(images, batch):
            waiting.append(pool.submit(_caption_batch, url, part, timeout_s, retries))
            if len(waiting) >= in_flight:  # no more are read than are on their way
                captions += waiting.pop(0).result()
        for future in waiting:
            captions += future.result()
    return captions


def wait_healthy(url: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """The answer of `url`/healthz once it is 200; RunError with the last thing heard when that takes too long."""
    import requests

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = requests.get(f"{url}/healthz", timeout=5)
            if answer.status_code == 200:
                return answer.json()
            heard = f"status {answer.status_code}: {_reason(answer)}"
        except (requests.RequestException, ValueError) as error:
            heard = str(error)
        if time.monotonic() > deadline:
            raise RunError(f"{url} was not healthy within {timeout_s:g} s; last heard: {heard}")
        time.sleep(0.1)


def _caption_batch(url: str, images: Sequence[Named], timeout_s: float, retries: int) -> list[str]:
    files = [("images", (name, data, "application/octet-stream")) for name, data in images]
    try:
        reply = _post(f"{url}/v1/captions", files, timeout_s, retries)
    except _TooLarge:
        # Pictures differ in size, so a batch that is right for most is too large for some.
        if len(images) == 1:
            raise
        half = len(images) // 2
        return [c for part in (images[:half], images[half:]) for c in _caption_batch(url, part, timeout_s, retries)]
    rows = reply.get("captions", [])
    names = [row.get("filename") for row in rows]
    if len(rows) != len(images):
        raise RunError(f"{url}/v1/captions answered {len(rows)} captions for {len(images)} images ({names[:3]} ...)")
    return [row["caption"] for row in rows]


def _post(url: str, files: list[Any], timeout_s: float, retries: int) -> dict[str, Any]:
    import requests

    for attempt in range(retries + 1):
        last = attempt == retries
        try:
            answer = requests.post(url, files=files, timeout=(10, timeout_s))
        except (requests.ConnectionError, requests.Timeout) as error:
            if last:
                raise RunError(f"{url} cannot be reached after {retries + 1} attempts: {error}") from error
            time.sleep(_backoff_s(attempt))
            continue
        if answer.status_code == 200:
            try:
                return answer.json()
            except ValueError as error:
                raise RunError(f"{url} answered 200 with something that is not JSON: {answer.text[:200]!r}") from error
        if answer.status_code not in RETRIED or last:
            tries = f" after {attempt + 1} attempts" if attempt else ""
            kind = _TooLarge if answer.status_code == 413 else RunError
            raise kind(f"{url} answered {answer.status_code}{tries}: {_reason(answer)}")
        time.sleep(_wait_s(answer.headers.get("Retry-After"), attempt))
    raise AssertionError("unreachable")


def _wait_s(retry_after: str | None, attempt: int) -> float:
    """What the server asked for, or longer and longer waits; never above MAX_WAIT_S."""
    try:
        asked = float(retry_after or "")
    except ValueError:
        return _backoff_s(attempt)
    return min(MAX_WAIT_S, asked) if asked >= 0 else _backoff_s(attempt)


def _backoff_s(attempt: int) -> float:
    return min(MAX_WAIT_S, 0.2 * 2**attempt)


def _reason(answer: requests.Response) -> str:
    """The server's own message; the raw text of an answer that has none."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, json.JSONDecodeError):
        return answer.text[:300].strip() or "(no reason given)"


def _batches(images: Iterable[Named], size: int) -> Iterator[list[Named]]:
    part: list[Named] = []
    for image in images:
        part.append(image)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
