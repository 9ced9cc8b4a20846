"""Sends an HTTP request to an untrusted server, with limits on time and size."""

import dataclasses
import functools
import http.client
import io
import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

SECONDS = 120.0
"""Time limit from the request to the last byte of the answer."""

MAX_BYTES = 8 << 20
"""Maximum size of a body."""

_CONNECT_SECONDS = 30.0


class TooLongError(OSError):
    """Raised when a body exceeds the limit."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer of a server, with any status.

    Attributes:
      status: HTTP status code.
      reason: HTTP reason phrase.
      headers: Header fields by case-insensitive name.
      body: Complete body.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


def exchange(
    url: str,
    *,
    key: str = "",
    body: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
    max_bytes: int = MAX_BYTES,
) -> Answer:
    """Sends one request and reads the complete answer.

    Redirects are returned and not followed, because the key is only for `url`. The time limit
    covers the whole answer, so that a server cannot prolong a request by sending it byte by byte.

    Args:
      url: http or https URL; proxies of the environment are used.
      key: Secret to send as a bearer token; empty: none.
      body: Fields to POST as JSON; None: a GET request.
      seconds: Time limit from the request to the last byte.
      max_bytes: Maximum size of the body.

    Raises:
      OSError: There is no connection, no answer in time, or the body is too large.
      http.client.HTTPException: The answer is not HTTP, or is truncated.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.OpenerDirector()  # Unlike the default opener, follows no redirects.
    for handler in (
        urllib.request.ProxyHandler(),
        _HTTPHandler(seconds),
        _HTTPSHandler(seconds),
    ):
        opener.add_handler(handler)
    with opener.open(request, timeout=min(_CONNECT_SECONDS, seconds)) as response:
        content = response.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise TooLongError(f"the answer exceeds {max_bytes:,} bytes")
        if response.length:
            raise http.client.IncompleteRead(content, response.length)
        return Answer(response.status, response.reason, response.headers, content)


class _HTTPHandler(urllib.request.HTTPHandler):
    """Opens http addresses with a deadline."""

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connection(http.client.HTTPConnection, self._seconds), request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    """Opens https addresses with a deadline."""

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        connection = _connection(http.client.HTTPSConnection, self._seconds)
        return self.do_open(connection, request, context=ssl.create_default_context())


def _connection(kind: type[http.client.HTTPConnection], seconds: float) -> Any:
    """Returns a function that makes connections whose answers must arrive within a deadline."""

    def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        connection = kind(*args, **kwargs)
        deadline = time.monotonic() + seconds
        connection.response_class = functools.partial(_response, deadline)  # type: ignore[assignment]
        return connection

    return make


def _response(
    deadline: float, sock: socket.socket, *args: Any, **kwargs: Any
) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(sock, *args, **kwargs)
    response.fp.close()
    response.fp = io.BufferedReader(_TimedReader(sock, deadline))
    return response


class _TimedReader(io.RawIOBase):
    """Reads from a socket until a deadline."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)  # Keeps the socket open.
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no complete answer within the time limit")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
