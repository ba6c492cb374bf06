"""Groups whose helpers outlive their body, stopping in bounded time, signals, and restarts with backoff.

All of it is AnyIO and works on both backends.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import queue
import random
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

import anyio
from anyio.abc import TaskGroup, TaskStatus

from .aio import hosted_tasks

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
"""The program raised."""
EXIT_USAGE: Final = 2
"""The command line is wrong."""
EXIT_STUCK: Final = 70
"""The drain deadline passed and something would not end; its stacks are in the log."""
EXIT_SETUP: Final = 78
"""The operator must change something first: an address, a store, a target (`SetupError`)."""
EXIT_SIGNAL_BASE: Final = 128
"""A second signal ended the program at once: 128 + its number (130 for SIGINT, 143 for SIGTERM)."""

STUCK_MARGIN: Final = 5.0
"""Seconds between the end of the grace period, when everything is cancelled, and the hard exit."""
_BLOCKED_MARGIN: Final = 2.0
_LOOP_TURN: Final = 1.0
"""Seconds that the loop gets to end the process at a second signal before a thread does."""


_LIBRARY = frozenset({"anyio", "trio", "trio_asyncio"})
"""Packages whose frames are left out of the stacks of tasks."""


class StopEvent(Protocol):
    """A `trio.Event` or an `anyio.Event`."""

    def set(self) -> object: ...
    def is_set(self) -> bool: ...
    async def wait(self) -> object: ...


class SupportGroup:
    """Helpers of a body: heartbeats, publishers, watchers. Made by `open_support_group`."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._helpers: dict[anyio.CancelScope, float] = {}
        self._ended = False

    def start_soon(self, fn: Callable[..., Awaitable[Any]], *args: Any, name: str, grace: float = 0.0) -> None:
        """Start a helper.

        Args:
            grace: Seconds the helper gets to end by itself once the body has left (because the body closed what it
                reads from, say). With 0 it is cancelled at once.
        """
        self._tasks.start_soon(self._run, fn, args, grace, name=name)

    async def start(self, fn: Callable[..., Awaitable[Any]], *args: Any, name: str, grace: float = 0.0) -> Any:
        """Start a helper that takes `task_status` and wait until it has started. It is shielded from then on: a
        cancellation that comes while it starts still cancels the start."""
        return await self._tasks.start(self._run_started, fn, args, grace, name=name)

    async def _run(self, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], grace: float) -> None:
        scope = self._scope(grace, shield=True)
        try:
            with scope:
                await fn(*args)
        finally:
            del self._helpers[scope]

    async def _run_started(
        self,
        fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        grace: float,
        *,
        task_status: TaskStatus[Any],
    ) -> None:
        scope = self._scope(grace, shield=False)
        try:
            with scope:
                await fn(*args, task_status=_ShieldOnStarted(scope, task_status))
        finally:
            del self._helpers[scope]

    def _scope(self, grace: float, *, shield: bool) -> anyio.CancelScope:
        scope = anyio.CancelScope(shield=shield)
        self._helpers[scope] = grace
        if self._ended:
            self._end(scope, grace)
        return scope

    def end_all(self) -> None:
        """Called when the body has left."""
        self._ended = True
        for scope, grace in self._helpers.items():
            self._end(scope, grace)

    @staticmethod
    def _end(scope: anyio.CancelScope, grace: float) -> None:
        if grace > 0:
            scope.deadline = anyio.current_time() + grace
        else:
            scope.cancel()


class _ShieldOnStarted:
    def __init__(self, scope: anyio.CancelScope, task_status: TaskStatus[Any]) -> None:
        self._scope = scope
        self._task_status = task_status

    def started(self, value: Any = None) -> None:
        # A start that is being cancelled does not let go of its task, but waits for it to end: shielded, it never would.
        if anyio.current_effective_deadline() > -math.inf:
            self._scope.shield = True
        self._task_status.started(value)


@asynccontextmanager
async def open_support_group() -> AsyncIterator[SupportGroup]:
    """Helpers that the body can rely on until its last line.

    A cancellation from outside reaches the body only. When the body has left, however it left, each helper gets the
    grace it asked for and is then cancelled; the block ends when all of them have ended.

    A helper that raises cancels the body, and its error comes out of the block in an ExceptionGroup. An error of the
    body alone comes out as it is; if helpers fail too, it is in the group beside theirs.
    """
    body_error: Exception | None = None
    try:
        async with anyio.create_task_group() as tasks:
            group = SupportGroup(tasks)
            try:
                yield group
            except Exception as error:
                # Kept out of the task group, which would wrap it. Cancellation is no Exception and passes.
                body_error = error
            finally:
                group.end_all()
    except BaseExceptionGroup as errors:
        if body_error is None:
            raise
        raise errors.derive([*errors.exceptions, body_error]) from None
    except BaseException:
        if body_error is not None:  # a cancellation from outside overtakes it
            logger.error("the body of a support group raised while it was cancelled", exc_info=body_error)
        raise
    if body_error is not None:
        raise body_error


@asynccontextmanager
async def drain_deadline(
    stop: StopEvent,
    grace: float,
    *,
    margin: float = STUCK_MARGIN,
    exit_process: Callable[[int], object] = os._exit,
) -> AsyncIterator[anyio.CancelScope]:
    """Bound how long the block lives on after `stop` is set.

    The block is expected to see `stop` itself and end. After `grace` seconds it is cancelled. After `margin` more the
    tasks that still run are logged with their stacks and the process ends with EXIT_STUCK: what swallows cancellation,
    or is shielded for ever, does not keep a process alive. A thread does the same, with the stacks of all threads, if
    the event loop itself is blocked.

    Yields the scope; `cancelled_caught` tells afterwards whether the grace period was too short.
    """
    async with open_support_group() as support:
        scope = anyio.CancelScope()
        support.start_soon(_enforce, stop, grace, margin, scope, exit_process, name="drain deadline")
        with scope:
            yield scope


async def _enforce(
    stop: StopEvent,
    grace: float,
    margin: float,
    scope: anyio.CancelScope,
    exit_process: Callable[[int], object],
) -> None:
    await stop.wait()
    backstop = threading.Timer(grace + margin + _BLOCKED_MARGIN, _exit_blocked, (exit_process,))
    backstop.daemon = True
    backstop.start()
    try:
        await anyio.sleep(grace)
        scope.cancel()
        await anyio.sleep(margin)
        logger.critical("still running %.1f s after the stop; ending the process\n%s", grace + margin, task_stacks())
        exit_process(EXIT_STUCK)
    finally:
        backstop.cancel()


def _exit_blocked(exit_process: Callable[[int], object], code: int = EXIT_STUCK) -> None:
    logger.critical("the event loop is blocked; ending the process")
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    exit_process(code)


def task_stacks() -> str:
    """All tasks of this event loop, and of asyncio loops hosted in it, with the line each one waits at, innermost last."""
    parts = []
    tasks = [(task.name, task.coro) for task in anyio.get_running_tasks()]
    for name, coroutine in (*tasks, *hosted_tasks()):
        parts.append(f"task {name}:\n")
        parts.extend(traceback.StackSummary.from_list(_frames(coroutine)).format())
    return "".join(parts)


def _frames(coroutine: Any) -> list[traceback.FrameSummary]:
    found = []
    while coroutine is not None:
        frame = _first(coroutine, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            code = frame.f_code
            found.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))
        coroutine = _first(coroutine, "cr_await", "gi_yieldfrom", "ag_await")
    # How the event loop waits says nothing about who waits, and would be most of the text.
    return [each for each in found if not _LIBRARY.intersection(Path(each.filename).parts)] or found[-1:]


def _first(value: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(value, name, None)) is not None), None)


async def stop_on_signal(
    stop: StopEvent,
    *,
    blocked_after: float = math.inf,
    exit_process: Callable[[int], object] = os._exit,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """The first SIGINT or SIGTERM sets `stop`; the second ends the process at once with 128 + its number.

    Run it as a helper in the main thread; it reports started once it listens and ends by cancellation.

    Args:
        blocked_after: Seconds after the first signal by which an event loop that has not heard it counts as blocked: the
            stacks are written to stderr and the process ends with EXIT_STUCK. A second signal does not wait for it.
    """
    with (
        anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        _hearing_for_a_blocked_loop(stop, blocked_after, exit_process),
    ):
        task_status.started()
        async for received in signals:
            if stop.is_set():
                logger.warning("%s again: ending at once", received.name)
                exit_process(EXIT_SIGNAL_BASE + received)
            else:
                logger.info("%s: stopping; once more ends at once", received.name)
                stop.set()


class _NobodyListens(Exception):
    """The block was left."""


@contextmanager
def _hearing_for_a_blocked_loop(
    stop: StopEvent, blocked_after: float, exit_process: Callable[[int], object]
) -> Iterator[None]:
    """Handlers of the interpreter run in the middle of what blocks the loop, where that is Python; the loop's own reaction
    to a signal is for its next turn, which may never come. They may have interrupted anything, the start of a thread too:
    so they do no more than put a number where a thread waits for it."""
    of_the_loop = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def hear(number: int, frame: FrameType | None) -> None:
        heard.put(number)
        theirs = of_the_loop[signal.Signals(number)]
        if callable(theirs):
            theirs(number, frame)

    def wait_signal(seconds: float = math.inf) -> int:
        """The number of the next signal, 0 if none comes in time."""
        try:
            number = heard.get(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))
        except queue.Empty:
            return 0
        if number is None:
            raise _NobodyListens
        return number

    def watch() -> None:
        first = wait_signal()
        again = wait_signal(_LOOP_TURN)
        if not again and not stop.is_set():
            logger.warning("%s: a step blocks the event loop; once more ends at once", signal.Signals(first).name)
            again = wait_signal(blocked_after - _LOOP_TURN)
            if not again and not stop.is_set():
                _exit_blocked(exit_process, EXIT_STUCK)
                return
        again = again or wait_signal()
        wait_signal(_LOOP_TURN)
        _exit_blocked(exit_process, EXIT_SIGNAL_BASE + again)

    def watch_until_nobody_listens() -> None:
        with suppress(_NobodyListens):
            watch()

    threading.Thread(target=watch_until_nobody_listens, name="signals for a blocked loop", daemon=True).start()
    for number in of_the_loop:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in of_the_loop.items():
            signal.signal(number, handler)
        heard.put(None)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before attempt n: doubling from `initial` to `maximum`, of which a random half may be left out.

    Args:
        healthy_after: Seconds of running after which a failure counts as the first one again.
        jitter: Gives numbers from 0 to 1; 1 means the full delay.
    """

    initial: float = 0.1
    maximum: float = 5.0
    healthy_after: float = 60.0
    jitter: Callable[[], float] = random.random

    def delay(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row (from 1)."""
        full = min(self.maximum, self.initial * 2.0 ** min(failures - 1, 60))
        return full * (0.5 + 0.5 * self.jitter())


async def restart(
    fn: Callable[[], Awaitable[None]],
    *,
    retry_on: type[Exception] | tuple[type[Exception], ...],
    what: str,
    backoff: Backoff | None = None,
) -> None:
    """Run `fn` until it returns; when it fails with `retry_on`, wait and run it again, for ever.

    Anything else it raises comes out, also an ExceptionGroup with anything else in it. `what` names it in the log.
    """
    backoff = backoff or Backoff()
    failures = 0
    while True:
        started = anyio.current_time()
        try:
            await fn()
        except Exception as error:
            if not _all_are(error, retry_on):
                raise
            failures = 1 if anyio.current_time() - started >= backoff.healthy_after else failures + 1
            delay = backoff.delay(failures)
            logger.warning("%s failed (%d in a row), again in %.2f s: %s", what, failures, delay, error)
        else:
            return
        await anyio.sleep(delay)


def _all_are(error: Exception, kinds: type[Exception] | tuple[type[Exception], ...]) -> bool:
    if isinstance(error, ExceptionGroup) and not isinstance(error, kinds):
        return all(_all_are(member, kinds) for member in error.exceptions)
    return isinstance(error, kinds)
