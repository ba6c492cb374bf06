"""A task's events as they come, over as many connections as it takes."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from anyio.lowlevel import checkpoint
from pydantic import ValidationError

from ..exceptions import Draining, Unavailable
from ..http_answers import from_shape, no_answer, not_ours
from ..http_urls import path_of
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import TaskResult
from .http import Http, Patience, StreamBody
from .sse import Frame, SseParser


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One event of a task. `index` counts from 0 without a gap; `type` names its class; `data` is its fields,
    declared or not."""

    index: int
    type: str
    data: dict[str, Any]


class TaskEvents:
    """The events of a task from an index to its ending, each once and in order.

        async with task.events() as events:
            async for event in events:
                ...
        # now events.record is the terminal record

    After a dropped connection, or one without a sign of life, it connects again and goes on where it was; it gives up
    (`Unavailable`) when no connection brought anything new for `reconnect_for` seconds.

    Resource handling: it holds a connection until the ending, `aclose` or the end of its block, whichever comes first. If
    it is dropped instead, the connection is closed with the client's next request. After a cancelled call the iteration
    goes on where it was. One task reads at a time.

    Error handling: an event stream never raises how the task ended; `task.result()` does. `NotFound`: there is no such
    task, or it was deleted meanwhile.

    Attributes:
        cursor: The index of the event that comes next.
        record: How the task ended; None until the iteration has ended.
    """

    def __init__(
        self, http: Http, task_id: str, start: int, reconnect_for: float, *, follow_status: bool = False
    ) -> None:
        self.task_id = task_id
        self.cursor = start
        self.record: TaskResult | None = None
        self._http = http
        self._patience = Patience(reconnect_for)
        self._follow_status = follow_status
        self._status: TaskStatus | None = None
        self._pending: deque[TaskEvent | TaskStatus] = deque()
        self._body: StreamBody | None = None
        self._parser = SseParser()
        self._read = start
        self._ended: TaskResult | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskEvent:
        while (item := await self.receive()) is not None:
            if isinstance(item, TaskEvent):
                return item
        raise StopAsyncIteration

    async def receive(self) -> TaskEvent | TaskStatus | None:
        """The next event; or, where `follow_status` was asked for, the task's status if it is another than was told last,
        in its place among the events. None at the end. Iterating skips what is no event."""
        if self._pending:
            await checkpoint()  # a page of events must not make a loop over them immune to cancellation
        while not self._pending and self._ended is None:
            try:
                await self._receive()
            except Unavailable as error:
                if self._body is not None:
                    self._http.note(self._body.url, error)
                await self.aclose()
                if not self._http.answered:
                    raise  # a wrong URL is no dropped connection
                if not self._pending:  # what came before the failure is delivered first
                    await self._patience.pause(error)
            except BaseException:
                await self.aclose()
                raise
        if self._pending:
            item = self._pending.popleft()
            if isinstance(item, TaskEvent):
                self.cursor = item.index + 1
            return item
        await self.aclose()
        self.record = self._ended
        return None

    async def aclose(self) -> None:
        """Let go of the connection. Iterating again opens a new one and goes on."""
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        body = getattr(self, "_body", None)
        if body is not None:
            self._http.abandon(body)

    async def _receive(self) -> None:
        """Take what comes next on the connection, which is opened if there is none."""
        if self._body is None:
            self._body = await self._connect()
        chunk = await self._body.receive()
        if chunk is None:
            raise no_answer(self._http.url, "the event stream was cut", sent=True)
        for frame in self._parser.feed(chunk):
            self._take(frame)

    async def _connect(self) -> StreamBody:
        self._parser = SseParser()
        return await self._http.open_stream(
            path_of("tasks", self.task_id, "events"),
            # The header counts where the server goes on; before the first event only the query can.
            params={"from": self._read} | ({"status": "true"} if self._follow_status else {}),
            headers={"Last-Event-ID": str(self._read - 1)} if self._read else {},
        )

    def _take(self, frame: Frame) -> None:
        if frame.id is not None:
            self._take_event(frame)
        elif frame.event == "end":
            self._ended = self._parse_ending(frame.data)
        elif frame.event == "status":
            self._take_status(self._load(frame.data).get("status"))
        elif frame.event == "drain":
            raise Draining(f"{self._http.url} is stopping", hint="Connect again.", url=self._http.url)
        elif frame.event == "error":
            shape = self._load(frame.data).get("error")
            raise from_shape(shape if isinstance(shape, dict) else {}, self._http.url)
        # Frames without an id and of another name are for newer clients.

    def _take_event(self, frame: Frame) -> None:
        assert frame.id is not None
        if not (frame.id.isascii() and frame.id.isdigit()):
            raise not_ours(self._http.url, f"an event has the id {frame.id[:40]!r}")
        index = int(frame.id)
        if index < self._read:
            return  # seen on the connection before
        if index > self._read:
            raise no_answer(self._http.url, f"event {self._read} of the stream is missing", sent=True)
        self._pending.append(TaskEvent(index, frame.event, _fields(self._load(frame.data))))
        self._read = index + 1
        self._patience.progress()

    def _take_status(self, value: Any) -> None:
        if value in set(TaskStatus) and value != self._status:  # one that only newer servers know says nothing to us
            self._status = TaskStatus(value)
            self._pending.append(self._status)

    def _parse_ending(self, text: str) -> TaskResult:
        try:
            return TaskResult.model_validate_json(text)
        except ValidationError as error:
            raise not_ours(self._http.url, "the end of the stream is no record of a task") from error

    def _load(self, text: str) -> dict[str, Any]:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise not_ours(self._http.url, "an event is no JSON") from error
        return data if isinstance(data, dict) else {"value": data}


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """Upstream writes fields that an event's class does not declare below `_data`; to its reader they are fields."""
    more = data.get("_data")
    if not isinstance(more, dict):
        return data
    return {name: value for name, value in data.items() if name != "_data"} | more
