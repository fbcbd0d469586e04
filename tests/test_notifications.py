"""notifications.py: what people see cannot hurt them, and what is sent goes where it should."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import notifications
from notifications import SendFailed
from postgres_servers import Authority
from receiver import Answer, Receiver, answering

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

# --- Slack ----------------------------------------------------------------------------------------

# What Slack's reference of Block Kit allows: characters of a text, or number of items.
MOST = {"header": 150, "section": 3000, "field": 2000, "context": 3000, "button": 75, "url": 3000}
MOST_FIELDS, MOST_ELEMENTS, MOST_BLOCKS = 10, {"context": 10, "actions": 25}, 50


def texts(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every text object of a message, and where it stands; what Slack would refuse is an error."""
    blocks = [*message["blocks"], *(b for a in message["attachments"] for b in a["blocks"])]
    assert 0 < len(blocks) <= MOST_BLOCKS
    for attachment in message["attachments"]:
        assert set(attachment) == {"color", "blocks"}
        assert re.fullmatch("#[0-9a-f]{6}", attachment["color"])
    for block in blocks:
        kind, rest = block["type"], set(block) - {"type"}
        if kind == "header":
            assert rest == {"text"}
            assert block["text"]["type"] == "plain_text"
            yield kind, block["text"]
        elif kind == "section":
            assert rest in ({"text"}, {"fields"})
            fields = block.get("fields", [])
            assert len(fields) <= MOST_FIELDS
            yield from (("field", item) for item in fields)
            yield from ((kind, block[name]) for name in rest & {"text"})
        else:
            assert rest == {"elements"}
            assert 0 < len(block["elements"]) <= MOST_ELEMENTS[kind]
            for element in block["elements"]:
                if kind == "actions":
                    assert set(element) == {"type", "text", "url"}
                    assert (element["type"], element["text"]["type"]) == ("button", "plain_text")
                    assert re.fullmatch(r"https?://\S+", element["url"])
                    assert len(element["url"]) <= MOST["url"]
                    yield "button", element["text"]
                else:
                    yield kind, element


def checked(message: dict[str, Any]) -> list[str]:
    """The texts of a message that Slack accepts, and that does only what we meant."""
    found = [message["text"]]
    for place, text in texts(message):
        assert 0 < len(text["text"]) <= MOST[place], place
        if text["type"] == "mrkdwn":
            assert text["verbatim"] is True, "else bare addresses become links"
            found.append(text["text"])
        else:
            assert text["type"] == "plain_text"
    for text in found:
        assert not re.search("[<>]|&(?!(amp|lt|gt);)", text), "no mention, no link"
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]", text)
    json.dumps(message).encode()
    return found


VALUES = {
    "incident_id": "01920000-0000-7000-8000-000000000001",
    "cluster": "prod",
    "severity": "critical",
    "fault_type": "CrashLoop",
    "resource_kind": "Pod",
    "resource_namespace": "shop",
    "resource_name": "web-1",
    "status": "RESOLVED",
    "created_at": "2026-11-23T03:00:00.000000Z",
    "started_at": "2026-11-23T03:00:01.000000Z",
    "completed_at": "2026-11-23T03:02:04.000000Z",
    "root_cause": "The **disk** of `node-3` is full; kube_pod_status says so.",
    "confidence": "HIGH",
    "host": "night-host",
    "workspace": "/var/lib/nightcrier/incidents/1",
}
FAILURES = {
    "failures": 4,
    "first_failure_at": "2026-11-23T03:00:00.000000Z",
    "last_failure_at": "2026-11-23T04:01:02.000000Z",
    "recovered_at": "2026-11-23T05:00:00.000000Z",
    "reasons": ["the agent exited with code 1", "", "no report", "never shown"],
}


def test_an_incident_says_where_what_why_and_how_sure_the_agent_is() -> None:
    message = notifications.slack_message("incident", VALUES, "https://reports/1/")
    shown = "\n".join(checked(message))

    for text in (
        *("*Cluster*\n`prod`", "*Namespace*\n`shop`", "*Resource*\n`Pod/web-1`"),
        "*Reason*\n`CrashLoop`",
        "*Root Cause (HIGH confidence)*\nThe disk of 'node-3' is full; kube_pod_status says so.",
        "Incident ID: `01920000-0000-7000-8000-000000000001` | Duration: 2m 03s",
        "Report: `night-host:/var/lib/nightcrier/incidents/1`",
    ):
        assert text in shown
    assert message["text"].startswith("CrashLoop in prod: The disk")
    (button,) = (b["elements"][0] for b in message["blocks"] if b["type"] == "actions")
    assert button["url"] == "https://reports/1/"


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "/var/lib/1/investigation.html", "file:///1.html", "javascript:alert(1)"),
        *("https://host/a b", "https://" + "x" * 3000),
    ],
)
def test_there_is_no_button_without_an_address_of_the_web(url: str | None) -> None:
    """D23: a path in the address of a button made Slack refuse the message."""
    message = notifications.slack_message("incident", VALUES, url)
    assert checked(message)
    assert not any(block["type"] == "actions" for block in message["blocks"])


def test_the_outage_of_the_agents_is_told_with_its_whole_length() -> None:
    degraded = "\n".join(checked(notifications.slack_message("degraded", FAILURES)))
    for text in ("*Failure Count*\n4", "*Time Window*\n1h 01m 02s", "2026-11-23 03:00:00 UTC"):
        assert text in degraded
    assert "• the agent exited with code 1\n• –\n• no report" in degraded
    assert "never shown" not in degraded
    recovered = "\n".join(checked(notifications.slack_message("recovered", FAILURES)))
    assert "*Total Downtime*\n2h 00m 00s" in recovered, "to the recovery, not to the last failure"
    assert "*Total Failures*\n4" in recovered


HOSTILE = [
    *("<!channel> <!here> <@U123ABC> <#C1> <!subteam^S1>", "<https://evil.example|click>"),
    *("*bold* _it_ ~gone~ `code` ```block```", "&lt;!channel&gt;", "a\u202eb\x1b[31mc\x00\u200b"),
    *("> quote\n# title\n- item\r\n```", "\ud800", "<" * 9_000, "&" * 9_000, "`" * 4_000),
    *("*" * 3_000, "\n" * 100, "🔥" * 3_000, "**" + "x" * 3_000 + "**"),
]
TEXTS = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=60)
NAMES = [*VALUES, *FAILURES, "text"]


@given(
    st.sampled_from(["incident", "degraded", "recovered", "test", "<!channel>"]),
    st.dictionaries(st.sampled_from([name for name in NAMES if name != "failures"]), TEXTS),
)
def test_whatever_a_cluster_or_an_agent_says_slack_accepts_it_and_nobody_is_called(
    kind: str, values: dict[str, Any]
) -> None:
    checked(notifications.slack_message(kind, values))
    checked(notifications.slack_message(kind, dict.fromkeys(VALUES, HOSTILE[0]) | values))


@given(TEXTS)
def test_no_text_from_outside_is_formatted(text: str) -> None:
    shown = notifications.code(text)
    assert shown == "–" or re.fullmatch(r"`[^`\n]{1,200}`", shown)
    shown = notifications.prose(text)
    assert len(shown) <= 1500
    assert not set(shown) & set("*~`<>\n")
    assert not re.search(r"(?<![^\W_])_|_(?![^\W_])", shown.replace("…", "x"))


@pytest.mark.parametrize("limit", range(2, 12))
def test_no_escape_is_cut_in_two(limit: int) -> None:
    shown = notifications.prose("a<&>b", limit)
    assert len(shown) <= limit
    assert re.fullmatch(r"(a|b|&lt;|&gt;|&amp;)*…?", shown)


# --- webhook --------------------------------------------------------------------------------------


def verifier() -> Any:
    """The function of the README that checks a signature."""
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(source.strip().splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(source, names)
    return names["is_genuine"]


def test_the_verifier_of_the_readme_accepts_what_we_sign_and_nothing_else() -> None:
    is_genuine = verifier()
    body = b'{"a":1}'
    headers = notifications.webhook_headers("id-1", body, secret="s3cret", now=time.time())

    assert headers["X-Nightcrier-Id"] == "id-1"
    assert is_genuine("s3cret", headers, body)
    assert not is_genuine("another", headers, body)
    assert not is_genuine("s3cret", headers, body + b" ")
    for name, value in (("Timestamp", "1"), ("Signature", "sha256=00"), ("Signature", "")):
        assert not is_genuine("s3cret", headers | {f"X-Nightcrier-{name}": value}, body)
    old = notifications.webhook_headers("id-1", body, secret="s3cret", now=time.time() - 3600)
    assert not is_genuine("s3cret", old, body), "a request that somebody kept"
    assert "X-Nightcrier-Signature" not in notifications.webhook_headers(
        "id-1", body, secret=None, now=0
    )


# --- sending --------------------------------------------------------------------------------------


def post(url: str, *, link_local: bool = False) -> None:
    receiver = notifications.Receiver(url=url, allow_link_local=link_local)
    asyncio.run(receiver.post(b'{"a":1}', {"X-One": "1"}))


def failure(url: str) -> SendFailed:
    with pytest.raises(SendFailed) as caught:
        post(url)
    assert "/hook" not in str(caught.value), "the path may be the secret"
    return caught.value


def test_a_message_arrives_as_json_with_its_headers() -> None:
    with Receiver() as receiver:
        post(receiver.url("/hook?token=t"))
    (request,) = receiver.received
    assert (request.target, request.document) == ("/hook?token=t", {"a": 1})
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["x-one"] == "1"


@pytest.mark.parametrize(
    ("answer", "permanent", "wait"),
    [
        (answering(400, b"invalid_payload"), True, None),
        (answering(404), True, None),
        (answering(410), True, None),
        (answering(408), False, None),
        (answering(429, b"", "Retry-After: 30"), False, 30.0),
        (answering(429, b"", "Retry-After: 999999999999"), False, 3600.0),
        (answering(503, b"", "Retry-After: soon"), False, None),
        (answering(500, b"x" * 10_000_000), False, None),
        (answering(302, b"", "Location: http://127.0.0.1:1/"), False, None),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], False, None),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000], False, None),
        ([], False, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_accepted_says_whether_to_try_again(
    answer: Answer, permanent: bool, wait: float | None
) -> None:
    with Receiver(lambda _: answer) as receiver:
        error = failure(receiver.url())
    assert (error.permanent, error.retry_after) == (permanent, wait)
    assert f"127.0.0.1:{receiver.port}" in str(error)
    assert len(error.said) <= 2000
    assert len(receiver.received) == 1, "no redirect is followed, nothing is sent twice"


def test_nobody_there_is_tried_again() -> None:
    with Receiver() as receiver:
        url = receiver.url()
    assert not failure(url).permanent
    assert "refused" in str(failure(url))
    assert not failure("http://no-such-host.invalid/hook").permanent
    assert str(failure("http://two..dots/hook")) == "two..dots: no host can have this name"


@pytest.mark.parametrize(
    "answer", [[None], [b"HTTP/1.1 200 OK\r\n", None], [b"HTTP/1.1 100 Continue\r\n\r\n", None]]
)
def test_a_receiver_that_hangs_is_left_after_the_time_limit(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "TIMEOUT", 0.2)
    with Receiver(lambda _: answer) as receiver:
        error = failure(receiver.url())
    assert "no answer within" in str(error)
    assert not error.permanent


def test_an_answer_that_hangs_in_its_middle_is_as_good_as_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifications, "TIMEOUT", 3.0)  # of which a fifth is for the rest
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\nno_ser"
    with Receiver(lambda _: [head, None]) as receiver:
        error = failure(receiver.url())
    assert (error.permanent, error.said) == (True, "no_ser")
    with Receiver(lambda _: [head.replace(b"404", b"200"), None]) as receiver:
        post(receiver.url())


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%1", "fd00:ec2::254"),
        *("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd20:ce::254"),
        *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"),
    ],
)
def test_addresses_of_metadata_services_are_recognised(address: str) -> None:
    assert notifications.is_metadata(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "::1", "fd00::1", "1.1.1.1"])
def test_other_addresses_are_not(address: str) -> None:
    assert not notifications.is_metadata(address)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[::ffff:169.254.169.254]", "2852039166", "0xa9fea9fe"]
)
def test_nothing_is_sent_to_a_metadata_service_unless_allowed(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = []

    async def connect(addresses: Any) -> socket.socket:
        connected.append(addresses)
        raise OSError("stop here")

    monkeypatch.setattr(notifications, "_connect", connect)
    assert "link-local" in str(failure(f"http://{host}/hook"))
    assert connected == []
    with pytest.raises(SendFailed, match="stop here"):
        post(f"http://{host}/hook", link_local=True)
    assert len(connected) == 1


def test_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that stands for another address the second time it is asked for (DNS rebinding)."""
    asked = []
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        name = ["169.254.169.254", "127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]
        return [entry for one in name for entry in real(one, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with Receiver() as receiver:
        post(f"http://receiver.test:{receiver.port}/hook")
        assert asked == ["receiver.test"]
        assert receiver.received[0].headers["host"] == f"receiver.test:{receiver.port}"
        assert "link-local" in str(failure(f"http://receiver.test:{receiver.port}/hook"))


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Receiver() as receiver:
        post(receiver.url())
    assert len(receiver.received) == 1


def test_a_certificate_must_be_trusted_and_for_that_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    made = authority.issue("receiver", "IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.certificate, made.key)
    with Receiver(tls=context) as receiver:
        notifications._tls.cache_clear()
        assert "certificate is not trusted" in str(failure(receiver.url()))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        notifications._tls.cache_clear()
        post(receiver.url())
        other = receiver.url().replace("127.0.0.1", "localhost")
        assert "certificate is not trusted" in str(failure(other))
    notifications._tls.cache_clear()
    assert len(receiver.received) == 1
    with Receiver() as plain:
        assert not failure(plain.url().replace("http:", "https:")).permanent


def test_a_date_says_how_long_to_wait() -> None:
    now = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)

    def wait(value: bytes) -> float | None:
        return notifications.wait_asked_for([(b"retry-after", value)], now)

    assert wait(b"Mon, 23 Nov 2026 03:01:00 GMT") == 60
    assert wait(b"Mon, 23 Nov 2026 02:00:00 GMT") == 0
    assert wait(b"Mon, 23 Nov 2027 02:00:00 GMT") == 3600
    assert [wait(value) for value in (b"", b"-1", b"1.5", b"\xff", b"Mon")] == [None] * 5
    assert wait(b"Mon, 23 Nov 99999999999999 03:01:00 GMT") is None
