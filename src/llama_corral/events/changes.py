"""Who waits for news about a task, inside this process.

Rule for every reader: take the handle first, then look at the store, then wait. What changes between the look and the
wait has then set the handle already, so that the wait returns at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint


class Watch:
    """A handle of one task's news, for one reader: `with changes.watch(task_id) as watch: ...`.

    It counts from the moment at which the block is entered until it is left; it may be entered again.
    """

    __slots__ = ("_changes", "_event", "_news", "endings_only", "task_id")

    def __init__(self, changes: Changes, task_id: str, *, endings_only: bool) -> None:
        self.task_id = task_id
        self.endings_only = endings_only
        self._changes = changes
        self._news = False
        self._event: anyio.Event | None = None

    def __enter__(self) -> Self:
        self._news = False
        self._changes._add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._changes._remove(self)

    @property
    def has_news(self) -> bool:
        """True if `wait` would return at once."""
        return self._news

    async def wait(self) -> None:
        """Return when something has changed since the block was entered or the last `wait` returned: read again then.

        Several changes are one piece of news. Cancelling the call loses none.
        """
        if self._news:
            await checkpoint()
        else:
            self._event = anyio.Event()
            try:
                await self._event.wait()
            finally:
                self._event = None
        self._news = False

    def _wake(self) -> None:
        self._news = True
        if self._event is not None:
            self._event.set()


class Changes:
    """The readers of this process by task. It holds nothing about a task that nobody watches.

    Whoever changes a task in the store calls `notify` after the commit. Several control planes on one store broadcast
    what they commit and call `notify` for what they hear, and `notify_all` whenever they have (re)subscribed, because
    what happened before is unknown.
    """

    def __init__(self) -> None:
        # Dicts as ordered sets: who came first is woken first.
        self._watches: dict[str, dict[Watch, None]] = {}
        self.draining = False

    def watch(self, task_id: str, *, endings_only: bool = False) -> Watch:
        """A handle to enter *before* the store is read. `endings_only` spares a reader of results what is no ending."""
        return Watch(self, task_id, endings_only=endings_only)

    def notify(self, task_id: str, *, ended: bool = True) -> None:
        """Wake the watchers of a task; O(watchers). `ended=False` only if the change certainly is no ending."""
        for watch in self._watches.get(task_id, ()):
            if ended or not watch.endings_only:
                watch._wake()

    def notify_all(self) -> None:
        """Wake everybody: something may have changed that nobody told us."""
        for watches in self._watches.values():
            for watch in watches:
                watch._wake()

    def drain(self) -> None:
        """The process stops: readers deliver what is stored and end. For good; a reader that begins later ends too."""
        self.draining = True
        self.notify_all()

    def statistics(self) -> Mapping[str, Any]:
        return {"tasks": len(self._watches), "watches": sum(map(len, self._watches.values()))}

    def _add(self, watch: Watch) -> None:
        self._watches.setdefault(watch.task_id, {})[watch] = None

    def _remove(self, watch: Watch) -> None:
        watches = self._watches.get(watch.task_id)
        if watches is not None:
            watches.pop(watch, None)
            if not watches:
                del self._watches[watch.task_id]
