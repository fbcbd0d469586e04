"""The Model Context Protocol on the wire, both ends of it; nothing here knows of incidents.

1. The client, as far as events need it: whatever a server does, it ends as a message, a flagged
   problem or an `MCPError`, within a time and a size.
2. A small HTTP server, for health endpoints and for 3.
3. Simulated clusters that do what a real events-capable server was seen to do.

nightcrier.py uses this module; it imports nothing from there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import ssl
import urllib.parse
import uuid
from asyncio.sslproto import SSLProtocol
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal, Self

import h11

CLIENT_VERSION = "0.1.0"  # of this client, as it introduces itself

log = logging.getLogger("nightcrier.mcp")


# ============================================================================
# 1. Client
# No byte, second or connection is without a limit.
# ============================================================================

# Revisions with sessions and a GET stream, best first. 2026-07-28 has neither: it would accept a
# subscription and then deliver nothing, so it is never offered.
SESSION_PROTOCOLS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
BATCH_PROTOCOLS = ("2025-03-26", "2024-11-05")  # JSON-RPC batches were removed in 2025-06-18

MAX_EVENT_BYTES = 1_572_864  # a fault with 1 MiB of context fits, JSON escapes included
_MAX_REPLY_BYTES = 8 * 1_048_576
_MAX_HEADER_BYTES = 65_536
_MAX_ID_BYTES = 1_024  # session and event ids go back in a header
_MAX_JSON_DEPTH = 100
_MAX_ANSWERS = 8  # replies to a server's own requests under way at once, for each session
_READ_BYTES = 65_536
_BUFFER_BYTES = 16_384  # asyncio stops reading the socket at twice this: back-pressure starts here

_METHOD_NOT_FOUND = -32601
_INVALID_PARAMS = -32602

Retry = Literal["now", "backoff", "slow"]


class MCPError(Exception):
    """A server did not do what was asked of it. `retry` says how to go on.

    "now": at once. "backoff": after a delay that grows. "slow": only somebody's action will change
    the outcome, so ask every few minutes.
    """

    retry: Retry = "backoff"


class ConnectionLost(MCPError):
    """The connection could not be made, or ended before the answer or the stream did."""


class NoAnswer(ConnectionLost):
    """The time for an answer has passed."""


class ResumeFailed(ConnectionLost):
    """A stream that was resumed ended at once: if this repeats, forget the id of the last event.

    The Python SDK answers so when it does not know the id, but also while it still holds the old
    stream.
    """


class StreamBusy(MCPError):
    """The server still holds an earlier stream of this session."""


class ProtocolViolation(MCPError):
    """What the server sent is not HTTP, SSE or MCP."""


class SessionGone(MCPError):
    """The server no longer knows the session: connect anew."""

    retry: Retry = "now"


class NeedsAction(MCPError):
    """Asking again will not help until somebody has changed something."""

    retry: Retry = "slow"


class ToolHung(NoAnswer, NeedsAction):
    """A tool call had no answer in time; a server that hangs here usually needs a restart."""


class InvalidURL(NeedsAction):
    """The URL of a cluster cannot be used."""


class WrongPath(NeedsAction):
    """No MCP server answers at this URL."""


class Redirected(NeedsAction):
    """The server answered with a redirect, and a credential must not follow it."""


class CertificateRejected(NeedsAction):
    """The server's certificate is not trusted, or the trust setting cannot be read."""


class AuthRejected(NeedsAction):
    """The server does not accept the credential, or there is none that could be sent."""


class StreamUnsupported(NeedsAction):
    """The server has no stream that it could push events on (it runs stateless)."""


class ModernOnly(NeedsAction):
    """The server speaks only sessionless revisions of MCP, which cannot push events."""


class ServerBusy(MCPError):
    """The server asks to come back later, after `retry_after` seconds if it says so."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestRefused(MCPError):
    """Any other HTTP status (`status`) or JSON-RPC error (`code`, `data`)."""

    def __init__(
        self, message: str, *, status: int = 200, code: int | None = None, data: object = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.data = status, code, data
        self.retry = "slow" if 400 <= status < 500 else "backoff"


class ToolFailed(MCPError):
    """A tool answered with an error; `permanent` when the same call cannot succeed later."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry = "slow" if permanent else "backoff"


def jitter(low: float, high: float) -> float:
    """A random number between the two: what many do now and then, they do not do together."""
    return low + (high - low) * secrets.randbelow(1_000_000) / 1_000_000


def backoff(failures: int, *, base: float = 1.0, ceiling: float = 60.0) -> float:
    """Seconds to wait after the n-th failure in a row: full jitter below base * 2^n.

    Full jitter spreads a thousand clients that lost the same server (AWS Architecture Blog,
    "Exponential Backoff And Jitter").
    """
    return jitter(base, min(ceiling, base * 2.0 ** min(failures, 30)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MCPEndpoint:
    """Where a server is, and how to be let in.

    `api_key` is called for each request, so that a key that is rotated in its file is used at once.
    An https endpoint without `tls` trusts what the system trusts.
    """

    url: str
    api_key: Callable[[], str | None] = field(default=lambda: None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _parse_url(self.url)


@functools.cache
def make_tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """What to trust: the system's authorities, or only those in `ca_file`.

    One context is shared by all connections with the same setting (it costs 0.9 MB). The file is
    read once; `make_tls_context.cache_clear()` makes the next call read it again.
    """
    # asyncio gives every TLS connection a read buffer of 256 KiB; a TLS record has at most 16 KiB.
    if hasattr(SSLProtocol, "max_size"):
        SSLProtocol.max_size = 16_384
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise CertificateRejected(f"cannot use ca_file {ca_file}: {_reason(error)}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True, slots=True, kw_only=True)
class _Address:
    tls: bool
    host: str
    port: int
    authority: str  # as the Host header wants it
    target: str  # path and query
    shown: str  # for messages: no query, which may hold a token


def _parse_url(url: str) -> _Address:
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        if host:
            host.encode("idna" if not host.isascii() else "ascii")
    except ValueError:  # whose text may hold a password
        raise InvalidURL("a cluster's URL has a host or port that is not valid") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidURL("a cluster's URL must look like https://host:port/mcp")
    if parts.username is not None or parts.password is not None:
        raise InvalidURL(f"the URL for {host} holds a user or password: use api_key instead")
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    if not re.fullmatch(r"[!-~]+", target):
        raise InvalidURL(f"the URL for {host} has characters that must be percent-encoded")
    tls = parts.scheme == "https"
    name = f"[{host}]" if ":" in host else host
    authority = name if port is None else f"{name}:{port}"
    return _Address(
        tls=tls,
        host=host,
        port=port if port is not None else (443 if tls else 80),
        authority=authority if authority.isascii() else authority.encode("idna").decode(),
        target=target,
        shown=f"{parts.scheme}://{authority}{parts.path or '/'}",
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # asyncio's own text says "Connect call failed"
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error) or type(error).__name__


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise `NoAnswer` when the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise NoAnswer(f"{what}: no answer within {seconds:g} seconds") from None


# ---- Server-sent events ----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SSEEvent:
    """One block of a stream.

    `id` is the one in this very block, never one inherited from an earlier block: that would make
    the next event look like a repeated delivery of the last.
    """

    type: str = "message"
    data: str = ""
    id: str | None = None
    retry_ms: int | None = None
    problem: str | None = None


_BOM = b"\xef\xbb\xbf"
_COMMENT = (b":", _BOM + b":")  # what a line starts with that says nothing


class SSEParser:
    """Bytes in, events out: HTML standard, 9.2.6 "Interpreting an event stream".

    Differs in that a block without data is reported when it has an id or a retry time (a priming
    event), and that an event larger than `max_event_bytes` is skipped up to its end, and reported.
    Holds at most that many bytes, and takes linear time however the bytes are cut.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_event_bytes
        # The line that has not ended yet, or b":" when only its end matters.
        self._partial = bytearray()
        self._after_cr = False
        self._at_start = True
        self._start_block()

    def _start_block(self) -> None:
        self._data: list[bytes] = []
        self._type = b""
        self._event_id: bytes | None = None
        self._retry_ms: int | None = None
        self._size = 0
        self._skipping = False

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")  # the other half of a \r\n
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # of bytes: \n, \r and \r\n, exactly as the standard has it
        unfinished = b"" if chunk.endswith((b"\n", b"\r")) else lines.pop()
        events = []
        if lines:
            self._complete_first(lines)
            for line in lines:
                if line:
                    self._take_line(line)
                elif (event := self._end_block()) is not None:
                    events.append(event)
        self._hold(unfinished)
        return events

    def _complete_first(self, lines: list[bytes]) -> None:
        if self._partial:
            lines[0] = bytes(self._partial + lines[0])
            self._partial = bytearray()
        if self._at_start:
            lines[0] = lines[0].removeprefix(_BOM)
            self._at_start = False

    def _hold(self, unfinished: bytes) -> None:
        if self._partial == b":" or not unfinished:
            return
        self._partial += unfinished
        if self._partial.startswith(_COMMENT):
            self._partial = bytearray(b":")
        elif self._size + len(self._partial) > self._max_bytes + len(_BOM):
            self._partial = bytearray(b":")
            self._skip()

    def _skip(self) -> None:
        self._skipping = True
        self._data.clear()

    def _take_line(self, line: bytes) -> None:
        if line.startswith(_COMMENT) or self._skipping:
            return
        if self._size + len(line) > self._max_bytes:
            self._skip()
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(line) + 1
        elif name == b"event":
            self._type = value[:_MAX_ID_BYTES]
        elif name == b"id":
            if b"\0" not in value and len(value) <= _MAX_ID_BYTES:
                self._event_id = value
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self._retry_ms = int(value)

    def _end_block(self) -> SSEEvent | None:
        without_field = self._event_id is None and self._retry_ms is None
        if without_field and not self._data and not self._skipping:
            self._type = b""
            return None
        problem = None
        if self._skipping:
            problem = f"an event of more than {self._max_bytes} bytes was skipped"
        raw = b"\n".join(self._data)
        try:
            data = raw.decode()
        except UnicodeDecodeError:
            data, problem = raw.decode(errors="replace"), "invalid UTF-8 was replaced"
        event = SSEEvent(
            type=self._type.decode(errors="replace") or "message",
            data=data,
            id=None if self._event_id is None else self._event_id.decode(errors="replace"),
            retry_ms=self._retry_ms,
            problem=problem,
        )
        self._start_block()
        return event


# ---- JSON-RPC --------------------------------------------------------------


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


# JSON has no NaN and no Infinity, and what we store must be JSON: they, and 1e999, become null.
_JSON = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def _parse_messages(text: str, *, batches: bool) -> list[dict[str, object]]:
    """The JSON-RPC messages in `text`; ValueError says in a few words why there are none."""
    try:
        value = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except ValueError:  # int() refuses to read more than 4,300 digits
        raise ValueError("JSON with a number that is too long") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if text.count("[") + text.count("{") > _MAX_JSON_DEPTH and _is_deep(value):
        raise ValueError("JSON that is nested too deeply")
    if isinstance(value, list) and not batches:
        raise ValueError("a JSON-RPC batch, which this protocol revision does not have")
    messages = value if isinstance(value, list) else [value]
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("JSON that is not a JSON-RPC message")
    return messages


def _is_deep(value: object) -> bool:
    """Whether writing `value` as JSON again could exhaust the stack of whoever does it."""
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _json_in(text: str) -> Mapping[str, object]:
    """The JSON object within a tool's text, or an empty one."""
    with contextlib.suppress(ValueError):
        return _parse_messages(text[text.index("{") : text.rindex("}") + 1], batches=False)[0]
    return {}


# ---- HTTP ------------------------------------------------------------------

_Headers = list[tuple[bytes, bytes]]

# (option, value) of a connection that may stay quiet for hours: a dead peer is noticed within two
# minutes. TCP_KEEPALIVE is macOS's name for TCP_KEEPIDLE; TCP_USER_TIMEOUT is Linux only.
_KEEPALIVE_OPTIONS = (
    ("TCP_KEEPIDLE", 30),
    ("TCP_KEEPALIVE", 30),
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
    ("TCP_USER_TIMEOUT", 90_000),  # milliseconds
)


class _Connection:
    """One request and its response, on a TCP connection of its own.

    Short-lived connections for POSTs are cheaper than kept ones: thousands of idle clusters would
    hold one each, and a tool call must not be sent twice because a kept one had gone stale.
    """

    def __init__(
        self, address: _Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._address, self._reader, self._writer = address, reader, writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)

    @classmethod
    async def open(cls, endpoint: MCPEndpoint) -> _Connection:
        address = _parse_url(endpoint.url)
        tls = (endpoint.tls or make_tls_context()) if address.tls else None
        is_name = ":" not in address.host and any(c.isalpha() for c in address.host)
        try:
            reader, writer = await asyncio.open_connection(
                address.host,
                address.port,
                ssl=tls,
                limit=_BUFFER_BYTES,
                happy_eyeballs_delay=0.25 if is_name else None,
            )
        except ssl.SSLCertVerificationError as error:
            message = f"the certificate of {address.shown} is not trusted: set ca_file"
            raise CertificateRejected(f"{message} ({error.verify_message})") from error
        except (OSError, UnicodeError) as error:
            raise ConnectionLost(f"cannot connect to {address.shown}: {_reason(error)}") from error
        return cls(address, reader, writer)

    def close(self) -> None:
        """Close now: a peer that is stuck could hold a graceful TLS closing for 30 seconds."""
        self._writer.transport.abort()

    def keep_alive(self) -> None:
        """Have the kernel probe a quiet peer. (asyncio has set TCP_NODELAY.)"""
        sock = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # not worth a stream
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE_OPTIONS:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def request(self, method: str, headers: _Headers, body: bytes = b"") -> h11.Response:
        """Send, and return the head of the response, past any 1xx."""
        all_headers = [(b"Host", self._address.authority.encode()), *headers]
        if method == "POST":
            all_headers.append((b"Content-Length", str(len(body)).encode()))
        head = h11.Request(method=method, target=self._address.target, headers=all_headers)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self._writer.write(self._http.send(event) or b"")
        with contextlib.suppress(OSError):  # a server may answer and close before it has read all
            await self._writer.drain()
        while True:
            received = self._next_event()
            if isinstance(received, h11.Response):
                return received
            if received is h11.NEED_DATA:
                await self._receive()
            elif isinstance(received, h11.ConnectionClosed):
                raise ConnectionLost(
                    f"{self._address.shown} closed the connection without an answer"
                )

    async def read(self) -> bytes:
        """The next piece of the body, as much as has arrived; b"" at its end."""
        pieces: list[bytes] = []
        while self._http.their_state in (h11.SEND_BODY, h11.ERROR):
            try:
                event = self._next_event()
            except MCPError:
                if pieces:  # what came before it counts; h11 raises again next time
                    break
                raise
            if isinstance(event, h11.Data):
                pieces.append(event.data)
            elif event is h11.NEED_DATA:
                if pieces:
                    break
                await self._receive()
        return b"".join(pieces)

    async def read_all(self) -> bytes:
        body = bytearray()
        while piece := await self.read():
            body += piece
            if len(body) > _MAX_REPLY_BYTES:
                raise ProtocolViolation(f"{self._address.shown} sent too large an answer")
        return bytes(body)

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            if self._reader.at_eof():
                message = f"{self._address.shown} closed the connection in the middle of an answer"
                raise ConnectionLost(message) from None
            what = str(error).partition(":")[0]  # after it come the server's bytes
            raise ProtocolViolation(f"{self._address.shown} broke HTTP ({what})") from None

    async def _receive(self) -> None:
        try:
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        except OSError as error:
            raise ConnectionLost(f"lost {self._address.shown}: {_reason(error)}") from error


def _header(response: h11.Response, name: bytes) -> str:
    for key, value in response.headers:  # h11 gives lower-case names
        if key == name:
            return bytes(value).decode("latin-1")
    return ""


def _retry_after(value: str, now: datetime) -> float | None:
    """Seconds to wait, of a Retry-After header (a number, or a date), at most an hour."""
    if value.isdigit() and value.isascii():
        return float(min(int(value[:9]), 3_600))
    try:
        seconds = (email.utils.parsedate_to_datetime(value) - now).total_seconds()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), 3_600.0)


def _excerpt(text: str, secret: str | None) -> str:
    """A server's words for a message of ours: one line, short, and without the key it may echo."""
    if secret:
        text = text.replace(secret, "***")
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:2_000]).split())
    return text if len(text) <= 300 else text[:299] + "…"


def _refusal(
    response: h11.Response, body: bytes, *, method: str, has_session: bool, secret: str | None
) -> MCPError:
    """What a status other than 2xx means (RFC 9110, and the transport section of MCP)."""
    status = response.status_code
    error = _object(_json_in(body.decode(errors="replace")).get("error"))
    said = _excerpt(str(error.get("message", "")) or body.decode(errors="replace"), secret)
    kind: type[MCPError]
    match status:
        case 401 | 403:
            kind, advice = AuthRejected, "check api_key"
        case 404 if has_session:
            kind, advice = SessionGone, "the server no longer knows this session"
        case 404 if error.get("code") != _METHOD_NOT_FOUND:
            kind, advice = WrongPath, "no MCP server at this path, which is usually /mcp"
        case 405 if method == "GET":
            kind, advice = (
                StreamUnsupported,
                "no event stream: start the server without --stateless",
            )
        case 409 if method == "GET":
            kind, advice = StreamBusy, "the server still holds an earlier stream of this session"
        case 421:
            kind, advice = WrongPath, "the server does not answer to this host name"
        case 429 | 503:
            wait = _retry_after(_header(response, b"retry-after"), datetime.now(UTC))
            return ServerBusy(f"HTTP {status}: the server is busy: {said}", retry_after=wait)
        case _ if 300 <= status < 400:
            kind, advice = Redirected, "a redirect, which is not followed: configure the final URL"
            target = _header(response, b"location").partition("?")[0]  # a query may be secret
            said = _excerpt(re.sub(r"//[^/]*@", "//", target), secret)
        case _:
            return _refused(error, said, status=status)
    return kind(f"HTTP {status}: {advice}" + (f" ({said})" if said else ""))


def _refused(error: Mapping[str, object], said: str, *, status: int) -> RequestRefused:
    code = error.get("code")
    prefix = "" if status == 200 else f"HTTP {status}: "
    return RequestRefused(
        f"{prefix}{said}" + (f" (JSON-RPC error {code})" if error else ""),
        status=status,
        code=code if isinstance(code, int) else None,
        data=error.get("data"),
    )


# ---- Session and stream ----------------------------------------------------

_NAME_AND_VERSION = {"name": "nightcrier", "version": CLIENT_VERSION}
_SUBSCRIPTION_ID = re.compile(r"\bsub-[0-9a-f]+\b")
# Words of a tool's error that no later call will change; a limit or a lost watch is not among them.
_PERMANENT_FAILURES = (
    "unknown tool",
    "require an http/sse transport",
    "invalid subscription filters",
    "invalid mode",
    "oauth token required",
)


def _modern_alternative(error: RequestRefused, requested: str) -> tuple[bool, str | None]:
    """Of a refused initialize: is the server modern-only, and what else would it take?"""
    listed = _object(error.data).get("supported")
    if isinstance(listed, list):
        named = {version for version in listed if isinstance(version, str)}
    else:
        named = set(re.findall(r"\b20\d\d-\d\d-\d\d\b", str(error))) - {requested}
    usable = [version for version in SESSION_PROTOCOLS if version in named]
    no_initialize = error.status == 404 and error.code == _METHOD_NOT_FOUND
    newer = any(version > SESSION_PROTOCOLS[0] for version in named)
    return no_initialize or (newer and not usable), usable[0] if usable else None


class MCPSession:
    """One session with one server: `connect`, `open_stream`, then the calls, at last `close`.

    May also be built with the id and protocol of an earlier run's session, to close or resume it.
    """

    def __init__(
        self,
        endpoint: MCPEndpoint,
        *,
        session_id: str | None = None,
        protocol_version: str | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.session_id = session_id
        self.protocol_version = protocol_version
        self.server_name = ""
        self._key: str | None = None  # as it was sent last, to take it out of what a server says
        self._next_id = 0
        self._answers: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(cls, endpoint: MCPEndpoint, *, within: float = 10.0) -> MCPSession:
        """A session that is initialized; nothing is left open on the server when this fails."""
        session = cls(endpoint)
        try:
            async with _deadline(within, "initialize"):
                await session._initialize()
                await session._post({"method": "notifications/initialized"}, None)
        except BaseException:  # cancelling counts, too
            await session.close()
            raise
        return session

    async def open_stream(
        self, last_event_id: str | None = None, *, within: float = 10.0
    ) -> EventStream:
        """The stream that events come on, once the server has accepted it.

        Subscribe only then: servers drop what happens while there is no stream. `last_event_id`
        asks for what was missed; a server that refuses that gets a second request without it.
        """
        if self.session_id is None:  # the Python SDK grants a stream then, and never sends on it
            raise StreamUnsupported("the server keeps no sessions: start it without --stateless")
        resume = last_event_id if last_event_id and _fits_header(last_event_id) else None
        async with _deadline(within, "opening the event stream"):
            try:
                return await self._get(resume)
            except RequestRefused as error:
                if resume is None or error.status != 400:
                    raise
            return await self._get(None)

    async def set_log_level(self, level: str = "info", *, within: float = 10.0) -> None:
        """Ask for log notifications, which events are; a server without the method sends all."""
        try:
            await self._call("logging/setLevel", {"level": level}, within)
        except RequestRefused as error:
            if error.code != _METHOD_NOT_FOUND:
                raise

    async def call_tool(
        self, name: str, arguments: Mapping[str, object], *, within: float = 30.0
    ) -> str:
        """The text of the result, or `ToolFailed`, or `ToolHung`."""
        params = {"name": name, "arguments": dict(arguments)}
        try:
            result = await self._call("tools/call", params, within)
        except NoAnswer as error:
            raise ToolHung(f"tool {name}: {error}") from None
        except RequestRefused as error:
            if error.code is None or error.status != 200:
                raise
            permanent = error.code in (_METHOD_NOT_FOUND, _INVALID_PARAMS)
            raise ToolFailed(f"tool {name}: {error}", permanent=permanent) from error
        content = result.get("content")
        items = [_object(item) for item in content] if isinstance(content, list) else []
        text = "\n".join(str(item.get("text", "")) for item in items if item.get("type") == "text")
        if result.get("isError") is True:
            said = _excerpt(text, self._key)
            permanent = any(words in text.lower() for words in _PERMANENT_FAILURES)
            raise ToolFailed(f"tool {name}: {said or 'failed'}", permanent=permanent)
        return text

    async def subscribe(self, mode: str, *, within: float = 60.0) -> str:
        """Subscribe to "faults" or "events"; the subscription's id, or "" if the text has none."""
        text = await self.call_tool("events_subscribe", {"mode": mode}, within=within)
        found = _json_in(text).get("subscriptionId")
        if isinstance(found, str):
            return found
        match = _SUBSCRIPTION_ID.search(text)
        return match[0] if match else ""

    async def subscriptions(self, *, within: float = 30.0) -> list[str]:
        """The ids of the subscriptions that the server lists for this session."""
        text = await self.call_tool("events_list_subscriptions", {}, within=within)
        listed = _json_in(text).get("subscriptions")
        if not isinstance(listed, list):
            return _SUBSCRIPTION_ID.findall(text)
        ids = [_object(item).get("subscriptionId") for item in listed]
        return [found for found in ids if isinstance(found, str)]

    async def ping(self, *, within: float = 10.0) -> None:
        """Proof that the process and the session live; it says nothing about the stream."""
        await self._call("ping", None, within)

    async def close(self, *, within: float = 2.0) -> None:
        """End the session on the server, as well as that can be done. Raises no MCPError."""
        answers = list(self._answers)
        for task in answers:
            task.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        if self.session_id is None:
            return
        with contextlib.suppress(MCPError):  # 405 is allowed, 404 means that it is gone already
            async with _deadline(within, "DELETE"):
                with contextlib.closing(await _Connection.open(self.endpoint)) as connection:
                    await connection.request(
                        "DELETE", [*self._headers(), (b"Connection", b"close")]
                    )
        self.session_id = None

    # -- below: how

    async def _initialize(self) -> None:
        requested = SESSION_PROTOCOLS[0]
        try:
            result, session_id = await self._offer(requested)
        except RequestRefused as error:
            modern, alternative = _modern_alternative(error, requested)
            if modern:
                raise ModernOnly(
                    f"the server cannot push events in the MCP revisions that it speaks: {error}"
                ) from error
            if alternative is None or alternative == requested:
                raise
            result, session_id = await self._offer(alternative)
        version = result.get("protocolVersion")
        if version not in SESSION_PROTOCOLS:
            shown = _excerpt(str(version), self._key)
            if isinstance(version, str) and version > SESSION_PROTOCOLS[0]:
                raise ModernOnly(f"the server insists on MCP {shown}, which cannot push events")
            raise ProtocolViolation(f"the server answered with MCP revision {shown}")
        if session_id and not re.fullmatch(rf"[!-~]{{1,{_MAX_ID_BYTES}}}", session_id):
            raise ProtocolViolation("the server gave a session id that cannot be sent back")
        self.protocol_version, self.session_id = str(version), session_id or None
        info = _object(result.get("serverInfo"))
        self.server_name = _excerpt(f"{info.get('name', '')} {info.get('version', '')}", self._key)

    async def _offer(self, version: str) -> tuple[Mapping[str, object], str]:
        params = {
            "protocolVersion": version,
            "capabilities": {},
            "clientInfo": _NAME_AND_VERSION,
        }
        self._next_id += 1
        message = {"id": self._next_id, "method": "initialize", "params": params}
        return await self._post(message, self._next_id)

    async def _call(
        self, method: str, params: Mapping[str, object] | None, within: float
    ) -> Mapping[str, object]:
        self._next_id += 1
        message: dict[str, object] = {"id": self._next_id, "method": method}
        if params is not None:
            message["params"] = params
        async with _deadline(within, method):
            result, _ = await self._post(message, self._next_id)
        return result

    async def _post(
        self, message: Mapping[str, object], request_id: int | None
    ) -> tuple[Mapping[str, object], str]:
        """POST one message; the result of that request, and the session id that came with it."""
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        headers = [
            *self._headers(),
            (b"Content-Type", b"application/json"),
            (b"Accept", b"application/json, text/event-stream"),
            (b"Connection", b"close"),
        ]
        with contextlib.closing(await _Connection.open(self.endpoint)) as connection:
            response = await connection.request("POST", headers, body)
            await self._check(connection, response, "POST")
            session_id = _header(response, b"mcp-session-id")
            if request_id is None:
                return {}, session_id
            reply = await self._reply(connection, response, request_id)
        if (error := _object(reply.get("error"))) or "result" not in reply:
            raise _refused(error, _excerpt(str(error.get("message")), self._key), status=200)
        return _object(reply["result"]), session_id

    async def _reply(
        self, connection: _Connection, response: h11.Response, request_id: int
    ) -> Mapping[str, object]:
        """The message that answers `request_id`, out of a JSON body or an SSE stream."""
        batches = self.protocol_version in BATCH_PROTOCOLS
        streamed = _media_type(response) == "text/event-stream"
        parser = SSEParser(_MAX_REPLY_BYTES)
        while piece := await (connection.read() if streamed else connection.read_all()):
            texts = [event.data for event in parser.feed(piece)] if streamed else [_decoded(piece)]
            for text in filter(None, texts):
                try:
                    messages = _parse_messages(text, batches=batches)
                except ValueError as error:
                    raise ProtocolViolation(f"the server answered with {error}") from None
                for message in messages:
                    if message.get("id") == request_id and message.keys() & {"result", "error"}:
                        return message
                    self._answer(message)
        raise ConnectionLost("the server ended its answer without a result")

    async def _get(self, last_event_id: str | None) -> EventStream:
        headers = [*self._headers(), (b"Accept", b"text/event-stream")]
        if last_event_id is not None:
            headers.append((b"Last-Event-ID", last_event_id.encode()))
        connection = await _Connection.open(self.endpoint)
        try:
            connection.keep_alive()
            response = await connection.request("GET", headers)
            await self._check(connection, response, "GET")
            if _media_type(response) != "text/event-stream":
                if await connection.read():
                    raise ProtocolViolation(
                        "the server answered GET with something else than events"
                    )
                raise ConnectionLost(
                    f"HTTP {response.status_code}: the server sent no event stream"
                )
        except BaseException:
            connection.close()
            raise
        return EventStream(self, connection, last_event_id)

    async def _check(self, connection: _Connection, response: h11.Response, method: str) -> None:
        """Raise what the status means, unless it is a success."""
        if not 200 <= response.status_code < 300:
            body = b""
            with contextlib.suppress(MCPError):  # the status says enough
                body = await connection.read_all()
            raise _refusal(
                response,
                body,
                method=method,
                has_session=self.session_id is not None,
                secret=self._key,
            )
        if _header(response, b"content-encoding") not in ("", "identity"):
            raise ProtocolViolation("the server compresses its answer although it was asked not to")

    def _headers(self) -> _Headers:
        headers = [
            (b"User-Agent", f"nightcrier/{CLIENT_VERSION}".encode()),
            (b"Accept-Encoding", b"identity"),
        ]
        self._key = _usable_key(self.endpoint)
        if self._key is not None:
            headers.append((b"Authorization", b"Bearer " + self._key.encode()))
        if self.session_id is not None:
            headers.append((b"Mcp-Session-Id", self.session_id.encode()))
        if self.protocol_version is not None:
            headers.append((b"MCP-Protocol-Version", self.protocol_version.encode()))
        return headers

    def _answer(self, message: Mapping[str, object]) -> None:
        """Answer a request of the server: ping, and nothing else. Never waits, never piles up."""
        request_id, method = message.get("id"), message.get("method")
        if not isinstance(method, str) or not isinstance(request_id, (int, str)):
            return
        if len(self._answers) >= _MAX_ANSWERS:
            return
        answer: dict[str, object] = {"id": request_id, "result": {}}
        if method != "ping":
            error = {"code": _METHOD_NOT_FOUND, "message": "nightcrier has no such method"}
            answer = {"id": request_id, "error": error}
        task = asyncio.create_task(self._send_answer(answer), name=f"answer {method[:40]}")
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _send_answer(self, answer: Mapping[str, object]) -> None:
        with contextlib.suppress(MCPError):  # a server that misses it will ask again, or hang up
            async with _deadline(10.0, "answering the server"):
                await self._post(answer, None)


async def look_at(endpoint: MCPEndpoint) -> str:
    """What answers there, for people; raises MCPError if no stream can be had from it."""
    session = await MCPSession.connect(endpoint)
    try:
        stream = await session.open_stream()
        await stream.aclose()
    finally:
        await session.close()
    return f"{session.server_name or 'server'}, protocol {session.protocol_version}, stream ok"


def _media_type(response: h11.Response) -> str:
    return _header(response, b"content-type").partition(";")[0].strip().lower()


def _decoded(body: bytes) -> str:
    return body.decode("utf-8-sig", errors="replace")


def _usable_key(endpoint: MCPEndpoint) -> str | None:
    """The key as it is now. Checked here: h11 would show it in its complaint."""
    try:
        key = (endpoint.api_key() or "").strip()
    except (OSError, ValueError) as error:
        raise AuthRejected(f"cannot read the API key ({type(error).__name__})") from None
    if not re.fullmatch(r"[!-~]*", key):
        raise AuthRejected("the API key has characters that do not fit into a header")
    return key or None


def _fits_header(event_id: str) -> bool:
    return event_id.isprintable() and event_id == event_id.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMessage:
    """A log notification's `params`, or the `problem` that kept it from being read, or both.

    `event_id` names this one message, and is None unless the server numbers its events.
    """

    params: Mapping[str, object] | None = None
    event_id: str | None = None
    problem: str | None = None


class EventStream:
    """The log notifications of one GET stream, as they are asked for. Ends with an MCPError.

    Bytes are read from the socket only while somebody waits for the next message, so a slow
    consumer slows the server down instead of filling memory. Cancelling a wait loses nothing.
    """

    def __init__(
        self, session: MCPSession, connection: _Connection, last_event_id: str | None
    ) -> None:
        self._session, self._connection = session, connection
        self._parser = SSEParser()
        self._fed = False
        self._ready: Iterator[StreamMessage] = iter(())
        self.resumed = last_event_id is not None  # the server took a Last-Event-ID
        self.last_event_id = last_event_id  # of the last event handed out, not of the last received
        self.retry_ms: int | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamMessage:
        while (message := next(self._ready, None)) is None:
            try:
                piece = await self._connection.read()
                if not piece and self.resumed and not self._fed:
                    raise ResumeFailed("the server ended the resumed event stream at once")
                if not piece:
                    raise ConnectionLost("the server closed the event stream")
            except MCPError:
                self._connection.close()
                raise
            self._fed = True
            self._ready = self._understand(self._parser.feed(piece))
        return message

    async def aclose(self) -> None:
        self._connection.close()
        await asyncio.sleep(0)  # asyncio closes the socket one turn of its loop later

    def _understand(self, events: Iterable[SSEEvent]) -> Iterator[StreamMessage]:
        for event in events:
            if event.retry_ms is not None:
                self.retry_ms = event.retry_ms
            if event.id is not None:
                self.last_event_id = event.id or None  # an empty id takes the last one back
            if event.problem is not None and not event.data:
                yield StreamMessage(event_id=event.id or None, problem=event.problem)
            elif event.data and event.type == "message":
                yield from self._understand_data(event)

    def _understand_data(self, event: SSEEvent) -> Iterator[StreamMessage]:
        batches = self._session.protocol_version in BATCH_PROTOCOLS
        event_id = event.id or None
        try:
            messages = _parse_messages(event.data, batches=batches)
        except ValueError as error:
            yield StreamMessage(event_id=event_id, problem=str(error))
            return
        for position, message in enumerate(messages):
            if position and event_id:  # a batch shares one id, and its messages are no repetitions
                event_id = f"{event.id}#{position}"
            method, params = message.get("method"), message.get("params")
            if method == "notifications/message" and isinstance(params, dict):
                yield StreamMessage(params=params, event_id=event_id, problem=event.problem)
            elif method == "notifications/message":
                problem = "a log notification without params"
                yield StreamMessage(event_id=event_id, problem=problem)
            elif isinstance(method, str):
                self._session._answer(message)
            elif not message.keys() & {"result", "error"}:
                problem = "JSON that is not a JSON-RPC message"
                yield StreamMessage(event_id=event_id, problem=problem)


# ============================================================================
# 2. HTTP server
# Small, with a limit on every size and time, and without leftovers.
# ============================================================================

_CHUNK_BYTES = 16_384
_IDLE_SECONDS = 30.0  # from one request to the next, on one connection


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, IPv6 hosts in brackets, to its parts; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPRequest:
    """A request that has arrived as a whole."""

    method: str
    path: str  # decoded, without the query
    query: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class HTTPResponder:
    """What a handler answers with: `send`, or `start`, any number of `write`, and `finish`."""

    def __init__(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._http, self._reader, self._writer = http, reader, writer
        self.without_body = False  # the request was a HEAD
        self.write_seconds = 10.0  # for the peer to take what was written

    @property
    def transport(self) -> asyncio.WriteTransport:
        return self._writer.transport

    @property
    def started(self) -> bool:
        return self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    async def send(
        self,
        status: int,
        body: str | bytes = b"",
        *,
        content_type: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A whole response."""
        data = body.encode() if isinstance(body, str) else body
        fields = {"Content-Length": str(len(data)), **(headers or {})}
        if data:
            fields["Content-Type"] = content_type
        self._send_head(status, fields)
        if data and not self.without_body:
            self._send(h11.Data(data=data))
        await self.finish()

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """The head of a response whose body follows in pieces."""
        self._send_head(status, headers)
        await self.drain()

    def write(self, data: bytes) -> bool:
        """One piece of the body; False when the connection is gone."""
        if self.transport.is_closing():
            return False
        self._send(h11.Data(data=data))
        return True

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        async with asyncio.timeout(self.write_seconds):
            await self._writer.drain()

    async def finish(self) -> None:
        self._send(h11.EndOfMessage())
        await self.drain()

    async def peer_closed(self) -> None:
        """Wait until the peer has closed the connection."""
        with contextlib.suppress(OSError):
            while await self._reader.read(_CHUNK_BYTES):
                pass

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        reason = HTTPStatus(status).phrase
        fields = list(headers.items())
        self._send(h11.Response(status_code=status, headers=fields, reason=reason))

    def _send(self, event: h11.Event) -> None:
        self._writer.write(self._http.send(event) or b"")


HTTPHandler = Callable[[HTTPRequest, HTTPResponder], Awaitable[None]]


class _BadRequest(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(HTTPStatus(status).phrase)
        self.status = status


class HTTPServer:
    """Passes each request to `handler`, once it is complete."""

    def __init__(
        self,
        handler: HTTPHandler,
        *,
        max_body_bytes: int = 65_536,
        receive_seconds: float = 10.0,
    ) -> None:
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._receive_seconds = receive_seconds
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None
    ) -> tuple[str, int]:
        """Listen, on a free port if `port` is 0; the address and port that were taken."""
        self._server = await asyncio.start_server(self._accept, host, port, ssl=tls)
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def close(self) -> None:
        """Stop listening, and end every connection, busy ones too."""
        if self._server is None:
            return
        self._server.close()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="http connection")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=65_536)
        try:
            while await self._serve_one(http, reader, writer):
                http.start_next_cycle()
        except (OSError, h11.LocalProtocolError):  # the peer has gone, or takes nothing any more
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                async with asyncio.timeout(1.0):  # to flush; a peer that hangs must not hold us
                    await writer.wait_closed()
            writer.transport.abort()

    async def _serve_one(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Serve one request; whether another may follow on the connection."""
        responder = HTTPResponder(http, reader, writer)
        try:
            request = await self._receive(http, reader, writer)
        except _BadRequest as error:
            await responder.send(error.status, str(error), headers={"Connection": "close"})
            if writer.can_write_eof():
                writer.write_eof()
            async with asyncio.timeout(1.0):  # closing on unread bytes could take the answer back
                await responder.peer_closed()
            return False
        if request is None:
            return False
        responder.without_body = request.method == "HEAD"
        try:
            await self._handler(request, responder)
        except Exception as error:
            if responder.started and isinstance(error, (OSError, h11.LocalProtocolError)):
                log.debug("a response was not taken: %s", error, extra={"path": request.path})
                return False
            log.exception("a request failed", extra={"path": request.path})
            if responder.started:
                return False
            await responder.send(500, "Internal Server Error")
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _receive(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> HTTPRequest | None:
        """The next request; None when the peer has no further one."""
        if not http.trailing_data[0]:  # else a pipelined request is here already
            try:
                async with asyncio.timeout(_IDLE_SECONDS):
                    first = await reader.read(_CHUNK_BYTES)
            except TimeoutError:
                return None
            if not first:
                return None
            http.receive_data(first)
        try:
            async with asyncio.timeout(self._receive_seconds):
                return await self._receive_rest(http, reader, writer)
        except TimeoutError:
            raise _BadRequest(408) from None
        except h11.RemoteProtocolError as error:
            raise _BadRequest(error.error_status_hint) from None

    async def _receive_rest(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> HTTPRequest | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    writer.write(http.send(go_on) or b"")
                http.receive_data(await reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._max_body_bytes:
                    raise _BadRequest(413)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return _request(head, bytes(body))
            else:
                return None


def _request(head: h11.Request, body: bytes) -> HTTPRequest:
    path, _, query = head.target.decode("latin-1").partition("?")
    headers: dict[str, str] = {}
    for name, value in head.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return HTTPRequest(
        method=head.method.decode("latin-1"),
        path=urllib.parse.unquote(path),
        query=query,
        headers=headers,
        body=body,
    )


# ============================================================================
# 3. Simulated cluster
# It does what a real server was seen to do its faults included.
# ============================================================================

_SESSION_SUBSCRIPTIONS = 10
_SERVER_SUBSCRIPTIONS = 100
_TOOLS = ("events_subscribe", "events_unsubscribe", "events_list_subscriptions")
_API_VERSIONS = {"Deployment": "apps/v1", "Job": "batch/v1"}
_EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache, no-transform"}

JSONObject = dict[str, object]


def fault_id(cluster: str, fault_type: str, uid: str, container: str) -> str:
    """The server's fingerprint of a fault: the same fault of the same object has the same one."""
    return hashlib.sha256(f"{cluster}:{fault_type}:{uid}:{container}".encode()).digest()[:8].hex()


def simulated_fault(
    cluster: str,
    *,
    fault_type: str,
    kind: str,
    namespace: str,
    name: str,
    severity: str,
    context: str,
    container: str = "app",
) -> JSONObject:
    """The `data` of a fault notification, without the subscription that it will go out under."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{cluster}/{kind}/{namespace}/{name}"))
    resource = {"apiVersion": _API_VERSIONS.get(kind, "v1"), "kind": kind, "name": name}
    if kind != "Node":
        resource["namespace"] = namespace
    return {
        "cluster": cluster,
        "faultId": fault_id(cluster, fault_type, uid, container),
        "faultType": fault_type,
        "severity": severity,
        "resource": {**resource, "uid": uid},
        "context": context,
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


@dataclass(slots=True, kw_only=True)
class SimulatedSession:
    """A client's session. A cancelled subscription is no longer listed, yet goes on sending."""

    session_id: str
    stream: HTTPResponder | None = None
    wants_logs: bool = False  # logging/setLevel was called
    listed: dict[str, JSONObject] = field(default_factory=dict)
    sending: dict[str, str] = field(default_factory=dict)  # subscription id: mode


class _ToolError(Exception):
    """Becomes a tool result with isError."""


class _RPCError(Exception):
    """Becomes a JSON-RPC error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class SimulatedCluster:
    """An events-capable kubernetes-mcp-server, as far as its clients can tell.

    Faults reach only a stream that is open. One that does not is lost, and cancels the subscription
    that it was for, which then is unlisted but sends again as soon as there is a stream.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sessions: dict[str, SimulatedSession] = {}

    async def handle(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        """Answer one request to this cluster's MCP endpoint."""
        handlers = {"POST": self.handle_post, "GET": self.handle_get, "DELETE": self.handle_delete}
        handler = handlers.get(request.method)
        if handler is None:
            await respond.send(405, "Method Not Allowed\n", headers={"Allow": "GET, POST, DELETE"})
            return
        await handler(request, respond)

    def emit(self, fault: Mapping[str, object]) -> bool:
        """Let a fault happen; whether a client was there to be told."""
        reached = False
        for session in self.sessions.values():
            for subscription_id, mode in session.sending.items():
                if mode == "faults":
                    data = {"subscriptionId": subscription_id, **fault}
                    reached |= self._send_log(session, subscription_id, data)
        return reached

    def drop_streams(self) -> None:
        """Cut the connection of every open stream; the sessions stay."""
        for session in self.sessions.values():
            if session.stream is not None:
                session.stream.abort()
                session.stream = None

    # -- HTTP

    async def handle_post(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        if not request.headers.get("content-type", "").startswith("application/json"):
            await respond.send(415, "Content-Type must be 'application/json'\n")
            return
        accept = request.headers.get("accept", "")
        if "application/json" not in accept or "text/event-stream" not in accept:
            await respond.send(400, "Accept must contain application/json and text/event-stream\n")
            return
        try:
            message = json.loads(request.body)
            method, params = message.get("method"), message.get("params") or {}
        except (ValueError, AttributeError):
            await respond.send(400, "malformed payload\n")
            return
        if method == "initialize":
            session = SimulatedSession(
                session_id=base64.b32encode(secrets.token_bytes(17)).decode()[:26]
            )
            self.sessions[session.session_id] = session
        elif (found := await self._session(request, respond)) is not None:
            session = found
        else:
            return
        if method is None or "id" not in message:  # an answer, or a notification
            await respond.send(202)
            return
        reply = await self.reply(session, str(method), params)
        headers = {**_EVENT_STREAM, "Mcp-Session-Id": session.session_id}
        await respond.start(200, headers)
        respond.write(sse_message({"jsonrpc": "2.0", "id": message["id"], **reply}))
        await respond.finish()

    async def handle_get(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        session = await self._session(request, respond)
        if session is None:
            return
        if "last-event-id" in request.headers:
            await respond.send(400, "stream replay unsupported\n")
            return
        if session.stream is not None:
            await respond.send(409, "stream ID conflicts with ongoing stream\n")
            return
        session.stream = respond
        try:
            await respond.start(200, {**_EVENT_STREAM, "Mcp-Session-Id": session.session_id})
            await respond.peer_closed()
        finally:
            if session.stream is respond:
                session.stream = None

    async def handle_delete(self, request: HTTPRequest, respond: HTTPResponder) -> None:
        session = await self._session(request, respond)
        if session is None:
            return
        del self.sessions[session.session_id]
        if session.stream is not None:
            with contextlib.suppress(OSError, h11.LocalProtocolError):  # its client left first
                await session.stream.finish()
        await respond.send(204)

    async def _session(
        self, request: HTTPRequest, respond: HTTPResponder
    ) -> SimulatedSession | None:
        session = self.sessions.get(request.headers.get("mcp-session-id", ""))
        if session is None:
            await respond.send(404, "session not found\n")
        return session

    # -- JSON-RPC

    async def reply(
        self, session: SimulatedSession, method: str, params: Mapping[str, object]
    ) -> JSONObject:
        """The `result` or the `error` for one request."""
        try:
            return {"result": self._result(session, method, params)}
        except _RPCError as error:
            return {"error": {"code": error.code, "message": str(error)}}

    def _result(
        self, session: SimulatedSession, method: str, params: Mapping[str, object]
    ) -> JSONObject:
        if method == "initialize":
            return {
                "capabilities": {"logging": {}, "tools": {"listChanged": True}},
                "protocolVersion": "2025-11-25",
                "serverInfo": {"name": "kubernetes-mcp-server", "version": "simulated"},
            }
        if method == "ping":
            return {}
        if method == "logging/setLevel":
            session.wants_logs = True
            return {}
        if method == "tools/list":
            return {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in _TOOLS]}
        if method != "tools/call":
            raise _RPCError(-32601, f'method not found: "{method}"')
        arguments = params.get("arguments")
        try:
            text = self.call_tool(
                session, str(params.get("name")), arguments if isinstance(arguments, dict) else {}
            )
        except _ToolError as error:
            return {"content": [{"type": "text", "text": str(error)}], "isError": True}
        return {"content": [{"type": "text", "text": text}]}

    def call_tool(
        self, session: SimulatedSession, name: str, arguments: Mapping[str, object]
    ) -> str:
        if name == "events_subscribe":
            return self._subscribe(session, str(arguments.get("mode") or "events"))
        if name == "events_unsubscribe":
            return self._unsubscribe(session, str(arguments.get("subscriptionId")))
        if name == "events_list_subscriptions":
            listed = list(session.listed.values())
            text = json.dumps({"subscriptions": listed, "total": len(listed)}, indent=2)
            return f"# Active Subscriptions\n\n{text}"
        raise _RPCError(-32602, f'unknown tool "{name}"')

    def _subscribe(self, session: SimulatedSession, mode: str) -> str:
        problem = None
        if mode not in ("events", "faults"):
            problem = f"invalid mode: {mode}"
        elif len(session.listed) >= _SESSION_SUBSCRIPTIONS:
            problem = f"session has reached maximum subscriptions ({_SESSION_SUBSCRIPTIONS})"
        elif sum(len(other.listed) for other in self.sessions.values()) >= _SERVER_SUBSCRIPTIONS:
            problem = f"server has reached maximum subscriptions ({_SERVER_SUBSCRIPTIONS})"
        if problem is not None:
            raise _ToolError(f"failed to create subscription: {problem}")
        subscription_id = f"sub-{secrets.token_hex(4)}"
        subscription: JSONObject = {
            "cluster": self.name,
            "createdAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "filters": {},
            "mode": mode,
            "subscriptionId": subscription_id,
        }
        session.listed[subscription_id] = {**subscription, "degraded": False}
        session.sending[subscription_id] = mode
        text = json.dumps({**subscription, "status": "active"}, indent=2, sort_keys=True)
        return (
            f"# Event Subscription Created\n\n{text}\n\n"
            "You will receive event notifications via the logging/message protocol."
        )

    def _unsubscribe(self, session: SimulatedSession, subscription_id: str) -> str:
        if session.listed.pop(subscription_id, None) is None:
            raise _ToolError(
                f"failed to cancel subscription: subscription {subscription_id} not found"
            )
        result = {"cancelled": True, "status": "success", "subscriptionId": subscription_id}
        return f"# Subscription Cancelled\n\n{json.dumps(result, indent=2)}"

    def _send_log(self, session: SimulatedSession, subscription_id: str, data: JSONObject) -> bool:
        if not session.wants_logs:
            return False
        params = {"data": data, "level": "warning", "logger": "kubernetes/faults"}
        notification = {"jsonrpc": "2.0", "method": "notifications/message", "params": params}
        if session.stream is not None and session.stream.write(sse_message(notification)):
            return True
        session.listed.pop(subscription_id, None)
        return False


def sse_message(message: Mapping[str, object]) -> bytes:
    return b"event: message\ndata: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"


def simulated_clusters(clusters: Iterable[SimulatedCluster]) -> HTTPHandler:
    """Serves each cluster at /<its name>/mcp."""
    by_path = {f"/{cluster.name}/mcp": cluster for cluster in clusters}

    async def handle(request: HTTPRequest, respond: HTTPResponder) -> None:
        if (cluster := by_path.get(request.path)) is not None:
            await cluster.handle(request, respond)
        else:
            await respond.send(404, "404 page not found\n")

    return handle


Script = Sequence[tuple[str, ...]]
Say = Callable[[Mapping[str, Any]], None]


async def _simulate(script: Script, say: Say, gone: asyncio.Event) -> None:
    """Be the clusters of a script, play it, and tell the parent process of each fault sent."""
    clusters = {step[0]: SimulatedCluster(step[0]) for step in script}
    server = HTTPServer(simulated_clusters(clusters.values()), max_body_bytes=1_000_000)
    _, port = await server.start("127.0.0.1", 0)
    say({"port": port})
    playing = asyncio.create_task(_play(script, clusters, say))
    await gone.wait()
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    await server.close()


async def _play(script: Script, clusters: Mapping[str, SimulatedCluster], say: Say) -> None:
    for name, *fields in script:
        cluster = clusters[name]
        await _listener(cluster)
        if not fields:
            cluster.drop_streams()
            say({"cut": name})
            continue
        keys = ("fault_type", "kind", "namespace", "name", "severity", "context")
        fault = simulated_fault(name, **dict(zip(keys, fields, strict=True)))
        while not cluster.emit(fault):
            await _listener(cluster)
        say({"fault": fault})
        await asyncio.sleep(0.3)
    say({"end": True})


async def _listener(cluster: SimulatedCluster) -> None:
    """Wait until somebody would be told of a fault."""
    while True:
        if any(s.stream and s.wants_logs and s.sending for s in cluster.sessions.values()):
            return
        await asyncio.sleep(0.02)


class Simulation:
    """Simulated clusters in a child process, which ends with this one.

    A step of the script is (cluster, fault type, kind, namespace, name, severity, context), or
    only a cluster, whose connections are cut. A step waits until somebody listens.

    Must be made before the process has threads or an event loop: it forks.
    """

    def __init__(self, script: Script) -> None:
        self._from_child, to_parent = os.pipe()
        from_parent, self._to_child = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._from_child)
            os.close(self._to_child)
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
                asyncio.run(self._child(script, from_parent, to_parent))
                status = 0
            finally:
                os._exit(status)
        os.close(to_parent)
        os.close(from_parent)
        self._lines = os.fdopen(self._from_child, "rb", buffering=0)
        self.port: int = json.loads(self._lines.readline())["port"]

    @staticmethod
    async def _child(script: Script, from_parent: int, to_parent: int) -> None:
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(from_parent, gone.set)

        def say(message: Mapping[str, Any]) -> None:
            os.write(to_parent, json.dumps(message).encode() + b"\n")

        await _simulate(script, say, gone)

    def url(self, cluster: str) -> str:
        return f"http://127.0.0.1:{self.port}/{cluster}/mcp"

    async def messages(self) -> AsyncIterator[Mapping[str, Any]]:
        """What happens, as it happens; ends after the last fault."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._lines
        )
        with contextlib.closing(transport):
            async for line in reader:
                message = json.loads(line)
                if "end" in message:
                    return
                yield message

    def close(self) -> None:
        os.close(self._to_child)
        os.waitpid(self._pid, 0)
        self._lines.close()
