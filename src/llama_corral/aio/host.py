"""An asyncio loop inside Trio, and calls into it.

One loop serves a whole process: open it outermost (`open_asyncio_loop`), before the task groups whose tasks call into
it. Whoever finds a loop uses it; it is opened only where there is none.

trio-asyncio is imported when the first loop is opened, and not before: importing it replaces functions of asyncio, and a
program that runs on asyncio shall run on plain asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from types import CodeType, ModuleType
from typing import Any, TypeVar

import sniffio
import trio

T = TypeVar("T")

logger = logging.getLogger(__name__)

_owned: ContextVar[set[asyncio.Task[Any]] | None] = ContextVar("llama_corral_owned_tasks", default=None)

_free: set[CodeType] = set()

_open_loops: dict[asyncio.AbstractEventLoop, int] = {}
"""The hosted loops, each with the thread that runs it."""

ORPHAN_GRACE = 5.0
"""Seconds that a task left behind by a call may take to unwind after its cancellation."""


class SelfCancelled(RuntimeError):
    """A call ended with asyncio.CancelledError although nobody had cancelled it."""


def has_asyncio_loop() -> bool:
    """Whether asyncio code can be called from here: always on asyncio, on Trio inside `open_asyncio_loop`."""
    return sniffio.current_async_library() == "asyncio" or _hosted_loop() is not None


def _hosted_loop() -> Any:
    """The loop that Trio hosts around the caller, or None."""
    trio_asyncio = sys.modules.get("trio_asyncio")
    return trio_asyncio.current_loop.get() if trio_asyncio is not None else None


def hosted_tasks() -> list[tuple[str, Any]]:
    """Name and coroutine of each unfinished asyncio task that Trio hosts in this thread: its own tasks do not show them."""
    loops = [loop for loop, thread in _open_loops.items() if thread == threading.get_ident()]
    return [(task.get_name(), task.get_coro()) for loop in loops for task in asyncio.all_tasks(loop)]


_REPLACED = ("_get_running_loop", "get_running_loop", "get_event_loop", "current_task")


def _import_trio_asyncio() -> Any:
    if "trio_asyncio" in sys.modules:
        return sys.modules["trio_asyncio"]
    policy = asyncio.get_event_loop_policy()
    originals = {id(getattr(asyncio, name)): name for name in _REPLACED}
    import trio_asyncio
    import trio_asyncio._loop as internals

    # It replaces these functions in asyncio and misses the modules that took them from there before, AnyIO's asyncio
    # backend for one. They would not find the loop.
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in ("asyncio", "trio_asyncio") and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if id(value) in originals:
                    setattr(module, attribute, getattr(asyncio, originals[id(value)]))
    # It also makes loops of its own for every asyncio.run() of the process, in other threads too, unless a policy was
    # set in that thread. This is the thread-local's default, so that plain asyncio stays what it was.
    internals._FakedPolicy.policy = policy
    return trio_asyncio


@contextlib.asynccontextmanager
async def open_asyncio_loop() -> AsyncIterator[None]:
    """Make asyncio code callable inside the block. Nothing happens where that is so already.

    On Trio the block must be the outermost one: task groups whose tasks call asyncio code are opened inside it, because
    leaving it ends the loop, and tasks inherit the loop from where they are started.
    """
    if has_asyncio_loop():
        yield
        return
    error: BaseException | None = None
    async with _import_trio_asyncio().open_loop() as loop:
        # By default an error that asyncio only logs ends a hosted loop: one step's forgotten future would end them all.
        loop.set_exception_handler(_log_error)
        loop._timer_handle_cancelled = _TimerSweep(loop)
        _open_loops[loop] = threading.get_ident()
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            error = exc  # the loop's task group would wrap the block's own error in a group
        finally:
            del _open_loops[loop]
            # Tasks that belong to no call (`kept_tasks`) belong to the loop.
            left = {task for task in asyncio.all_tasks(loop) if not task.done()}
            if left:
                with trio.CancelScope(shield=True):  # bounded: see _end_orphans
                    await loop.run_aio_coroutine(_end_orphans(left))  # noqa: ASYNC102
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback holds this frame


class _TimerSweep:
    """Takes cancelled timers out of a hosted loop's heap, as asyncio's own loop does.

    trio-asyncio leaves them until they would have been due, with a copy of the context variables of whoever made them: an
    `asyncio.timeout(3600)` around a call of a millisecond would be kept for an hour.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._cancelled = 0

    def __call__(self, handle: asyncio.TimerHandle) -> None:
        timers = self._loop._timers
        self._cancelled += 1
        if self._cancelled > 100 and self._cancelled * 2 > len(timers):
            timers[:] = [timer for timer in timers if not timer.cancelled()]
            heapq.heapify(timers)
            self._cancelled = 0


def _log_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Not super() nor loop.default_exception_handler(): those are trio-asyncio's, which raise.
    asyncio.BaseEventLoop.default_exception_handler(loop, context)  # type: ignore[arg-type]


def _create_owned_task(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
) -> asyncio.Task[Any]:
    """Tie every asyncio task to the call that created it, so that none outlives its step (P6)."""
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **kwargs)
    owned = _owned.get()
    if owned is not None and getattr(coro, "cr_code", None) not in _free:
        owned.add(task)
        task.add_done_callback(owned.discard)
    return task


def _owning_loop() -> Any:
    """The hosted loop, or None. Also a loop that somebody else opened ties tasks to calls from its first one on."""
    loop = _hosted_loop()
    if loop is not None and loop.get_task_factory() is None:
        loop.set_task_factory(_create_owned_task)
    return loop


def free_tasks_of(function: Callable[..., Any]) -> None:
    """Let tasks that run this coroutine function belong to no call. It must end by itself."""
    _free.add(function.__code__)


@contextlib.contextmanager
def kept_tasks() -> Iterator[None]:
    """Asyncio tasks that are created inside the block live as long as the loop, not as long as the call around: the
    block makes something that others go on using."""
    token = _owned.set(None)
    try:
        yield
    finally:
        _owned.reset(token)


async def call_asyncio(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await `fn(*args)` as asyncio code and return what it returns.

    Called from Trio, it needs a loop (`open_asyncio_loop`); tasks that `fn` leaves behind are cancelled and awaited
    before the call returns. Called from asyncio, it is a plain await.

    Raises:
        SelfCancelled: `fn` raised asyncio.CancelledError although nobody had cancelled the call. Passed on as a
            cancellation it would leave a caller waiting that nobody told to stop.
    """
    if sniffio.current_async_library() == "asyncio":
        return await _await_here(fn, args)
    loop = _owning_loop()
    if loop is None:
        raise RuntimeError("no asyncio loop: open one with llama_corral.aio.open_asyncio_loop() around this block")
    exits: list[SystemExit] = []
    try:
        result: T = await loop.run_aio_coroutine(_with_owned_tasks(fn, args, exits))
    except asyncio.CancelledError as exc:
        # Not Trio's cancellation: that would have come as trio.Cancelled.
        raise SelfCancelled("the asyncio code cancelled itself") from exc  # noqa: ASYNC104
    if exits:
        raise exits[0]
    return result


async def call_native(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await `fn(*args)` as code of the caller's library and return what it returns.

    Where Trio hosts an asyncio loop, native code can create asyncio tasks although it cannot await them: they too are
    cancelled and awaited before the call returns.
    """
    if sniffio.thread_local.name != "trio" or (loop := _owning_loop()) is None:
        return await fn(*args)
    owned: set[asyncio.Task[Any]] = set()
    token = _owned.set(owned)
    try:
        return await fn(*args)
    finally:
        _owned.reset(token)
        if owned:
            with trio.CancelScope(shield=True):  # bounded: see _end_orphans
                await loop.run_aio_coroutine(_end_orphans(owned))


async def await_in(backend: str, fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await `fn(*args)` in the library that drives the caller's thread ("trio" or "asyncio"), whatever the caller speaks.

    Where Trio hosts an asyncio loop, something that lives on one side is awaited from the other with this.
    """
    here = sniffio.current_async_library()
    if here == backend:
        return await fn(*args)
    if here == "trio":
        return await call_asyncio(fn, *args)
    result: T = await _hosted_loop().trio_as_future(fn, *args)
    return result


async def _await_here(fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    try:
        return await fn(*args)
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling() == 0:
            raise SelfCancelled("the asyncio code cancelled itself") from exc  # noqa: ASYNC104
        raise


async def _with_owned_tasks(
    fn: Callable[..., Awaitable[T]], args: tuple[Any, ...], exits: list[SystemExit]
) -> T | None:
    owned: set[asyncio.Task[Any]] = set()
    _owned.set(owned)  # the context is this task's own copy, so there is nothing to reset
    try:
        return await fn(*args)
    except SystemExit as exc:
        exits.append(exc)  # it is the caller's: out of an asyncio task it would end the loop, and every call with it
        return None
    finally:
        if owned:
            await _end_orphans(owned)  # noqa: ASYNC102 -- bounded, and it goes on when it is cancelled


async def _end_orphans(owned: set[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they unwound, for a limited time. A cancellation meanwhile is raised afterwards:
    tasks that nobody waits for would outlive their step."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ORPHAN_GRACE
    cancelled: asyncio.CancelledError | None = None
    cancelled_once: set[asyncio.Task[Any]] = set()
    while owned and loop.time() < deadline:
        for task in owned - cancelled_once:  # unwinding may have created more
            task.cancel()
            cancelled_once.add(task)
        try:
            done, _ = await asyncio.wait(
                set(owned), timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError as exc:  # noqa: ASYNC103 -- raised when the tasks have ended
            cancelled = exc
            continue  # noqa: ASYNC104
        for task in done:
            owned.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("asyncio task %r, left behind by its step, failed", task.get_name(), exc_info=error)
    for task in owned:
        logger.error("asyncio task %r was left behind by its step and does not end", task.get_name())
    if cancelled is not None:
        raise cancelled
