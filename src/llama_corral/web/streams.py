"""Answers that go on: NDJSON and SSE streams, and long polls.

A stream ends because its source ended, because the server drains, or because the client left. It ends with a complete
body in the first two cases; if the source raises, the body is cut short, so that no client takes it for complete.
The source runs in a task of its own and only hands items over: nothing here yields inside a nursery, and a heartbeat
never cancels the source's own wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import trio
from pydantic_core import to_json

from ..exceptions import Draining
from ..log_ids import REQUEST_ID

logger = logging.getLogger(__name__)

CLEANUP_TIME = 2.0
"""Seconds that a source's own `finally` gets when its stream was ended from outside."""

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One SSE event. `data` is text or bytes as they are, anything else as JSON. `id` is what a client sends back in
    `Last-Event-ID`."""

    data: Any
    id: int | str | None = None
    event: str | None = None

    def encode(self) -> bytes:
        lines = []
        if self.id is not None:
            lines.append(b"id: %s" % _one_line(str(self.id)))
        if self.event is not None:
            lines.append(b"event: %s" % _one_line(self.event))
        lines += [b"data: %s" % part for part in _as_bytes(self.data).splitlines() or [b""]]
        return b"\n".join(lines) + b"\n\n"


@dataclass(slots=True)
class Stream:
    """An answer sent piece by piece, each piece as soon as the source yields it. See `ndjson` and `sse`.

    Args:
        source: Yields items. Closed when the stream ends, however it ends.
        encode: Makes the bytes of one item.
        heartbeat: What is sent when nothing else was for `heartbeat_interval` seconds; nothing if empty.
        farewell: What is sent last when the drain ends the stream; a source that ends by itself says its own.
        ends_on_drain: False leaves the end to the source, which then has the graceful timeout.
    """

    source: AsyncIterable[Any]
    encode: Callable[[Any], bytes]
    content_type: str
    headers: dict[str, str] = field(default_factory=dict)
    heartbeat: bytes = b""
    heartbeat_interval: float = math.inf
    farewell: bytes = b""
    ends_on_drain: bool = True

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        headers = {"content-type": self.content_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
        headers |= {name.lower(): value for name, value in self.headers.items()}
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def run(self, write: Write, drain: trio.Event) -> bool:
        """Write everything. False if the source failed: the body must then be left incomplete."""
        hand_over, pieces = trio.open_memory_channel[bytes](0)
        ending = _Ending()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, hand_over, ending, name="stream source")
            if self.ends_on_drain:
                nursery.start_soon(_end_on, drain, ending, name="stream drain")
            await self._write_all(pieces, write)
            nursery.cancel_scope.cancel()
        if ending.drained and self.farewell:
            await write(self.farewell)
        return not ending.failed

    async def _write_all(self, pieces: trio.MemoryReceiveChannel[bytes], write: Write) -> None:
        while True:
            piece = self.heartbeat
            try:
                with trio.move_on_after(self.heartbeat_interval):
                    piece = await pieces.receive()
            except trio.EndOfChannel:
                return
            if piece:
                await write(piece)

    async def _pump(self, hand_over: trio.MemorySendChannel[bytes], ending: _Ending) -> None:
        with hand_over, ending.scope:
            try:
                async for item in self.source:
                    await hand_over.send(self.encode(item))
            except Draining:
                ending.failed = True
                logger.info("request %s: the stream breaks off: the server stops", REQUEST_ID.get())
            except Exception:
                ending.failed = True
                logger.exception("request %s: the source of a stream raised; the answer is cut short", REQUEST_ID.get())
            finally:
                # A `for` loop does not close what it iterates; the source's `finally` must run now, not at collection.
                with trio.move_on_after(CLEANUP_TIME, shield=True):
                    if isinstance(self.source, AsyncGenerator):
                        await self.source.aclose()


@dataclass(slots=True)
class _Ending:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    drained: bool = False
    failed: bool = False


async def _end_on(drain: trio.Event, ending: _Ending) -> None:
    await drain.wait()
    ending.drained = True
    ending.scope.cancel()


def ndjson(
    source: AsyncIterable[Any],
    *,
    convert: Callable[[Any], Any] | None = None,
    farewell: Any = None,
    ends_on_drain: bool = True,
) -> Stream:
    """A stream of one JSON document a line. Bytes are taken as whole, encoded lines; anything else is encoded.

    Args:
        convert: Makes of each item what is to be sent. Use it, not a generator around a generator: closing the outer
            one leaves the inner one to the garbage collector.
        farewell: A last line sent when the drain ends the stream. None sends none: the lines are then events only.
    """
    last = b"" if farewell is None else _line(farewell)
    encode = _after(convert, _line)
    return Stream(source, encode, "application/x-ndjson", farewell=last, ends_on_drain=ends_on_drain)


def sse(
    source: AsyncIterable[Any],
    *,
    convert: Callable[[Any], Any] | None = None,
    heartbeat: float = 15.0,
    ends_on_drain: bool = True,
) -> Stream:
    """A stream of server-sent events. The source yields `ServerEvent`, encoded bytes, or data to be sent as JSON.

    When the stream was silent for `heartbeat` seconds a comment is sent, so that proxies keep the connection. When the
    drain ends it, `event: drain` is sent: come back with `Last-Event-ID`. `convert` is as in `ndjson`.
    """
    return Stream(
        source,
        _after(convert, _event),
        "text/event-stream",
        heartbeat=b": keep-alive\n\n",
        heartbeat_interval=heartbeat,
        farewell=ServerEvent({}, event="drain").encode(),
        ends_on_drain=ends_on_drain,
    )


class Wakeup(Enum):
    """Why a long poll goes on."""

    CHANGED = "changed"
    DRAIN = "drain"
    DEADLINE = "deadline"


async def wait_changed(wait: Callable[[], Awaitable[object]], drain: trio.Event, within: float) -> Wakeup:
    """Wait until `wait()` returns, `drain` is set or `within` seconds have passed, whichever comes first.

    `wait()` is cancelled in the last two cases. What it raises is raised here, not wrapped in a group.
    """
    outcome = Wakeup.DEADLINE
    failure: Exception | None = None
    with trio.move_on_after(within):
        async with trio.open_nursery() as nursery:

            async def watch_drain() -> None:
                nonlocal outcome
                await drain.wait()
                outcome = Wakeup.DRAIN
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch_drain, name="long poll drain")
            try:
                await wait()
                outcome = Wakeup.CHANGED
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return to_json(value, by_alias=True, inf_nan_mode="null")


def _after(convert: Callable[[Any], Any] | None, encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    if convert is None:
        return encode
    return lambda item: encode(convert(item))


def _line(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item if item.endswith(b"\n") else item + b"\n"
    return to_json(item, by_alias=True, inf_nan_mode="null") + b"\n"


def _event(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    return (item if isinstance(item, ServerEvent) else ServerEvent(item)).encode()


def _one_line(text: str) -> bytes:
    return "".join(text.splitlines()).replace("\0", "").encode()
