"""One HTTP exchange with a server that may answer anything."""

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
"""How long an exchange may take from the request to the last byte of the answer."""

MOST_BYTES = 8 << 20
"""The largest body that is read."""

_CONNECT_SECONDS = 30.0


class TooLongError(OSError):
    """A body is larger than `MOST_BYTES`."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server answered, with whatever status.

    Attributes:
      status: HTTP's number for it.
      reason: HTTP's words for it.
      headers: fields by name, in any case.
      body: the whole body.
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
    most_bytes: int = MOST_BYTES,
) -> Answer:
    """Sends one request and reads the whole answer.

    Redirects are returned and not followed: the key is for `url` alone. The time limit covers the
    status line, the headers and the body together, so that a server that sends a byte now and then
    cannot hold a request for longer.

    Args:
      url: Address, http or https; proxies of the environment are used.
      key: Secret sent as a bearer token; empty sends none.
      body: Fields to POST as JSON; None makes it a GET.
      seconds: Time limit from the request to the last byte.
      most_bytes: Largest body.

    Raises:
      OSError: No connection, no answer in time, or a body that is too large.
      http.client.HTTPException: The answer is not HTTP, or ends early.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.OpenerDirector()  # Unlike the default one it follows no redirects.
    for handler in (
        urllib.request.ProxyHandler(),
        _HTTPHandler(seconds),
        _HTTPSHandler(seconds),
    ):
        opener.add_handler(handler)
    with opener.open(request, timeout=min(_CONNECT_SECONDS, seconds)) as response:
        content = response.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise TooLongError(f"the answer is longer than {most_bytes:,} bytes")
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
    """Returns a maker of connections whose answers have to be there in so many seconds."""

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
        self._raw = sock.makefile("rb", buffering=0)  # Keeps the socket open until it is closed.
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
