"""`corral run`: a service from the terminal, as if it ran here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

import anyio
import anyio.abc
import typer

from ..exceptions import Conflict, CorralError, TaskEnded
from .options import DEFAULT_URL, Arguments, Input, Json, Token, Url, values
from .output import (
    EXIT_CANCELLED,
    EXIT_FAILURE,
    EXIT_OK,
    complain,
    note,
    print_event,
    print_line,
    print_text,
    to_json,
)

CANCEL_PATIENCE: Final = 10.0
"""Seconds that a task gets to end after Ctrl-C before the command leaves it to the server."""

_ENDINGS: Final = ("StopEvent", "WorkflowFailedEvent", "WorkflowTimedOutEvent", "WorkflowCancelledEvent")
"""Upstream's last events: the result, or the error, that follows says the same."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("run")(run)


def run(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="The name of the service.")],
    arguments: Arguments = None,
    text: Input = None,
    session: Annotated[str | None, typer.Option(help="Run in this session; it must exist.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the task ends as timed out.")] = None,
    delay: Annotated[float | None, typer.Option(help="Seconds before which the task does not start.")] = None,
    max_attempts: Annotated[int | None, typer.Option(help="How often the task may be tried.")] = None,
    retry_on: Annotated[
        list[str] | None,
        typer.Option(metavar="ERROR", help="Try again after errors of this class; '*' for any. Repeatable."),
    ] = None,
    backoff: Annotated[
        float | None, typer.Option(help="Seconds before the second attempt; each further pause is twice as long.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Run a service: stream its events, answer its questions, print its result.

    Questions are asked on stderr and answered on stdin. Ctrl-C cancels the task; once more leaves at once. Exit codes: 0
    completed, 1 failed, 2 wrong usage, 130 cancelled.

    With --json: one line an event, then one with the record of the ending.
    """
    start = values(arguments, text)
    options = {
        "session": session,
        "timeout": timeout,
        "delay": delay,
        "max_attempts": max_attempts,
        "retry_on": retry_on or (),
        "backoff": backoff,
    }
    raise typer.Exit(_on_trio(lambda: Command(url, token, as_json=as_json).run(service, start, options)))


def show_events(url: str, token: str | None, task_id: str, start: int, *, as_json: bool) -> int:
    """The command `corral events`."""
    return _on_trio(lambda: Command(url, token, as_json=as_json).events(task_id, start))


def _on_trio(fn: Callable[[], Awaitable[int]]) -> int:
    import_light()
    # Trio's threads end with the process, also one that still reads standard input.
    return anyio.run(fn, backend="trio")


def import_light() -> None:
    """Import httpx without what it loads only because it is installed: its own command line, which brings rich and
    pygments, and HTTP/2. Together they would be half of our start-up time."""
    hidden = [name for name in ("httpx._main", "h2") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what `import` takes for "not installed"
    try:
        import httpcore  # noqa: F401
        import httpx  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


class Command:
    """One use of `corral run` or `corral events`."""

    def __init__(self, url: str, token: str | None, *, as_json: bool) -> None:
        self._url = url
        self._token = token
        self._json = as_json
        self._task: Any = None
        self._stopped = False
        self._told = True
        self._code = EXIT_OK
        self._error: Exception | None = None
        self._scope = anyio.CancelScope()

    async def run(self, service: str, arguments: dict[str, Any], options: dict[str, Any]) -> int:
        """Start the task, show what it does, and return the exit code for how it ended. `options` are those of
        `Client.start`."""
        async with anyio.create_task_group() as group:
            await group.start(self._watch_signals, group)
            with self._scope:
                try:
                    await self._start_and_follow(group, service, arguments, options)
                except Exception as error:
                    self._error = error  # kept out of the task group, which would wrap it
            group.cancel_scope.cancel()
        if self._error is not None and not self._stopped:
            raise self._error
        if self._scope.cancelled_caught or self._error is not None:
            if self._told:
                return complain("cancelled; the task has been told", None, EXIT_CANCELLED)
            return complain(
                f"stopped; the task {self._task.id} could not be told, and may go on",
                f"corral cancel {self._task.id} tells it when the server is back",
                EXIT_CANCELLED,
            )
        return self._code

    async def _start_and_follow(
        self, group: anyio.abc.TaskGroup, service: str, arguments: dict[str, Any], options: dict[str, Any]
    ) -> None:
        from ..client import Client
        from .questions import LineReader, Questions

        async with Client(self._url, token=self._token) as client:
            async with client.started(service, arguments, **options) as task:
                self._task = task
                questions = Questions(task, LineReader())
                group.start_soon(self._ask, questions, name="questions")
                async with task.events() as events:
                    async for event in events:
                        if self._json or event.type not in _ENDINGS:
                            self._show(event)
                        questions.saw(event)
            self._code = self._conclude(events.record, task.session_id)

    async def _ask(self, questions: Any) -> None:
        try:
            await questions.answer_all()
        except CorralError as error:
            complain(f"your answer could not be sent: {error}", error.hint, EXIT_FAILURE)

    async def events(self, task_id: str, start: int) -> int:
        """Show the events of a task and how it ended."""
        from ..client import Client

        async with Client(self._url, token=self._token) as client, client.task(task_id).events(start) as events:
            async for event in events:
                self._show(event)
        if self._json:
            print_line(_record(events.record, None))
        else:
            note(f"{task_id}: {events.record.status if events.record else 'unknown'}")
        return EXIT_OK

    async def _watch_signals(
        self, group: anyio.abc.TaskGroup, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for received in signals:
                if self._stopped:
                    sys.stdout.flush()
                    os._exit(128 + received)
                self._stopped = True
                if self._task is None:
                    self._scope.cancel()  # the block around the task tells the server
                else:
                    note(f"cancelling the task {self._task.id}; once more leaves at once")
                    # Its clean-up may publish events: they are shown until it has ended.
                    self._scope.deadline = anyio.current_time() + CANCEL_PATIENCE
                    group.start_soon(self._cancel, name="cancel the task")

    async def _cancel(self) -> None:
        try:
            await self._task.cancel()
        except CorralError as error:
            note(f"corral: {error}")
            if not isinstance(error, Conflict):  # which says that it has ended: the events show how
                self._told = False
                self._scope.cancel()

    def _show(self, event: Any) -> None:
        if self._json:
            print_line({"index": event.index, "type": event.type, "data": event.data})
        else:
            print_event(event.index, event.type, event.data)

    def _conclude(self, record: Any, session_id: str | None) -> int:
        from ..client.tasks import outcome

        if self._json:
            print_line(_record(record, session_id))
        try:
            value = outcome(record, session_id)
        except TaskEnded as error:
            code = EXIT_CANCELLED if record.status == "cancelled" else EXIT_FAILURE
            return complain(str(error), f"corral events {record.task_id} shows its events", code)
        if not self._json:
            print_text(_text(value, record.result))
        return EXIT_OK


def _record(record: Any, session_id: str | None) -> dict[str, Any]:
    """How a task ended, as one line of JSON."""
    ended = {"task_id": record.task_id, "session_id": session_id, "status": record.status, "result": record.value}
    return ended | {"text": record.result, "error": record.error.model_dump() if record.error else None}


def _text(value: Any, text: str) -> str:
    """A result for a person: the text that its workflow gives it, JSON where that is nothing but Python's notation."""
    if isinstance(value, str):
        return value
    return to_json(value, indent=2) if text in (str(value), "") else text
