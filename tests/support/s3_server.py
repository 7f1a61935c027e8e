"""A small S3 over HTTP on a folder: as much of the protocol as pyarrow's client speaks, for tests of `run.storage`."""

from __future__ import annotations

import hashlib
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "bucket"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_):
        pass

    def parsed(self) -> tuple[str, str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        return bucket, key, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", None) or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raw = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return raw
        out = b""
        while raw:  # within the body once more, with a checksum at its end
            size, _, raw = raw.partition(b"\r\n")
            count = int(size.split(b";")[0], 16)
            if not count:
                break
            out, raw = out + raw[:count], raw[count + 2 :]
        return out

    def place(self, bucket: str, key: str) -> Path:
        # A file a key, its name quoted: a bucket knows no folders.
        return self.root / bucket / urllib.parse.quote(key, safe="")

    def handle_one(self) -> None:
        bucket, key, query = self.parsed()
        data = self.body() if self.command in ("PUT", "POST") else b""
        if not (self.root / bucket).is_dir():
            return self.refuse(404, "NoSuchBucket")
        if not key:
            if "delete" in query:
                for piece in data.decode().split("<Key>")[1:]:
                    self.place(bucket, piece.split("</Key>")[0]).unlink(missing_ok=True)
                return self.answer(200, b"<DeleteResult/>")
            return self.listing(bucket, query) if self.command == "GET" else self.answer(200)
        getattr(self, f"{self.command.lower()}_key")(bucket, key, query, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        prefix, mark = query.get("prefix", ""), query.get("delimiter", "")
        keys, groups = [], set()
        for file in sorted((self.root / bucket).iterdir()):
            key = urllib.parse.unquote(file.name)
            rest = key[len(prefix) :]
            if not key.startswith(prefix) or file.is_dir():
                continue
            if mark and mark in rest:
                groups.add(prefix + rest.split(mark)[0] + mark)
            else:
                keys.append((key, file.stat().st_size))
        limit = int(query.get("max-keys", "1000"))
        body = "".join(
            f"<Contents><Key>{escape(k)}</Key><Size>{n}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for k, n in keys[:limit]
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(g)}</Prefix></CommonPrefixes>" for g in sorted(groups))
        count = len(keys[:limit]) + len(groups)
        self.answer(
            200,
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>{body}"
            "</ListBucketResult>".encode(),
            Content_Type="application/xml",
        )

    def head_key(self, bucket: str, key: str, query: dict[str, str], data: bytes) -> None:
        file = self.place(bucket, key)
        if not file.is_file():
            return self.answer(404)
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()

    def get_key(self, bucket: str, key: str, query: dict[str, str], data: bytes) -> None:
        file = self.place(bucket, key)
        if not file.is_file():
            return self.refuse(404, "NoSuchKey")
        raw, asked = file.read_bytes(), self.headers.get("Range", "")
        if not asked:
            return self.answer(200, raw)
        first, last = asked.removeprefix("bytes=").split("-")
        part = raw[int(first) : int(last) + 1 if last else None]
        self.answer(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(raw)}")

    def put_key(self, bucket: str, key: str, query: dict[str, str], data: bytes) -> None:
        tag = hashlib.md5(data).hexdigest()
        if "uploadId" in query:
            folder = self.root / ".uploads" / query["uploadId"]
            (folder / f"{int(query['partNumber']):05d}").write_bytes(data)
            return self.answer(200, ETag=f'"{tag}"')
        source = self.headers.get("x-amz-copy-source")
        if source:
            from_bucket, _, from_key = urllib.parse.unquote(source).lstrip("/").partition("/")
            data = self.place(from_bucket, from_key).read_bytes()
        self.write(self.place(bucket, key), data)
        body = f'<CopyObjectResult><ETag>"{tag}"</ETag></CopyObjectResult>'.encode() if source else b""
        self.answer(200, body, ETag=f'"{tag}"')

    def post_key(self, bucket: str, key: str, query: dict[str, str], data: bytes) -> None:
        if "uploads" in query:
            upload = hashlib.md5(f"{key}{threading.get_ident()}{id(self)}".encode()).hexdigest()
            (self.root / ".uploads" / upload).mkdir(parents=True, exist_ok=True)
            body = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            return self.answer(200, body.encode())
        folder = self.root / ".uploads" / query["uploadId"]
        self.write(self.place(bucket, key), b"".join(p.read_bytes() for p in sorted(folder.iterdir())))
        shutil.rmtree(folder)
        self.answer(200, b'<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>')

    def delete_key(self, bucket: str, key: str, query: dict[str, str], data: bytes) -> None:
        if "uploadId" in query:
            shutil.rmtree(self.root / ".uploads" / query["uploadId"], ignore_errors=True)
        else:
            self.place(bucket, key).unlink(missing_ok=True)
        self.answer(204)

    def write(self, file: Path, data: bytes) -> None:
        temporary = self.root / f".new-{threading.get_ident()}"
        temporary.write_bytes(data)
        temporary.replace(file)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Serve `folder`; yields the url of its one bucket, for pyarrow in any process of this machine."""
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"root": folder}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = urllib.parse.urlencode(
        {"scheme": "http", "endpoint_override": f"127.0.0.1:{server.server_port}", "region": "us-east-1"}
    )
    try:
        yield f"s3://key:secret@{BUCKET}?{place}"
    finally:
        server.shutdown()
        server.server_close()
