"""A store that fails where a test says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final, Self, TypeVar

from ..abc import Store
from ..exceptions import StoreUnavailable
from .call_faults import CallFaults

T = TypeVar("T")

WRITES: Final = (
    "put_service",
    "delete_service",
    "delete_instance",
    "heartbeat",
    "create_session",
    "merge_state",
    "delete_session",
    "accept",
    "claim",
    "report",
    "release",
    "request_cancel",
    "expire",
    "send",
    "reap",
    "retry",
    "wake",
    "reclaim",
    "purge",
    "put_dead_letter",
)
"""The methods that a fault without a name strikes."""


def _passed_on(name: str) -> Any:
    async def method(self: FaultyStore, *args: Any, **kwargs: Any) -> Any:
        return await self._call(name, partial(getattr(self.inner, name), *args, **kwargs))

    method.__name__ = name
    return method


class FaultyStore(CallFaults, Store):
    """Wraps a store and passes everything on until a test plans a fault; those raise StoreUnavailable, as a store does.

        store = FaultyStore(SqlStore("sqlite://"))
        store.refuse(nth=7)                   # the seventh write from now is not applied
        store.refuse("report", times=3)       # nor are the next three reports
        store.lose_answer("claim")            # the next claim is applied, and its caller is told that it was not
        store.disk_full = True                # no write is applied until it is False; reading goes on
        with store.hang("accept") as hung: await hung.reached.wait(); ...
        store.at_random(seed=1, refuse=0.05, lose_answer=0.05); ...; store.heal()

    A fault without a method strikes any write; with one, reads can be named too.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(WRITES, StoreUnavailable)
        self.inner = inner
        self.disk_full = False

    @property
    def exclusive(self) -> bool:  # type: ignore[override]  # an attribute of the seam
        return self.inner.exclusive

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    def __aexit__(self, *exc_info: object) -> Coroutine[Any, Any, None]:
        return self.inner.__aexit__(*exc_info)

    async def _call(self, method: str, act: Callable[[], Awaitable[T]]) -> T:
        return await super()._call(method, partial(self._with_room, method, act))

    async def _with_room(self, method: str, act: Callable[[], Awaitable[T]]) -> T:
        if self.disk_full and method in WRITES:
            raise StoreUnavailable("The store failed: database or disk is full", hint="Free some space on its disk.")
        return await act()

    def statistics(self) -> Mapping[str, Any]:
        """Those of the wrapped store, and under `faults` how often each kind struck which method."""
        return {**self.inner.statistics(), "faults": self.fault_statistics()}

    put_service = _passed_on("put_service")
    delete_service = _passed_on("delete_service")
    delete_instance = _passed_on("delete_instance")
    get_service = _passed_on("get_service")
    list_services = _passed_on("list_services")
    list_instances = _passed_on("list_instances")
    list_strangers = _passed_on("list_strangers")
    heartbeat = _passed_on("heartbeat")
    create_session = _passed_on("create_session")
    get_session = _passed_on("get_session")
    list_sessions = _passed_on("list_sessions")
    merge_state = _passed_on("merge_state")
    delete_session = _passed_on("delete_session")
    accept = _passed_on("accept")
    claim = _passed_on("claim")
    report = _passed_on("report")
    release = _passed_on("release")
    request_cancel = _passed_on("request_cancel")
    expire = _passed_on("expire")
    send = _passed_on("send")
    pull = _passed_on("pull")
    reap = _passed_on("reap")
    due_tickets = _passed_on("due_tickets")
    retry = _passed_on("retry")
    wake = _passed_on("wake")
    next_due = _passed_on("next_due")
    reclaim = _passed_on("reclaim")
    purge = _passed_on("purge")
    count_queued = _passed_on("count_queued")
    put_dead_letter = _passed_on("put_dead_letter")
    list_dead_letters = _passed_on("list_dead_letters")
    get_task = _passed_on("get_task")
    list_tasks = _passed_on("list_tasks")
    read_events = _passed_on("read_events")
    count_tasks = _passed_on("count_tasks")
    oldest_queued = _passed_on("oldest_queued")
