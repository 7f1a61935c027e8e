"""One real server on the tiny GIT: what it serves is what the model says locally; limits hold over HTTP."""

from __future__ import annotations

import dataclasses
import http.client
import io
import socket
import time

import pytest
import requests

from raycap.config import from_dict
from raycap.data.shapes import generate
from raycap.errors import ModelError, RunError

pytestmark = pytest.mark.ray
COUNT = 40


@pytest.fixture(scope="module")
def config():
    return from_dict(
        {
            "run": {"name": "t"},
            "decode": {"max_new_tokens": 16},
            "serve": {"port": 0, "max_batch": 8, "max_images": 16, "max_queue": 8, "max_body_bytes": 4_000_000},
        }
    )


@pytest.fixture(scope="module")
def folder():
    from raycap.models import resolve_path

    return resolve_path("builtin:tiny-git")


@pytest.fixture(scope="module")
def scenes():
    return list(generate(COUNT, seed=5))


@pytest.fixture(scope="module")
def images(scenes):
    """(name, PNG) of each scene."""
    named = []
    for i, scene in enumerate(scenes):
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG")
        named.append((f"scene-{i}.png", buffer.getvalue()))
    return named


@pytest.fixture(scope="module")
def served(ray_session, config, folder):
    from raycap.serve.app import deploy

    server = deploy(config, folder)
    yield server
    server.shutdown()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/healthz", timeout=5)


@pytest.fixture(scope="module")
def local(config, folder, scenes):
    from raycap.export.captioner import Captioner

    captioner = Captioner.load(config, folder)
    return captioner.caption([captioner.prepare(scene.image) for scene in scenes])


@pytest.mark.parametrize("batch", [16, 5, 1])
def test_served_equals_local_whatever_the_batch(served, local, images, batch):
    from raycap.serve.client import caption_images

    assert len(set(local)) > 1, "captions that are all the same would show nothing"
    assert caption_images(served.url, images, batch=batch, in_flight=3) == local


def test_model_health_and_batching(served, images):
    from raycap.serve.client import caption_images

    assert requests.get(f"{served.url}/v1/models", timeout=10).json()["data"][0]["id"] == served.name
    before = counters(served)
    caption_images(served.url, images[:16])
    after = counters(served)
    assert after["raycap_images_total"] - before["raycap_images_total"] == 16
    assert after["raycap_batches_total"] - before["raycap_batches_total"] < 16


def counters(served) -> dict[str, float]:
    text = requests.get(f"{served.url}/metrics", timeout=10).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in lines if "_total{" in name or "_total " in name}


def test_bad_image_is_named_over_http(served, images):
    from raycap.serve.client import caption_images

    with pytest.raises(RunError, match=r"422: 1 of 2 images cannot be used: broken\.png: .*truncated"):
        caption_images(served.url, [images[0], ("broken.png", images[1][1][:-30])])


def test_body_limits_over_http(served):
    host, port = served.url.removeprefix("http://").split(":")
    for headers, body in (
        ({"Content-Length": "4000001"}, b"x" * 4_000_001),
        ({"Transfer-Encoding": "chunked"}, (b"x" * 100_000 for _ in range(45))),
    ):
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request(
            "POST", "/v1/captions", body=body, headers=headers, encode_chunked="Content-Length" not in headers
        )
        answer = connection.getresponse()
        assert answer.status == 413, answer.read()
        connection.close()


def test_chat_over_http(served, local, images):
    import base64

    url = "data:image/png;base64," + base64.b64encode(images[0][1]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": served.name, "messages": [{"role": "user", "content": content}]}
    answer = requests.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == local[0]


def test_overload_is_refused_and_the_client_gets_through(served, local, images):
    from raycap.serve.client import caption_images

    # 24 requests at once for 8 places.
    assert caption_images(served.url, images[:24], batch=1, in_flight=24, retries=30) == local[:24]


def test_one_server_at_a_time(served, config, folder):
    from raycap.serve.app import deploy

    with pytest.raises(RunError, match="runs already"):
        deploy(config, folder)
    assert requests.get(f"{served.url}/healthz", timeout=10).status_code == 200


def test_port_in_use_is_an_error_at_once(ray_session, config, folder):
    from raycap.serve.app import deploy

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(RunError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
            deploy(dataclasses.replace(config, serve=dataclasses.replace(config.serve, port=port)), folder)
        assert time.monotonic() - begun < 5
    with pytest.raises(RunError, match="no port"):
        deploy(config, folder, port=70_000)


def test_a_folder_that_is_no_model_is_refused(ray_session, config, tmp_path):
    from raycap.serve.app import deploy

    with pytest.raises(ModelError, match="no model folder"):
        deploy(config, tmp_path)
