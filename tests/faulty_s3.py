"""A server of the S3 protocol that fails on command: moto behind a layer that spoils some requests."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs

import pytest

Start = Callable[..., Any]

ERRORS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error"),
    "503": ("503 Service Unavailable", "ServiceUnavailable", "Please try again"),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "denied": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "no bucket": ("404 Not Found", "NoSuchBucket", "The specified bucket does not exist"),
}


@dataclass
class Fault:
    """What goes wrong: `kind` is a key of `ERRORS`, or reset, truncated, stale, slow, hang.

    Attributes:
        operation: as `operation_of` names them; "marker" is a put of the marker.
        times: how many requests are spoilt.
        seconds: for which a slow one is held up; a hanging one is, until the server stops.
    """

    kind: str
    operation: str
    times: int = 1
    seconds: float = 0.2


def operation_of(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if method == "POST":
        return "create" if "uploads" in query else "complete" if "uploadId" in query else "delete"
    if method == "PUT":
        marker = environ["PATH_INFO"].endswith("committed.json")
        return "part" if "partNumber" in query else "marker" if marker else "put"
    if method == "GET" and ("list-type" in query or "prefix" in query):
        return "list"
    return {"GET": "get", "HEAD": "head", "DELETE": "delete"}[method]


class FaultyS3:
    """A running server.

    Attributes:
        endpoint: its URL.
        fault: the one that is injected next.
        spoilt: how many requests were.
        key: the only access key that is taken; None for any.
    """

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server")
        from werkzeug.serving import make_server

        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.fault: Fault | None = None
        self.spoilt = 0
        self.key: str | None = None
        self._lock, self._ends = threading.Lock(), threading.Event()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._ends.set()
        self._server.shutdown()
        self._server.server_close()

    def inject(self, kind: str, operation: str, times: int = 1) -> None:
        self.fault, self.spoilt = Fault(kind, operation, times), 0

    def _taken(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            fault = self.fault
            if fault is None or self.spoilt >= fault.times or operation_of(environ) != fault.operation:
                return None
            self.spoilt += 1
            return fault.kind

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        kind = self._taken(environ)
        if self.key is not None and f"Credential={self.key}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            kind = "expired"
        if kind in ERRORS:
            _read(environ)
            status, code, message = ERRORS[kind]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
        if kind == "reset":
            _close(environ)
            return []
        if kind in ("slow", "hang"):
            assert self.fault is not None
            self._ends.wait(self.fault.seconds if kind == "slow" else None)
        if kind == "truncated" and environ["REQUEST_METHOD"] == "PUT":
            data = _read(environ)
            environ |= {"wsgi.input": BytesIO(data[: len(data) // 2]), "CONTENT_LENGTH": str(len(data) // 2)}
        elif kind in ("truncated", "stale"):
            return self._spoil_answer(kind, environ, start)
        return self._app(environ, start)

    def _spoil_answer(self, kind: str, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        answer: list[Any] = []
        body = b"".join(self._app(environ, lambda status, headers, *_: answer.extend((status, headers))))
        status, headers = answer
        if kind == "stale":  # the newest entries are not there yet
            body = re.sub(rb"<Contents>(?:(?!</Contents>).)*(safetensors|committed.json).*?</Contents>", b"", body)
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start(status, headers)
        if kind == "stale":
            return [body]

        def cut() -> Iterable[bytes]:
            yield body[: len(body) // 2]
            _close(environ)

        return cut()


def _read(environ: dict[str, Any]) -> bytes:
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _close(environ: dict[str, Any]) -> None:
    """Ends the connection in the middle of things."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
