"""RETURNS: what readers of a task's events use.

* `changes.py`: who waits for news about a task in this process.
* `log.py`: read the log from any index until the terminal record; wait for that record.
* `encoding.py`: NDJSON, server-sent events and cursors as pure functions.
* `bodies.py`: the same as bodies of streaming answers.
"""

from __future__ import annotations

from .bodies import NdjsonBody as NdjsonBody
from .bodies import SseBody as SseBody
from .changes import Changes as Changes
from .changes import Watch as Watch
from .encoding import NDJSON_CONTENT_TYPE as NDJSON_CONTENT_TYPE
from .encoding import SSE_CONTENT_TYPE as SSE_CONTENT_TYPE
from .encoding import SSE_HEARTBEAT as SSE_HEARTBEAT
from .encoding import ndjson_line as ndjson_line
from .encoding import parse_cursor as parse_cursor
from .encoding import sse_drain as sse_drain
from .encoding import sse_end as sse_end
from .encoding import sse_error as sse_error
from .encoding import sse_event as sse_event
from .encoding import task_result as task_result
from .log import LogReader as LogReader
from .log import ReadableLog as ReadableLog
from .log import read_log as read_log
from .log import wait_terminal as wait_terminal
