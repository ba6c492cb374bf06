"""What readers see on the wire: NDJSON as the original has it, server-sent events with cursors. Pure functions.

Frames of server-sent events:

    id: 7                      an event of the log: its index,
    event: app.Progress        its type and its fields
    data: {"percent": 40}

    event: status              the task's status, where the reader asked for it: at once, and when it has changed
    data: {"status": "waiting"}

    event: end                 the log is complete; `data` is the task's result as the result route answers it
    event: drain               this process stops; connect again with the Last-Event-ID (`data`: {"from": 8})
    event: error               the log cannot be read on; `data` is the error as a refused request would show it

Only events of the log carry an `id`, so that the other frames leave the client's cursor where it is; that also tells
them from a user's event of the same name.
"""

from __future__ import annotations

import json
from typing import Final

from ..exceptions import BadInput, CorralError
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import TaskResult
from ..protocol.records import StoredEvent, TaskRecord

NDJSON_CONTENT_TYPE: Final = "application/x-ndjson"
SSE_CONTENT_TYPE: Final = "text/event-stream"
SSE_HEARTBEAT: Final = b": heartbeat\n\n"
MAX_CURSOR_DIGITS: Final = 18  # fits the 64 bits of every store

# Raw line ends are only white space between the tokens of a JSON text. The other three may stand inside its strings,
# and clients that split lines as Python does (the original's, through httpx) would cut the text there.
_LINE_ENDS: Final = {
    "\n": " ",
    "\r": " ",
    "\x85": "\\u0085",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_LINE_END_TABLE: Final = str.maketrans(_LINE_ENDS)


def one_line(payload: str) -> str:
    """The same JSON value as a text without any character that ends a line."""
    if payload.isascii() and "\n" not in payload and "\r" not in payload:
        return payload
    return payload.translate(_LINE_END_TABLE)


def ndjson_line(event: StoredEvent) -> bytes:
    """Exactly the event's fields as one line, as the original's stream has it."""
    return one_line(event.payload).encode() + b"\n"


def sse_event(event: StoredEvent) -> bytes:
    return _frame(event.type, event.payload, index=event.index)


def sse_status(status: TaskStatus) -> bytes:
    return _frame("status", json.dumps({"status": status.value}))


def sse_end(record: TaskRecord) -> bytes:
    """The terminal record as a frame of its own."""
    return _frame("end", task_result(record).model_dump_json())


def sse_drain(cursor: int) -> bytes:
    return _frame("drain", json.dumps({"from": cursor}))


def sse_error(error: CorralError) -> bytes:
    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return _frame("error", json.dumps({"error": body}))


def task_result(record: TaskRecord) -> TaskResult:
    """The outcome of an ended task as the result route answers it: the original's text with our fields beside it."""
    return TaskResult(
        task_id=record.task_id,
        result=record.result_text,
        status=record.status.value,
        value=None if record.result is None else json.loads(record.result),
        error=record.error,
    )


def parse_cursor(last_event_id: str | None = None, start: str | None = None) -> int:
    """The index to read from. `last_event_id` (the header) names the last event that arrived, `start` (the `from` of
    the query) the first one wanted; the header wins, because a browser reconnects with the URL that it began with.

    Raises:
        BadInput: not a decimal number from 0 on.
    """
    first = 0 if start is None else _index(start, "from")
    return first if last_event_id is None else _index(last_event_id, "Last-Event-ID") + 1


def _index(text: str, name: str) -> int:
    # int() would take signs, blanks, underscores and the digits of every script.
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_CURSOR_DIGITS):
        raise BadInput(
            f"{name} is not an index of an event: {text[:40]!r}",
            hint="Indices count from 0; send digits only.",
            name=name,
        )
    return int(text)


def _frame(event: str, data: str, *, index: int | None = None) -> bytes:
    cursor = "" if index is None else f"id: {index}\n"
    kind = event.translate(_LINE_END_TABLE)
    return f"{cursor}event: {kind}\ndata: {one_line(data)}\n\n".encode()
