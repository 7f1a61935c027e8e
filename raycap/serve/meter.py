"""Counts and times of one replica, in Prometheus' text format, and the queue's limit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from raycap.serve.requests import Refusal

MAX_RETRY_AFTER_S = 30
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Meter:
    """Requests by endpoint and status, images, batches, and seconds a request takes."""

    def __init__(self, **labels: str):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        # A registry of its own: the process-wide one belongs to Ray.
        self.registry = CollectorRegistry()
        names, self._labels = list(labels), labels
        new = {"registry": self.registry}
        self._requests = Counter("raycap_requests_total", "Requests answered", [*names, "endpoint", "status"], **new)
        self._images = Counter("raycap_images_total", "Images captioned", names, **new).labels(**labels)
        self._errors = Counter("raycap_errors_total", "Requests refused or failed", [*names, "code"], **new)
        self._batches = Counter("raycap_batches_total", "Batches the model ran", names, **new).labels(**labels)
        self._latency = Histogram(
            "raycap_request_seconds", "Seconds from a request's arrival to its answer", [*names, "endpoint"],
            buckets=_BUCKETS_S, **new,
        )  # fmt: skip
        self.waiting = Gauge("raycap_requests_in_progress", "Requests held now", names, **new).labels(**labels)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(**self._labels, endpoint=endpoint, status=str(status)).inc()
        self._latency.labels(**self._labels, endpoint=endpoint).observe(seconds)

    def error(self, code: str) -> None:
        self._errors.labels(**self._labels, code=code).inc()

    def batch(self, images: int) -> None:
        self._batches.inc()
        self._images.inc(images)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Admission:
    """Lets `limit` requests in at once and turns the next away with 503 and a time after which a place is likely."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._seconds = 1.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request, taken before its body is read, so that the limit bounds memory too."""
        if self.held >= self.limit:
            raise Refusal(
                503, f"{self.held} requests are held, which is the limit. Try again in {self.retry_after_s} s.",
                code="queue_full", retry_after_s=self.retry_after_s,
            )  # fmt: skip
        self.held += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self.held -= 1
            self._seconds += 0.2 * (time.monotonic() - begun - self._seconds)

    @property
    def retry_after_s(self) -> int:
        """Seconds that requests took lately: by then one of those held now should be done."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._seconds)))
