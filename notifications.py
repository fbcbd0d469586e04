"""Messages for people, and how they are sent; nothing here knows of incidents.

1. Text: what came from outside becomes harmless for Slack, and fits.
2. Slack: messages in Block Kit, made of plain values.
3. Webhook: the same values as JSON, signed.
4. Sending: one request, within a time and a size, to the address that was looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import functools
import hashlib
import hmac
import ipaddress
import json
import os
import re
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import h11

JSONObject = dict[str, Any]

# ============================================================================
# 1. Text
# Slack reads &, < and > as its own, and some marks as formatting. Neither is for untrusted text.
# ============================================================================


# Control characters, what turns or hides text, and what is no character at all.
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]+"
)
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_IN_CODE = str.maketrans({**_ENTITIES, "`": "'"})
# Marks of formatting that are not part of a word become others that look alike.
_IN_PROSE = str.maketrans({**_ENTITIES, "`": "'", "*": "∗", "~": "∼"})
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.{1,500}?)(?<=\S)\1")
_LOOSE_UNDERSCORE = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")


def plain(value: object) -> str:
    """One line of a value from outside, without anything that cannot be seen."""
    return " ".join(_UNSEEN.sub(" ", str(value if value is not None else "")).split())


def cut(shown: str, limit: int) -> str:
    """At most so many characters of escaped text; no escape is cut in two."""
    if len(shown) <= limit:
        return shown
    return re.sub(r"&[a-z]{0,4}$", "", shown[: limit - 1]) + "…"


def code(value: object, limit: int = 200) -> str:
    """A value as inline code of Slack: nothing in it is a link, a mention or formatting."""
    text = plain(value).translate(_IN_CODE)
    return f"`{cut(text, limit)}`" if text else "–"


def prose(value: object, limit: int = 1500) -> str:
    """Sentences from outside as text of Slack, without their formatting."""
    text = _EMPHASIS.sub(r"\2", plain(value))
    return cut(_LOOSE_UNDERSCORE.sub("\u02cd", text).translate(_IN_PROSE), limit)


def _time_of(value: object) -> datetime | None:
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(str(value)).astimezone(UTC)
    return None


def clock(value: object) -> str:
    """A stored time for people."""
    moment = _time_of(value)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else "–"


def duration(began: object, ended: object) -> str:
    """The time between two stored times, as `1h 02m 03s`."""
    first, last = _time_of(began), _time_of(ended)
    if first is None or last is None:
        return "–"
    minutes, seconds = divmod(max(0, round((last - first).total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m {seconds:02}s"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"


# ============================================================================
# 2. Slack
# Limits are Slack's: header 150, text 3000, ten fields of 2000, 50 blocks, URL of a button 3000.
# ============================================================================


_GOOD, _WARNING = "#2eb886", "#daa038"
_URL_LIMIT = 3000
_REASONS_SHOWN = 3


def _mrkdwn(text: str) -> JSONObject:
    """Text that Slack formats; `verbatim`: bare addresses and names in it stay as they are."""
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def _fields(labelled: Mapping[str, str]) -> JSONObject:
    fields = [_mrkdwn(f"*{label}*\n{text}") for label, text in labelled.items()]
    return {"type": "section", "fields": fields}


def _context(text: str) -> JSONObject:
    return {"type": "context", "elements": [_mrkdwn(text)]}


def _message(
    title: str, summary: str, blocks: Sequence[JSONObject], colour: str, footer: str
) -> JSONObject:
    """`summary` is what a phone shows; the footer has the colour beside it."""
    header = {"type": "header", "text": {"type": "plain_text", "text": title, "emoji": True}}
    attachment = {"color": colour, "blocks": [_context(footer)]}
    return {"text": summary, "blocks": [header, *blocks], "attachments": [attachment]}


def _is_web(url: str | None) -> bool:
    """Whether a button may lead there: Slack refuses a message with any other."""
    return bool(url and len(url) <= _URL_LIMIT and re.fullmatch(r"https?://[!-~]+", url))


def _incident(values: Mapping[str, Any], report_url: str | None) -> JSONObject:
    names = (values.get("resource_kind"), values.get("resource_name"))
    resource = "/".join(plain(name) for name in names if name)
    confidence = values.get("confidence")
    sure = f" ({prose(confidence, 20)} confidence)" if confidence else ""
    cause = prose(values.get("root_cause")) or "See the report."
    took = duration(values.get("started_at"), values.get("completed_at"))
    blocks = [
        _fields(
            {
                "Cluster": code(values.get("cluster")),
                "Namespace": code(values.get("resource_namespace")),
                "Resource": code(resource),
                "Reason": code(values.get("fault_type")),
            }
        ),
        {"type": "section", "text": _mrkdwn(f"*Root Cause{sure}*\n{cause}")},
        _context(f"Incident ID: {code(values.get('incident_id'))} | Duration: {took}"),
    ]
    place = ":".join(plain(values[key]) for key in ("host", "workspace") if values.get(key))
    footer = f"Report: {code(place, 500)}" if place else "Report: in the database"
    if report_url is not None and _is_web(report_url):
        label = {"type": "plain_text", "text": "View Report"}
        button = {"type": "button", "text": label, "url": report_url}
        blocks.append({"type": "actions", "elements": [button]})
    summary = f"{prose(values.get('fault_type'), 100)} in {prose(values.get('cluster'), 100)}"
    title = ":white_check_mark: Kubernetes Incident Triage"
    return _message(title, f"{summary}: {cut(cause, 300)}", blocks, _GOOD, footer)


def _degraded(values: Mapping[str, Any]) -> JSONObject:
    first, last = values.get("first_failure_at"), values.get("last_failure_at")
    count = int(values.get("failures") or 0)
    reasons = list(values.get("reasons") or ())[:_REASONS_SHOWN]
    shown = "\n".join(f"• {prose(reason, 500) or '–'}" for reason in reasons)
    blocks = [
        _fields({"Failure Count": str(count), "Time Window": duration(first, last)}),
        {"type": "section", "text": _mrkdwn(f"*Sample Failure Reasons*\n{shown or '–'}")},
        _context(f"First failure: {clock(first)} | Last failure: {clock(last)}"),
    ]
    summary = f"AI agent system degraded: {count} investigations in a row failed"
    footer = "Single failures are not told: they are in the database."
    return _message(":warning: AI Agent System Degraded", summary, blocks, _WARNING, footer)


def _recovered(values: Mapping[str, Any]) -> JSONObject:
    first, back = values.get("first_failure_at"), values.get("recovered_at")
    count = int(values.get("failures") or 0)
    blocks = [
        _fields({"Total Downtime": duration(first, back), "Total Failures": str(count)}),
        _context(f"First failure: {clock(first)} | Recovered: {clock(back)}"),
    ]
    summary = f"AI agent system recovered after {count} failures"
    footer = "Investigations succeed again."
    return _message(":white_check_mark: AI Agent System Recovered", summary, blocks, _GOOD, footer)


def _other(kind: str, values: Mapping[str, Any]) -> JSONObject:
    text = prose(values.get("text")) or "–"
    blocks = [{"type": "section", "text": _mrkdwn(text)}]
    return _message("nightcrier", cut(text, 300), blocks, _GOOD, f"Kind: {code(kind)}")


def slack_message(
    kind: str, values: Mapping[str, Any], report_url: str | None = None
) -> JSONObject:
    """What Slack is sent for an `incident`, for `degraded`, for `recovered`, or for any `text`."""
    if kind == "incident":
        return _incident(values, report_url)
    if kind == "degraded":
        return _degraded(values)
    if kind == "recovered":
        return _recovered(values)
    return _other(kind, values)


# ============================================================================
# 3. Webhook
# A receiver checks the signature, refuses old timestamps, and knows a repetition by the id.
# ============================================================================


ID_HEADER = "X-Nightcrier-Id"
TIMESTAMP_HEADER = "X-Nightcrier-Timestamp"
SIGNATURE_HEADER = "X-Nightcrier-Signature"


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 over `timestamp.body`."""
    signed = timestamp.encode() + b"." + body
    return "sha256=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def webhook_headers(
    notification_id: str, body: bytes, *, secret: str | None, now: float
) -> dict[str, str]:
    """What a receiver needs to trust a request; unsigned without a secret."""
    timestamp = str(int(now))
    headers = {ID_HEADER: notification_id, TIMESTAMP_HEADER: timestamp}
    if secret:
        headers[SIGNATURE_HEADER] = signature(secret, timestamp, body)
    return headers


# ============================================================================
# 4. Sending
# No redirect is followed and no proxy asked: the connection goes to the address that was checked.
# ============================================================================


TIMEOUT = 10.0  # seconds for all of it: name, connection, request and answer
_EXCERPT_BYTES = 2_000
_HEAD_BYTES = 16_384
_LONGEST_WAIT = 3_600.0

# What answers here hands out credentials of the machine, or is no receiver of anything.
_METADATA = [
    ipaddress.ip_network(text)
    for text in (
        *("169.254.0.0/16", "fe80::/10"),  # link-local: metadata services of nearly all clouds
        *("fd00:ec2::/32", "fd20:ce::/64", "fd00:c1::a9fe:a9fe/128"),  # AWS, Google, Oracle
        *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),  # Alibaba, Azure, Oracle
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class SendFailed(Exception):
    """Nobody is known to have been told; the message holds no secret and no path.

    `permanent`: the receiver will refuse it again. `said` is what it answered, as it came.
    """

    def __init__(
        self,
        message: str,
        *,
        permanent: bool = False,
        retry_after: float | None = None,
        said: str = "",
    ) -> None:
        self.permanent = permanent
        self.retry_after = retry_after
        self.said = said
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """Where messages are sent. Its URL is a secret: whoever has it can write there."""

    url: str = field(repr=False)
    allow_link_local: bool = False

    @property
    def shown(self) -> str:
        """Host and port, for people."""
        return _authority(self.url)

    async def post(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Send JSON; returns when the receiver has accepted it, or raises SendFailed."""
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._post(body, headers)
        except TimeoutError:
            raise SendFailed(f"{self.shown}: no answer within {TIMEOUT:g} seconds") from None
        except ssl.SSLCertVerificationError as error:
            reason = f"its certificate is not trusted ({error.verify_message})"
            raise SendFailed(f"{self.shown}: {reason}") from None
        except h11.ProtocolError:
            raise SendFailed(f"{self.shown}: the answer is not HTTP") from None
        except UnicodeError:  # of getaddrinfo: a part of the name is empty or too long
            raise SendFailed(f"{self.shown}: no host can have this name") from None
        except OSError as error:
            raise SendFailed(f"{self.shown}: {_reason(error)}") from None

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> None:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        sock = await _connect(await self._addresses(host, port))
        tls = _tls() if parts.scheme == "https" else None
        try:
            reader, writer = await asyncio.open_connection(
                sock=sock, ssl=tls, server_hostname=host if tls else None
            )
        except BaseException:
            sock.close()
            raise
        try:
            status, retry_after, said = await _exchange(
                reader, writer, _request(self.url, body, headers), body
            )
        finally:
            writer.transport.abort()  # a peer that is stuck could hold a graceful closing
        if not 200 <= status < 300:
            raise SendFailed(
                f"{self.shown}: HTTP {status}" + (_REDIRECTED if 300 <= status < 400 else ""),
                permanent=400 <= status < 500 and status not in (408, 429),
                retry_after=retry_after,
                said=said,
            )

    async def _addresses(self, host: str, port: int) -> list[Any]:
        """What the name stands for, as getaddrinfo has it, without what must not be reached."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if self.allow_link_local:
            return found
        if allowed := [entry for entry in found if not is_metadata(str(entry[4][0]))]:
            return allowed
        raise SendFailed(
            f"{self.shown}: this is a link-local address, or one of a cloud's metadata service: "
            "notify_allow_link_local allows it"
        )


_REDIRECTED = ": redirects are not followed, give the address that it leads to"


def is_metadata(address: str) -> bool:
    """Whether an address is link-local or a cloud's metadata service, however it is written."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    return any(found in network for network in _METADATA if network.version == found.version)


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _authority(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    return name if parts.port is None else f"{name}:{parts.port}"


def _request(url: str, body: bytes, headers: Mapping[str, str]) -> h11.Request:
    parts = urlsplit(url)
    given = {
        "Host": _authority(url),
        "User-Agent": "nightcrier",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    return h11.Request(method="POST", target=target, headers=list(given.items()))


async def _connect(addresses: Sequence[Any]) -> socket.socket:
    """A connection to the first address that takes one; each gets its share of the time."""
    share = TIMEOUT / 2 / len(addresses)
    error: Exception = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(share):
                await asyncio.get_running_loop().sock_connect(sock, address)
        except OSError as failed:  # TimeoutError is one
            sock.close()
            error = failed
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise error


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: h11.Request, body: bytes
) -> tuple[int, float | None, str]:
    """Status, Retry-After and the beginning of the answer."""
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
    for part in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(http.send(part) or b"")
    with contextlib.suppress(OSError):  # a server may answer and close before it has read all
        await writer.drain()
    while not isinstance(head := await _next_event(http, reader), h11.Response):
        if isinstance(head, h11.ConnectionClosed):
            raise OSError("the connection was closed without an answer")
    said = bytearray()
    if head.status_code >= 300:
        # The status is known: what is wrong with the rest changes nothing.
        with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
            async with asyncio.timeout(TIMEOUT / 5):
                while len(said) < _EXCERPT_BYTES:
                    event = await _next_event(http, reader)
                    if not isinstance(event, h11.Data):
                        break
                    said += event.data
    text = said[:_EXCERPT_BYTES].decode("utf-8", "replace")
    return head.status_code, wait_asked_for(head.headers, datetime.now(UTC)), text


async def _next_event(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Event:
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(4_096))
        elif isinstance(event, h11.Event):
            return event
        else:  # PAUSED: the answer has ended
            return h11.EndOfMessage()


def wait_asked_for(headers: Iterable[tuple[bytes, bytes]], now: datetime) -> float | None:
    """Seconds to wait, of a Retry-After header (a number, or a date); at most an hour."""
    value = next((bytes(v).decode("latin-1") for k, v in headers if k == b"retry-after"), "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _LONGEST_WAIT)
    try:
        seconds = (email.utils.parsedate_to_datetime(value) - now).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionError):  # asyncio's own text says "Connect call failed"
        return os.strerror(error.errno) if error.errno else "the connection was lost"
    if isinstance(error, ssl.SSLError):
        return f"no TLS ({error.reason or 'broken off'})"
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error) or type(error).__name__


def json_body(document: Mapping[str, Any]) -> str:
    """JSON in ASCII: no receiver has to guess an encoding."""
    return json.dumps(document, separators=(",", ":"))
