"""The endpoints over a captioner with known answers: shapes, limits, refusals, counts. No Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import random

import pytest

from tests.serve.conftest import bomb, picture


def files(*named):
    return [("images", (name, data)) for name, data in named]


def test_captions_in_order(client):
    answer = client.post("/v1/captions", files=files(("b.png", picture(5)), ("a.jpg", picture(200))))
    assert answer.status_code == 200
    assert answer.json() == {
        "captions": [{"filename": "b.png", "caption": "red 5"}, {"filename": "a.jpg", "caption": "red 200"}],
        "model": "t-red",
    }


def test_one_bad_image_is_named_and_nothing_is_dropped(client):
    answer = client.post("/v1/captions", files=files(("ok.png", picture(5)), ("broken.png", picture(6)[:-40])))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert [item["filename"] for item in error["items"]] == ["broken.png"]
    assert "truncated" in error["items"][0]["reason"]
    assert "captions" not in answer.json()


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (413, {"content": b"x" * 200_001}),
        (413, {"content": (b"x" * 50_000 for _ in range(9))}),  # chunked: no Content-Length
        (413, {"files": files(*[(f"{i}.png", picture(i)) for i in range(5)])}),
        (415, {"json": {"images": []}}),
        (415, {}),
        (422, {"files": files(("bomb.png", bomb(60_000, 60_000)))}),
        (422, {"files": files(("note.txt", b"not an image"))}),
        (422, {"files": [("files", ("a.png", picture(1)))]}),
    ],
)
def test_refusals_of_captions(client, status, request_):
    answer = client.post("/v1/captions", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def chat_body(url, **more):
    content = [{"type": "text", "text": "Describe."}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": content}], **more}


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_chat_answers_in_openais_shape(client):
    answer = client.post("/v1/chat/completions", json=chat_body(data_url(picture(7)), model="t-red")).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "red 7"}, "finish_reason": "stop"}
    ]


def test_chat_fetches_nothing(client):
    answer = client.post("/v1/chat/completions", json=chat_body("http://127.0.0.1:1/a.png"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "url_not_allowed"


def test_score_gives_captions_metrics_and_a_warning(client):
    pytest.importorskip("raycap.evaluate.cider")
    rows = [
        {"image_id": "x", "image": base64.b64encode(picture(5)).decode(), "references": ["red 5", "a red five"]},
        {"image_id": "y", "image": data_url(picture(6)), "references": ["green 9"]},
    ]
    answer = client.post("/v1/score", content="\n".join(map(json.dumps, rows)))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["captions"] == [{"image_id": "x", "caption": "red 5"}, {"image_id": "y", "caption": "red 6"}]
    assert body["images"] == 2
    assert body["metrics"]["bleu1"]["score"] > 0
    assert "df" in body["metrics"]["cider"]["signature"]
    assert "must not be averaged" in body["warning"]


def test_models_health_and_unknown_paths(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "t-red"
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/v1/captions").status_code == 405
    assert "/nowhere" in client.get("/nowhere").json()["error"]["message"]


def test_a_failure_of_the_model_is_told(client):
    answer = client.post("/v1/captions", files=files(("a.png", picture(13))))
    assert answer.status_code == 500
    assert "thirteen" in answer.json()["error"]["message"]
    assert client.post("/v1/captions", files=files(("a.png", picture(14)))).status_code == 200


def test_metrics_count(client):
    client.post("/v1/captions", files=files(("a.png", picture(1)), ("b.png", picture(2))))
    client.post("/v1/captions", content=b"")
    text = client.get("/metrics").text
    labels = 'endpoint="/v1/captions",model="t-red",replica="r0"'
    assert f'raycap_requests_total{{{labels},status="200"}} 1.0' in text
    assert f'raycap_requests_total{{{labels},status="415"}} 1.0' in text
    assert 'raycap_errors_total{code="unsupported_media_type",model="t-red",replica="r0"} 1.0' in text
    assert f"raycap_request_seconds_count{{{labels}}} 2.0" in text


def test_full_queue_answers_503_with_retry_after(app, service):
    import httpx2

    async def overload():
        gate = asyncio.Event()
        service.wait = gate.wait
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://t") as http:
            post = [
                asyncio.create_task(http.post("/v1/captions", files=files(("a.png", picture(i))))) for i in range(5)
            ]
            done, _ = await asyncio.wait(post, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 3:
                done, _ = await asyncio.wait(post, timeout=0.1)
            gate.set()
            return [task.result() for task in post if await task]

    answers = asyncio.run(overload())
    assert sorted(a.status_code for a in answers) == [200, 200, 503, 503, 503]
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 503)


def test_openapi_describes_the_endpoints(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/captions", "/v1/chat/completions", "/v1/score", "/v1/models", "/healthz", "/metrics"}
    body = paths["/v1/captions"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == ["images"]


def test_fuzzed_bodies_are_refused_never_failed(client):
    """Random edits of valid requests: 200 or a 4xx with a reason, never a 500."""
    rng = random.Random(1)
    head = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    valid = {
        "/v1/captions": head + picture(3) + b"\r\n--B--\r\n",
        "/v1/chat/completions": json.dumps(chat_body(data_url(picture(3)))).encode(),
        "/v1/score": json.dumps({"image": data_url(picture(3))[22:], "references": ["a"]}).encode()[:-1],
    }
    headers = {"content-type": "multipart/form-data; boundary=B"}
    for path, body in valid.items():
        for _ in range(120):
            bad = bytearray(body)
            for _ in range(rng.randint(1, 6)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            answer = client.post(path, content=bytes(bad[: rng.randint(0, len(bad))]), headers=headers)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (path, bytes(bad), answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["message"]
