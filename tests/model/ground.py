"""What the world stands on: the store, what it has promised, a clock, a queue; and what happens to tasks from outside."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol.records import EventRecord, NewTask, SessionRecord, TaskFilter, Ticket
from llama_corral.stores import SqlStore
from llama_corral.stores.recovery_units import RETRIED
from llama_corral.stores.upkeep_units import ROWS_A_TASK

from .promised import Life, Promised

T = TypeVar("T")

SESSIONS: Final = {"e": "enqueue", "r": "reject", "c": "concurrent"}


def pick_from(items: Iterable[T], pick: int) -> T | None:
    found = list(items)
    return found[pick % len(found)] if found else None


class Ground:
    """Every call to the store is told to `promised`, and its answer compared."""

    def __init__(self, store: SqlStore) -> None:
        self.store = store
        self.promised = Promised()
        self.now = 1_000.0
        self.tickets: list[Ticket] = []
        self.gone: list[NewTask] = []
        """Accepted once, and deleted since."""
        self.cursors: dict[tuple[str, int], tuple[Life | None, list[str]]] = {}
        """How far readers have read, and of which life of a task."""
        self._numbers = 0

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def payloads(self, count: int) -> tuple[EventRecord, ...]:
        return tuple(EventRecord("E", f'{{"n":{self.number()}}}') for _ in range(count))

    def life_of(self, pick: int) -> Life | None:
        """The newest open tasks first: most of what happens, happens to them."""
        newest = list(self.promised.lives.values())[::-1]
        return pick_from(sorted(newest, key=lambda life: not life.is_open), pick)

    # The queue

    def publish(self, tickets: Iterable[Ticket], *, lost: bool = False) -> None:
        tickets = list(tickets)
        assert {ticket.task_id for ticket in tickets} <= self.promised.lives.keys()
        assert self.promised.newly_queued() <= {ticket.task_id for ticket in tickets}, "P5: the answer says what is due"
        if not lost:
            self.tickets += tickets

    # Sessions

    async def create_session(self, session_id: str) -> None:
        policy: Any = SESSIONS[session_id]
        created = await self.store.create_session(SessionRecord(session_id, policy=policy, created_at=self.now))
        assert created == (session_id not in self.promised.policies)
        self.promised.policies[session_id] = policy

    async def delete_session(self, session_id: str) -> None:
        lives = tuple(self.promised.lives.values())
        expected = self.promised.delete_session(session_id)
        self.gone += [life.task for life in lives if life.task.task_id not in self.promised.lives]
        deleted = await self.store.delete_session(session_id)
        assert (None if deleted is None else set(deleted.running)) == expected
        self.tickets = [ticket for ticket in self.tickets if ticket.task_id in self.promised.lives]

    # From outside

    async def cancel(self, task_id: str) -> None:
        expected = self.promised.cancel(task_id)
        answer = await self._ask(lambda: self.store.request_cancel(task_id, self.now), expected)
        if answer is not None:
            assert answer.ended == (expected == "ended")
            self.publish(answer.tickets)

    async def send(self, task_id: str) -> None:
        payload = f'{{"n":{self.number()}}}'
        expected = self.promised.send(task_id, payload)
        answer = await self._ask(lambda: self.store.send(task_id, payload, self.now), expected)
        if answer is not None:
            life = self.promised.lives[task_id]
            assert answer.seq == len(life.inbox)
            assert answer.owner == life.owner
            self.publish(answer.tickets)

    @staticmethod
    async def _ask(call: Callable[[], Any], expected: str) -> Any:
        try:
            answer = await call()
        except NotFound:
            assert expected == "unknown"
            return None
        except Conflict:
            assert expected == "too late"
            return None
        assert expected not in ("unknown", "too late")
        return answer

    async def expire(self) -> None:
        expected = self.promised.expire(self.now)
        answers = await self.store.expire(self.now)
        assert {answer.task_id for answer in answers} == expected
        self.publish(ticket for answer in answers for ticket in answer.tickets)

    async def wake(self) -> None:
        expected = self.promised.wake(self.now)
        tickets = await self.store.wake(self.now)
        assert {ticket.task_id for ticket in tickets} == expected
        self.publish(tickets)

    async def retry(self, task_id: str, *, fresh: bool) -> None:
        new_id = str(uuid.uuid5(RETRIED, task_id))
        expected = self.promised.retry(task_id, new_id, self.now, fresh)
        try:
            accepted = await self.store.retry(task_id, self.now, fresh=fresh)
        except NotFound:
            assert expected == "unknown"
        except Conflict:
            assert expected == "refused"
        else:
            assert (accepted.task_id, accepted.created, expected) in (
                (new_id, True, "created"),
                (new_id, False, "known"),
            )
            assert accepted.status == self.promised.lives[new_id].stored_status

    async def purge(self, age: float, limit: int) -> None:
        before = self.now - age
        removable = self.promised.ended_before(before)
        gone = await self.store.purge(before, limit=limit)
        most = min(limit, len(removable))
        if sum(len(life.log) for life in removable) <= limit * ROWS_A_TASK:
            assert gone == most
        else:
            assert min(1, most) <= gone <= most  # fewer where they have many events
        left = {record.task_id for record in await self.store.list_tasks(TaskFilter(limit=100_000))}
        removed = [life for life in removable if life.task.task_id not in left]
        assert [life.finished_at for life in removed] == [life.finished_at for life in removable[:gone]]
        for life in removed:
            self.promised.forget(life)
            self.gone.append(life.task)

    async def read(self, task_id: str, reader: int, limit: int) -> None:
        """A reader goes on from its cursor."""
        life = self.promised.lives.get(task_id)
        of, seen = self.cursors.get((task_id, reader), (life, []))
        if of is not life:  # the id was deleted and accepted again
            seen = []
        self.cursors[task_id, reader] = (life, seen)
        page = await self.store.read_events(task_id, len(seen), limit)
        assert (page is None) == (life is None)
        if page is not None and life is not None:
            seen += [event.payload for event in page.events]
            assert seen == [payload for _, payload in life.log][: len(seen)]
            assert page.record.event_count == len(life.log)
