"""The client against a plain HTTP server that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raycap.errors import RunError
from raycap.serve.client import caption_images, wait_healthy


@pytest.fixture
def server():
    """A server that answers from `script` (status, headers, body), then captions each file by its content."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(200, {}, {"status": "ok"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                seen.append(body.count(b"filename="))
                step = script.pop(0) if script else None
            if step:
                return self._answer(*step)
            parts = [p.split(b"\r\n\r\n", 1)[1].rstrip(b"\r\n-") for p in body.split(b"\r\n--") if b"filename=" in p]
            rows = [{"filename": str(i), "caption": part.decode()} for i, part in enumerate(parts)]
            return self._answer(200, {}, {"captions": rows, "model": "m"})

        def _answer(self, status, headers, body):
            raw = json.dumps(body).encode() if isinstance(body, dict) else body
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments):
            pass

    script, seen, lock = [], [], threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    http.url, http.script, http.seen = f"http://127.0.0.1:{http.server_port}", script, seen
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def images(count):
    return ((f"{i}.png", f"picture {i}".encode()) for i in range(count))


@pytest.mark.parametrize(("count", "batch"), [(0, 4), (1, 4), (8, 4), (11, 4), (5, 1)])
def test_order_is_kept_over_batches(server, count, batch):
    assert caption_images(server.url, images(count), batch) == [f"picture {i}" for i in range(count)]
    assert sum(server.seen) == count
    assert not server.seen or max(server.seen) <= batch


def test_full_server_is_asked_again(server):
    full = (503, {"Retry-After": "0"}, {"error": {"message": "full"}})
    server.script += [full, (500, {"Retry-After": "0"}, b"boom"), full]
    assert caption_images(server.url, images(3), 3) == ["picture 0", "picture 1", "picture 2"]
    assert len(server.seen) == 4


def test_refusal_is_not_retried_and_carries_the_reason(server):
    server.script.append((422, {}, {"error": {"message": "1 of 2 images cannot be used: cat.png: truncated"}}))
    with pytest.raises(RunError, match=r"422: 1 of 2 images cannot be used: cat\.png: truncated"):
        caption_images(server.url, images(2), 2)
    assert len(server.seen) == 1


def test_a_batch_that_is_too_large_is_split(server):
    large = (413, {}, {"error": {"message": "at most 2 bytes are taken"}})
    server.script += [large, large]
    assert caption_images(server.url, images(4), 4, in_flight=1) == [f"picture {i}" for i in range(4)]
    assert server.seen == [4, 2, 1, 1, 2]
    server.script += [large] * 2
    with pytest.raises(RunError, match=r"413: at most 2 bytes"):
        caption_images(server.url, images(2), 2)


def test_staying_full_ends_in_an_error_that_says_so(server):
    server.script += [(503, {"Retry-After": "0"}, {"error": {"message": "64 requests are held"}})] * 9
    with pytest.raises(RunError, match=r"503 after 3 attempts: 64 requests are held"):
        caption_images(server.url, images(1), 1, retries=2)


def test_answers_that_make_no_sense(server):
    server.script.append((200, {}, b"<html>"))
    with pytest.raises(RunError, match="not JSON"):
        caption_images(server.url, images(1))
    server.script.append((200, {}, {"captions": []}))
    with pytest.raises(RunError, match="0 captions for 1 images"):
        caption_images(server.url, images(1))


def test_nobody_there(server):
    with pytest.raises(RunError, match="cannot be reached after 2 attempts"):
        caption_images("http://127.0.0.1:9", images(1), retries=1)
    with pytest.raises(RunError, match="not healthy within"):
        wait_healthy("http://127.0.0.1:9", timeout_s=0.3)
    assert wait_healthy(server.url)["status"] == "ok"
