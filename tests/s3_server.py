"""A real S3 server (moto in a process of its own), and an HTTP proxy in front of it that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

ACCESS_KEY, SECRET_KEY, REGION = "AKIACOTAMTESTS", "sEcReT/that+nobody/may/ever/read", "eu-test-1"


class Request(NamedTuple):
    """A request as the rules of a proxy see it; the path is decoded: /bucket/key."""

    method: str
    path: str
    query: str


class SlowDown(NamedTuple):
    """503 instead of an answer."""


class Deny(NamedTuple):
    """An error instead of an answer."""

    status: int = 403
    code: str = "AccessDenied"


class Reset(NamedTuple):
    """The server does what is asked, but the connection is reset in the middle of its answer."""


class Stall(NamedTuple):
    """The answer stops in the middle for some seconds; one without a body stops before it starts."""

    seconds: float


class Trickle(NamedTuple):
    """The answer's body comes in pieces with pauses."""

    num_pieces: int
    pause_s: float


Fault = SlowDown | Deny | Reset | Stall | Trickle


class FaultProxy:
    """Passes requests on to an S3 server unless ``rule`` names a fault for them.

    It checks signatures, which moto does not, and it is what restarts in tests of a restart: moto keeps its objects in
    memory, so only the proxy's listening socket and connections go away, which is all that a client sees of it.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self.rule: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.num_faults = 0
        self._connections: set[socket.socket] = set()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def options(self, **more: Any) -> dict[str, Any]:
        """Storage options for it; few and short retries, so that tests of what fails at last are short."""
        config = {"retries": {"mode": "standard", "total_max_attempts": 4}, "read_timeout": 1.5, **more}
        client = {"region_name": REGION}
        return {
            "endpoint_url": self.url, "key": ACCESS_KEY, "secret": SECRET_KEY, "client_kwargs": client,
            "config_kwargs": config,
        }  # fmt: skip

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.proxy = self
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the listening socket and reset every connection."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            _reset(connection)

    def handle(self, handler: _Handler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        url = urlsplit(handler.path)
        request = Request(handler.command, unquote(url.path), url.query)
        self.requests.append(request)
        fault: Fault | None = self.rule(request) if _is_signed(handler) else Deny()
        self.num_faults += fault is not None
        if isinstance(fault, SlowDown | Deny):
            status, code = (503, "SlowDown") if isinstance(fault, SlowDown) else fault
            content = f"<Error><Code>{code}</Code><Message>Injected by a test.</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
            handler.answer(status, headers, [b"" if request.method == "HEAD" else content])
            return
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        with contextlib.closing(connection):
            connection.request(handler.command, handler.path, body, dict(handler.headers))
            response = connection.getresponse()
            content = response.read()
        headers = [(n, v) for n, v in response.getheaders() if n.lower() not in ("connection", "transfer-encoding")]
        if "content-length" not in {name.lower() for name, _ in headers}:
            headers.append(("Content-Length", str(len(content))))
        if isinstance(fault, Stall) and not content:
            time.sleep(fault.seconds)
        handler.answer(response.status, headers, _pieces(content, fault))
        if isinstance(fault, Reset):
            _reset(handler.connection)
            handler.close_connection = True


class _Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True
    request_queue_size = 64
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:  # clients that went away
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.proxy._connections.add(self.connection)

    def finish(self) -> None:
        self.server.proxy._connections.discard(self.connection)
        super().finish()

    def answer(self, status: int, headers: list[tuple[str, str]], pieces: Any) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

    def do_GET(self) -> None:
        self.server.proxy.handle(self)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


def _pieces(content: bytes, fault: Fault | None) -> Iterator[bytes]:
    half = len(content) // 2
    if isinstance(fault, Reset):
        yield content[:half]
    elif isinstance(fault, Stall):
        yield content[:half]
        time.sleep(fault.seconds)
        yield content[half:]
    elif isinstance(fault, Trickle):
        size = max(1, -(-len(content) // fault.num_pieces))
        for start in range(0, len(content), size):
            yield content[start : start + size]
            time.sleep(fault.pause_s)
    else:
        yield content


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
        os.close(connection.detach())  # at once, whoever else holds the socket


def _is_signed(handler: _Handler) -> bool:
    """Whether the request carries the signature that the secret key gives."""
    _, _, fields = handler.headers.get("Authorization", "").partition(" ")
    values = dict(field.strip().partition("=")[::2] for field in fields.split(","))
    if not values.get("Credential", "").startswith(f"{ACCESS_KEY}/"):
        return False
    signed = {name: handler.headers[name] for name in values["SignedHeaders"].split(";")}
    request = AWSRequest(handler.command, f"http://{handler.headers['Host']}{handler.path}", signed)
    request.context["timestamp"] = handler.headers["X-Amz-Date"]
    auth = S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION)
    return bool(
        auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request) == values["Signature"]
    )


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's S3 server in its own process; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def s3_client(url: str) -> Any:
    """A plain client of the server itself, past any proxy."""
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
