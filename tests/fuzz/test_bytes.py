"""The HTTP layer under bytes that are no requests, or only half of one, or more than one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_corral.web import door

from .conftest import DEPTH, Served, in_a_thread, open_plane, thorough
from .raw import exchange, request, statuses

pytestmark = [pytest.mark.promise("P9"), pytest.mark.timeout(120 + 300 * (DEPTH > 1) * DEPTH)]

FINE = {501, 505}
"""What HTTP itself says to a transfer encoding, or a version, that nobody knows."""


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A server that gives slow senders little time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "LINGER", 0.1)
        with in_a_thread(lambda: open_plane(keep_alive_timeout=0.2, body_timeout=0.2)) as served:
            yield served


def check_answer(served: Served, *parts: bytes, half_close: bool = False) -> list[int]:
    found = statuses(exchange(served.url, *parts, half_close=half_close))
    assert all(status < 500 or status in FINE for status in found), (found, parts)
    return found


def still_answers(served: Served) -> None:
    assert statuses(exchange(served.url, request("/health"))) == [200]


GOOD = request("/services/echo/run", method="POST", body=b'{"count": 2}')
LINES = GOOD.split(b"\r\n")
LINES_THAT_MEAN_NOTHING = [
    b"Content-Length: 0",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: " + b"9" * 5000,
    b"Content-Length: 1e3",
    b"Content-Length: 3, 4",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: nonsense",
    b"Expect: 100-continue",
    b"Expect: nonsense",
    b"Upgrade: h2c",
    b"Upgrade: websocket",
    b"Connection: Upgrade, HTTP2-Settings",
    b"Host:",
    b"Host: a, b",
    b": nameless",
    b"no colon",
    b" folded",
    b"X-\xff\xfe: \x00\x01",
    b"X-Long: " + b"x" * 40_000,
    b"Accept-Encoding: identity;q=0",
    b"Content-Type: \xff/json",
    b"Authorization: Bearer \xff",
    b"Origin: \xff",
    b"Origin: http://[",
    b"X-Request-ID: \r",
    b"Last-Event-ID: \xb2",
]
ODD = st.sampled_from(LINES_THAT_MEAN_NOTHING)


@st.composite
def _spoiled(draw: st.DrawFn) -> bytes:
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, len(lines) - 1))
        what = draw(st.sampled_from(["odd", "drop", "swap", "cut", "bytes", "again"]))
        if what == "odd":
            lines.insert(max(1, where), draw(ODD))
        elif what == "drop" and len(lines) > 1:
            del lines[where]
        elif what == "swap":
            lines[where], lines[0] = lines[0], lines[where]
        elif what == "cut":
            lines[where] = lines[where][: draw(st.integers(0, 10))]
        elif what == "bytes":
            lines[where] = draw(st.binary(max_size=30))
        else:
            lines.insert(where, lines[where])
    joint = draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]))
    return joint.join(lines)


@pytest.mark.parametrize("line", LINES_THAT_MEAN_NOTHING)
def test_a_header_that_means_nothing(impatient: Served, line: bytes) -> None:
    for good in (GOOD, request("/tasks/none/events"), request("/sessions/none", method="PUT")):
        assert len(check_answer(impatient, good.replace(b"\r\n", b"\r\n" + line + b"\r\n", 1))) <= 1
    still_answers(impatient)


def test_spoiled_requests(impatient: Served) -> None:
    @thorough(150)
    @given(data=_spoiled(), again=st.booleans(), cut=st.sampled_from([0, 0, 0, 1, 10, 60]), half_close=st.booleans())
    def check(data: bytes, again: bool, cut: int, half_close: bool) -> None:
        check_answer(impatient, data[: len(data) - cut], GOOD if again else b"", half_close=half_close)

    check()
    still_answers(impatient)


def test_garbage(impatient: Served) -> None:
    @thorough(60)
    @given(parts=st.lists(st.binary(max_size=200) | st.just(GOOD), max_size=4), half_close=st.booleans())
    def check(parts: list[bytes], half_close: bool) -> None:
        check_answer(impatient, *parts, half_close=half_close)

    check()
    still_answers(impatient)


CHUNKED = (
    b"POST /services/echo/run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"2\r\n{}\r\n0\r\n\r\n", 200),
        (b"1\r\n{\r\n1\r\n}\r\n0\r\nX-Trailer: 1\r\n\r\n", 200),
        (b"zz\r\n{}\r\n0\r\n\r\n", 400),
        (b"-1\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\r\n{}}}0\r\n\r\n", 400),
        (b"f" * 5000, 408),
        (b"ffffffffffffffffffff\r\n{}", 408),
        (b"2\r\n{}\r\n", 408),
    ],
)
def test_chunks(impatient: Served, chunks: bytes, status: int) -> None:
    assert check_answer(impatient, CHUNKED + chunks) == [status]


@pytest.mark.parametrize("half_close", [False, True])
@pytest.mark.parametrize("size", [0, 1, 10, len(GOOD) - 13, len(GOOD) - 1])
def test_half_a_request_is_let_go(impatient: Served, size: int, half_close: bool) -> None:
    """Whoever stops in the middle is disconnected; whoever stops in the body and is still there is told why."""
    found = check_answer(impatient, GOOD[:size], half_close=half_close)
    if half_close:
        assert found in ([], [400])
    else:
        assert found == ([408] if size > GOOD.index(b"\r\n\r\n") + 3 else [])


def test_pipelined_requests_are_answered_in_order(impatient: Served) -> None:
    kept = request("/health").replace(b"Connection: close\r\n", b"")
    missing = request("/nowhere").replace(b"Connection: close\r\n", b"")
    assert check_answer(impatient, kept * 20 + missing + GOOD, half_close=False) == [*([200] * 20), 404, 200]


def test_a_lying_length_does_not_reach_the_next_request(impatient: Served) -> None:
    """What follows a refused body is no request: it must not be taken for one."""
    hidden = request("/sessions/smuggled", method="PUT")
    said = b"POST /services/echo/run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    both = said + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden
    huge = said + b"Content-Length: 99999999\r\n\r\n" + hidden
    for sent in (both, huge):
        check_answer(impatient, sent, half_close=False)
    with impatient.client() as client:
        assert client.get("/sessions/smuggled").status_code == 404
