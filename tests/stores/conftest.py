"""The stores that the contract is tested on, and a driver that keeps tests to what they are about."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_corral.abc import Store
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import (
    Accepted,
    Checkpoint,
    Claim,
    ClaimRequest,
    ContextUpdate,
    EventRecord,
    InstanceRecord,
    NewTask,
    Report,
    ReportAnswer,
    ServiceRecord,
    SessionRecord,
    Terminal,
)
from llama_corral.stores import SqlStore

from .postgres import Place, open_place


class Driver:
    """A store with short words for what tests do to tasks."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def session(self, session_id: str = "s", policy: Any = "enqueue", **more: Any) -> None:
        assert await self.store.create_session(SessionRecord(session_id, policy=policy, **more))

    async def instance(self, instance_id: str, service_name: str = "svc") -> None:
        service = ServiceRecord(service_name, "{}", 1.0)
        await self.store.put_service(service, InstanceRecord(instance_id, service_name, 8, 1.0))

    async def accept(
        self, task_id: str, session: str | None = None, *, by: str | None = None, service: str = "svc", **more: Any
    ) -> Accepted:
        claim = None if by is None else ClaimRequest(task_id, by, "n", 2.0)
        values = {"input": "{}", "created_at": 1.0, **more}
        return await self.store.accept(NewTask(task_id, service, session_id=session, **values), claim)

    async def claim(self, task_id: str, by: str = "i", nonce: str = "n", now: float = 2.0) -> Claim | None:
        return await self.store.claim(ClaimRequest(task_id, by, nonce, now))

    async def report(self, task_id: str, seq: int = 1, epoch: int = 1, *, events: int = 0, **more: Any) -> ReportAnswer:
        records = tuple(EventRecord("E", f'{{"n":{number}}}') for number in range(events))
        return await self.store.report(Report(task_id, epoch, seq, more.pop("now", 3.0), records, **more))

    async def end(
        self,
        task_id: str,
        seq: int = 1,
        epoch: int = 1,
        *,
        status: TaskStatus = TaskStatus.COMPLETED,
        based_on: int | None = None,
        payload: str = "{}",
        **more: Any,
    ) -> ReportAnswer:
        context = None if based_on is None else ContextUpdate(based_on, payload, "f")
        error = None if status is TaskStatus.COMPLETED else ErrorRecord(type="ValueError", message="no")
        result = '"yes"' if error is None else None
        terminal = Terminal(status, result, "yes" if error is None else "no", error)
        return await self.report(task_id, seq, epoch, terminal=terminal, context=context, **more)

    async def status(self, task_id: str) -> TaskStatus | None:
        record = await self.store.get_task(task_id)
        return None if record is None else record.status

    async def indices(self, task_id: str) -> list[int]:
        page = await self.store.read_events(task_id, 0)
        assert page is not None
        return [event.index for event in page.events]


def checkpoint(snapshot: str = "{}", applied: int = 0) -> Checkpoint:
    return Checkpoint(snapshot, applied, "f")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'corral.db'}"


@pytest.fixture(scope="session")
def _place() -> Iterator[Place]:
    with open_place() as place:
        yield place


@pytest.fixture
def place(_place: Place) -> Place:
    """A schema of a PostgreSQL database, with empty tables or none."""
    _place.empty()
    return _place


@pytest.fixture
def new_place() -> Iterator[Place]:
    """A schema that nobody has used."""
    with open_place() as place:
        yield place


@pytest.fixture(params=["memory", "file", "postgres"])
async def store(request: pytest.FixtureRequest, url: str) -> AsyncIterator[SqlStore]:
    if request.param == "postgres":
        url = request.getfixturevalue("place").url
    async with SqlStore("sqlite://" if request.param == "memory" else url) as opened:
        yield opened


@pytest.fixture
async def file_store(url: str) -> AsyncIterator[SqlStore]:
    async with SqlStore(url) as opened:
        yield opened


@pytest.fixture
def driver(store: SqlStore) -> Driver:
    return Driver(store)


@pytest.fixture
def driver_of() -> type[Driver]:
    return Driver
