"""Stands in for Google Cloud Storage and for S3: the part of their protocols that reads, lists,
writes and deletes objects, with conditions on generations.
"""

import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

BUCKET = "bucket-of-the-test"


@dataclasses.dataclass
class StandIn:
    """A running server.

    Attributes:
      url: Address of the server.
      objects: Content of the bucket's objects.
      log: Name and new content of each change, in order; None for a deletion.
      denied: Methods that the server denies.
    """

    url: str = ""
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    generations: dict[str, int] = dataclasses.field(default_factory=dict)
    log: list[tuple[str, bytes | None]] = dataclasses.field(default_factory=list)
    denied: tuple[str, ...] = ()
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead TensorStore to the server."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }

    def change(self, name: str, content: bytes | None, condition: str | None) -> int | None:
        """Writes or deletes an object; returns its generation, or None if it has another one."""
        with self.lock:
            present = str(self.generations.get(name, 0)) if name in self.objects else "0"
            if condition is not None and condition != present:
                return None
            self.log.append((name, content))
            self.generations[name] = self.generations.get(name, 0) + 1
            if content is None:
                self.objects.pop(name, None)
            else:
                self.objects[name] = content
            return self.generations[name]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def do_GET(self) -> None:
        path, query = self._parts()
        if "GET" in self.stand_in.denied:
            self._answer(403, b'{"error": {"message": "no access"}}')
        elif path == f"/storage/v1/b/{BUCKET}/o":
            self._list_gcs(query)
        elif "list-type" in query:
            self._list_s3(query)
        else:
            self._read(self._name(path), query)

    def do_HEAD(self) -> None:
        self._read(self._name(self._parts()[0]), {})

    def do_POST(self) -> None:
        _, query = self._parts()
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._change(query["name"][0], content, query.get("ifGenerationMatch", [None])[0])

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._change(self._name(self._parts()[0]), content, self._condition())

    def do_DELETE(self) -> None:
        path, query = self._parts()
        self._change(self._name(path), None, query.get("ifGenerationMatch", [self._condition()])[0])

    def _condition(self) -> str | None:
        if "If-None-Match" in self.headers:
            return "0"
        # S3's tag of an object has its generation at the end.
        match = self.headers.get("If-Match")
        return None if match is None else match.strip('"').rpartition("-")[2]

    def _read(self, name: str, query: dict[str, list[str]]) -> None:
        with self.stand_in.lock:
            content = self.stand_in.objects.get(name)
            generation = self.stand_in.generations.get(name, 0)
        if content is None:
            self._answer(404, b"")
        elif query.get("ifGenerationNotMatch") == [str(generation)]:
            self._answer(304, b"")
        else:
            self._answer(200, content, generation)

    def _change(self, name: str, content: bytes | None, condition: str | None) -> None:
        if self.command in self.stand_in.denied:
            self._answer(403, b'{"error": {"message": "no access"}}')
            return
        generation = self.stand_in.change(name, content, condition)
        if generation is None:
            self._answer(412, b"")
        elif content is None:
            self._answer(204, b"")
        else:
            text = json.dumps({"name": name, "generation": str(generation)})
            self._answer(200, text.encode(), generation)

    def _list_gcs(self, query: dict[str, list[str]]) -> None:
        start, stop = (query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
        names = [
            {"name": name}
            for name in sorted(self.stand_in.objects)
            if start <= name and (name < stop or not stop)
        ]
        self._answer(200, json.dumps({"items": names}).encode())

    def _list_s3(self, query: dict[str, list[str]]) -> None:
        prefix, after = (query.get(name, [""])[0] for name in ("prefix", "start-after"))
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>1</Size></Contents>"
            for name in sorted(self.stand_in.objects)
            if name.startswith(prefix) and name > after
        )
        self._answer(
            200,
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode(),
        )

    def _name(self, path: str) -> str:
        if "/o/" in path and path.startswith("/storage/v1/b/"):
            return path.partition("/o/")[2]
        return path.removeprefix(f"/{BUCKET}/")

    def _parts(self) -> tuple[str, dict[str, list[str]]]:
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path), urllib.parse.parse_qs(
            parts.query, keep_blank_values=True
        )

    def _answer(self, code: int, content: bytes, generation: int = 1) -> None:
        self.send_response(code)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        digest = hashlib.md5(content).hexdigest()
        self.send_header("ETag", f'"{digest}-{generation}"')
        self.end_headers()
        if self.command != "HEAD" and code not in (204, 304):
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Suppresses the log."""


@contextmanager
def serve() -> Iterator[StandIn]:
    """Runs the server during the block."""
    stand_in = StandIn()
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    server.daemon_threads = True
    stand_in.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
