"""Bodies of streaming answers: async iterators of bytes over a `LogReader`.

They own nothing: the reader's owner closes it. Each chunk is one page, so that a slow client costs one page of memory.
"""

from __future__ import annotations

from typing import Final, Self

import anyio
from anyio.lowlevel import checkpoint

from ..exceptions import CorralError, Draining
from ..protocol.lifecycle import TaskStatus
from ..protocol.records import EventPage
from .encoding import SSE_HEARTBEAT, ndjson_line, sse_drain, sse_end, sse_error, sse_event, sse_status
from .log import LogReader

HEARTBEAT: Final = 15.0


class NdjsonBody:
    """One line for each event and no other lines. It ends with the log; at drain it raises `Draining`, so that the body
    breaks off: the format has no other way to say that it is not complete."""

    def __init__(self, log: LogReader) -> None:
        self.log = log

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            page = await anext(self.log, None)
            if page is not None and page.events:
                return b"".join(map(ndjson_line, page.events))
            if page is None:
                if self.log.drained:
                    raise Draining("This server is stopping; the log goes on.", hint="Read on from where you are.")
                raise StopAsyncIteration


class SseBody:
    """Frames of events, then one of `end`, `drain` or `error`; comments in between keep quiet connections alive. Where the
    reader follows the task's `statuses`, a frame tells each, behind the events that came before it.

    An error of the store or a deleted task becomes the `error` frame: the status of the answer is sent already. Call
    `log.open()` before the answer begins to have the usual errors as statuses.
    """

    def __init__(self, log: LogReader, *, heartbeat: float | None = HEARTBEAT) -> None:
        self.log = log
        self._heartbeat = heartbeat
        self._closed = False
        self._told: TaskStatus | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._closed:
            raise StopAsyncIteration
        page: EventPage | None = None
        try:
            # A reader takes a cancelled call well: the next one goes on where it was.
            with anyio.move_on_after(self._heartbeat) as patience:
                page = await anext(self.log, None)
        except CorralError as error:
            await checkpoint()
            self._closed = True
            return sse_error(error)
        if patience.cancelled_caught:
            await checkpoint()
            return SSE_HEARTBEAT
        if page is None and not self.log.drained:
            raise StopAsyncIteration
        return self._encode(page)

    def _encode(self, page: EventPage | None) -> bytes:
        frames = [] if page is None else list(map(sse_event, page.events))
        if page is not None and self.log.ended:
            self._closed = True
            frames.append(sse_end(page.record))
            return b"".join(frames)
        if self.log.status is not None and self.log.status is not self._told:
            self._told = self.log.status
            frames.append(sse_status(self._told))
        if self.log.drained:
            self._closed = True
            frames.append(sse_drain(self.log.cursor))
        return b"".join(frames)
