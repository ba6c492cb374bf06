"""Several control planes on one database: what they do at the same moment comes out as if one had come after the other."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest

from llama_corral.exceptions import Conflict, NotFound, StoreUnavailable, UsageError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import (
    Accepted,
    Checkpoint,
    ClaimRequest,
    DeadLetter,
    HeldTask,
    NewTask,
    SessionRecord,
)
from llama_corral.stores import SqlStore, upkeep_units

from ..services.rig import until
from .postgres import Place
from .test_invariants import INSTANCES, SESSIONS, Life

S = TaskStatus
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "trio"  # one is enough: what meets here are transactions


@pytest.fixture
async def planes(place: Place, driver_of: Any) -> AsyncIterator[list[Any]]:
    """Drivers of three stores on one database."""
    async with AsyncExitStack() as stack:
        yield [driver_of(await stack.enter_async_context(SqlStore(place.url))) for _ in range(3)]


@pytest.fixture
def raw(place: Place) -> Any:
    """Another client of the database, whose transactions last as long as a test likes."""
    connection = place.psycopg.connect(place.url, autocommit=True)
    yield connection
    connection.close()


async def at_once(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """The results of calls side by side, or what they raised."""
    results: list[Any] = [None] * len(calls)

    async def call(number: int) -> None:
        try:
            results[number] = await calls[number]()
        except Exception as error:
            results[number] = error

    async with anyio.create_task_group() as tasks:
        for number in range(len(calls)):
            tasks.start_soon(call, number)
    return results


async def wait_blocked_by(raw: Any, place: Place, count: int = 1) -> None:
    """Return when so many other transactions wait for that of `raw`."""
    blocked = f"SELECT count(*) FROM pg_stat_activity WHERE {raw.info.backend_pid} = ANY (pg_blocking_pids(pid))"
    await until(lambda: place.execute(blocked)[0][0] >= count)


# One of many


@pytest.mark.promise("P2")
async def test_a_task_that_all_accept_is_accepted_once(planes: list[Any]) -> None:
    async def accept(driver: Any, number: int) -> Accepted:
        return await driver.accept(f"t{number}", digest="d", by="i" if number % 2 else None)

    calls = [lambda driver=driver, number=number: accept(driver, number) for number in range(40) for driver in planes]
    results = await at_once(*calls)
    assert Counter(result.task_id for result in results if result.created) == {f"t{n}": 1 for n in range(40)}
    assert len(await planes[0].store.due_tickets()) == 20


@pytest.mark.promise("P2")
async def test_a_ticket_that_all_claim_is_claimed_once(planes: list[Any]) -> None:
    for number in range(40):
        await planes[0].accept(f"t{number}")
    calls = [
        lambda driver=driver, number=number, name=name: driver.claim(f"t{number}", by=name, nonce=name)
        for number in range(40)
        for driver, name in zip(planes, INSTANCES, strict=True)
    ]
    claims = [claim for claim in await at_once(*calls) if claim is not None]
    assert sorted(claim.task_id for claim in claims) == sorted(f"t{number}" for number in range(40))
    assert {claim.epoch for claim in claims} == {1}


@pytest.mark.promise("P4")
async def test_the_policy_reject_lets_one_in(planes: list[Any]) -> None:
    for number in range(10):
        await planes[0].session(f"s{number}", policy="reject")
    calls = [
        lambda driver=driver, number=number, name=name: driver.accept(f"{number}{name}", f"s{number}")
        for number in range(10)
        for driver, name in zip(planes, "abc", strict=True)
    ]
    results = await at_once(*calls)
    assert Counter(type(result) for result in results) == {Accepted: 10, Conflict: 20}
    assert {result.session_id for result in results if isinstance(result, Accepted)} == {f"s{n}" for n in range(10)}


@pytest.mark.promise("P1")
async def test_of_an_ending_a_cancel_and_a_reaper_one_wins(planes: list[Any]) -> None:
    first, second, third = planes
    await first.session()
    for number in range(20):
        await first.accept(f"t{number}", by="i", max_attempts=1)
        await second.store.request_cancel(f"t{number}", 2.5)
    answers = await at_once(
        *(lambda number=number: first.end(f"t{number}", events=1) for number in range(20)),
        lambda: second.store.reap(["i"], 4.0),
        lambda: third.store.reap(["i"], 4.0),
    )
    reaped = [answer.task_id for each in answers[20:] for answer in each.ended]
    ended = [f"t{number}" for number, answer in enumerate(answers[:20]) if answer.status == "ok"]
    assert sorted(ended + reaped) == sorted(f"t{number}" for number in range(20))
    for task_id in ended:
        assert await third.status(task_id) is S.COMPLETED
    for task_id in reaped:
        assert await third.status(task_id) is S.CANCELLED
        assert await third.indices(task_id) == []


@pytest.mark.promise("P2")
async def test_a_repetition_that_all_ask_for_is_one_task(planes: list[Any]) -> None:
    first = planes[0]
    await first.session()
    for number in range(10):
        await first.accept(f"t{number}", "s", by="i")
        await first.store.send(f"t{number}", "mail", 2.0)
        await first.end(f"t{number}", status=S.FAILED)
    calls = [
        lambda driver=driver, number=number: driver.store.retry(f"t{number}", 9.0)
        for number in range(10)
        for driver in planes
    ]
    results = await at_once(*calls)
    assert sum(result.created for result in results) == len({result.task_id for result in results}) == 10
    line = [await first.status(result.task_id) for result in results]
    assert Counter(line) == {S.QUEUED: 3, S.HELD: 27}


# Nothing is lost


async def test_merges_and_heartbeats_of_all_stand(planes: list[Any]) -> None:
    await planes[0].session()
    await planes[0].instance("i")
    calls = [
        call
        for number in range(10)
        for plane, driver in enumerate(planes)
        for call in (
            lambda store=driver.store, key=f"{number} {plane}": store.merge_state("s", {key: 1}),
            lambda store=driver.store: store.heartbeat("i", []),
        )
    ]
    assert not [result for result in await at_once(*calls) if isinstance(result, Exception)]
    record = await planes[0].store.get_session("s")
    assert (len(json.loads(record.state)), record.version) == (30, 30)
    assert [instance.heartbeat for instance in await planes[0].store.list_instances()] == [30]


async def test_events_of_all_are_in_one_inbox(planes: list[Any]) -> None:
    await planes[0].accept("t", by="i")
    calls = [lambda store=driver.store: store.send("t", "e", 2.0) for driver in planes * 10]
    assert sorted(result.seq for result in await at_once(*calls)) == list(range(1, 31))
    page = await planes[1].store.pull("t", 1, 0)
    assert [event.seq for event in page.events] == list(range(1, 31))


@pytest.mark.promise("P12")
async def test_of_dead_letters_of_all_the_newest_stay(planes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep_units, "DEAD_LETTERS", 3)
    letters = [DeadLetter("topic", "reason", str(number), 1.0) for number in range(30)]
    await at_once(
        *(lambda letter=letter, n=n: planes[n % 3].store.put_dead_letter(letter) for n, letter in enumerate(letters))
    )
    assert [letter.no for letter in await planes[0].store.list_dead_letters()] == [30, 29, 28]


# Upkeep by all of them


async def sleeping(driver: Any, task_id: str) -> None:
    await driver.accept(task_id, by="i")
    await driver.store.release(task_id, 1, Checkpoint("s", 0), 3.0, idle=True, wake_at=5.0)


@pytest.mark.promise("P1", "P2")
async def test_what_is_due_is_done_once(planes: list[Any]) -> None:
    first = planes[0]
    for number in range(12):
        await sleeping(first, f"asleep{number}")
        await first.session(f"s{number % 3}") if number < 3 else None
        await first.accept(f"line{number}", f"s{number % 3}", deadline=5.0)
        await first.accept(f"late{number}", deadline=5.0)
    woken, ended = [], []
    for rounds in range(4):
        results = await at_once(
            *(lambda store=driver.store: store.wake(6.0, limit=3) for driver in planes),
            *(lambda store=driver.store: store.expire(6.0, limit=5) for driver in planes),
        )
        assert not [result for result in results if isinstance(result, Exception)], rounds
        woken += [ticket.task_id for tickets in results[:3] for ticket in tickets]
        ended += [answer.task_id for answers in results[3:] for answer in answers]
    assert sorted(woken) == sorted(f"asleep{number}" for number in range(12))
    assert sorted(ended) == sorted(f"{kind}{number}" for number in range(12) for kind in ("line", "late"))


async def test_a_look_that_comes_second_waits_for_the_first(planes: list[Any], raw: Any, place: Place) -> None:
    """Fewer than the limit means that nothing else is due: not that somebody else was just at it, and gave up."""
    driver = planes[0]
    await sleeping(driver, "asleep")
    await driver.accept("late", deadline=5.0)
    results: list[Any] = []

    async def look() -> None:
        results.extend(await at_once(lambda: driver.store.wake(6.0), lambda: planes[1].store.expire(6.0)))

    async with anyio.create_task_group() as tasks:
        raw.execute("BEGIN; UPDATE corral_tasks SET inbox_head = inbox_head")
        tasks.start_soon(look)
        await wait_blocked_by(raw, place, 2)
        raw.execute("ROLLBACK")
    assert [[each.task_id for each in result] for result in results] == [["asleep"], ["late"]]


async def test_retention_by_all_removes_everything_once(planes: list[Any]) -> None:
    for number in range(40):
        await planes[0].accept(f"t{number}", by="i", digest="d")
        await planes[0].end(f"t{number}", events=2)
        await planes[0].store.put_dead_letter(DeadLetter("topic", "reason", "1", 1.0))

    async def purge(driver: Any) -> int:
        taken = 0
        while (some := await driver.store.purge(100.0, limit=7)) > 0:
            taken += some
        return taken

    assert sum(await at_once(*(lambda driver=driver: purge(driver) for driver in planes))) == 80
    assert (await planes[0].accept("t1", by="i", digest="d")).claim.epoch == 3


async def test_a_removed_id_that_comes_again_begins_behind_every_epoch(
    planes: list[Any], raw: Any, place: Place
) -> None:
    """Somebody removes the task, and has not committed when it is accepted again."""
    driver = planes[0]
    await driver.accept("t", by="i", digest="d")
    await driver.end("t")
    results: list[Any] = []

    async def accept() -> None:
        results.append(await driver.accept("t", by="j", digest="d"))

    async with anyio.create_task_group() as tasks:
        raw.execute("BEGIN; INSERT INTO corral_meta VALUES ('used_epochs', '8'); DELETE FROM corral_tasks")
        tasks.start_soon(accept)
        await wait_blocked_by(raw, place)
        raw.execute("COMMIT")
    assert (results[0].created, results[0].claim.epoch) == (True, 9)
    assert (await driver.store.get_task("t")).epoch == 9


async def test_used_epochs_never_fall(planes: list[Any]) -> None:
    for number, driver in enumerate(planes):
        await driver.session(f"s{number}")
        await driver.accept(f"t{number}", f"s{number}", by="i", digest="d")
        for epoch in range(1, 2 + number):
            await driver.store.release(f"t{number}", epoch, None, 2.0)
            await driver.claim(f"t{number}")
    await at_once(*(lambda n=n, driver=driver: driver.store.delete_session(f"s{n}") for n, driver in enumerate(planes)))
    assert (await planes[0].accept("t0", digest="d", by="i")).claim.epoch == 6


# Sessions


@pytest.mark.promise("P8")
async def test_a_deleted_session_leaves_nothing_behind(planes: list[Any], place: Place) -> None:
    """Tasks are accepted, claimed, ended and repeated in a session while it is deleted."""
    for number in range(15):
        session = f"s{number}"
        await planes[0].session(session)
        await planes[0].accept(f"r{session}", session, by="i")
        await planes[0].accept(f"h{session}", session)
        results = await at_once(
            lambda session=session: planes[0].accept(f"a{session}", session, by="i"),
            lambda session=session: planes[1].store.delete_session(session),
            lambda session=session: planes[2].end(f"r{session}", events=2, based_on=0),
            lambda session=session: planes[0].store.send(f"h{session}", "e", 2.0),
            lambda session=session: planes[2].store.request_cancel(f"h{session}", 2.0),
            lambda session=session: planes[0].store.merge_state(session, {"x": 1}),
        )
        unexpected = [each for each in results if isinstance(each, Exception) and not isinstance(each, UsageError)]
        assert not unexpected
    for table in ("tasks", "task_events", "task_inbox", "contexts", "sessions"):
        assert place.execute(f"SELECT count(*) FROM corral_{table}") == [(0,)], table


async def test_a_session_is_accepted_into_as_long_as_it_is_there(planes: list[Any], raw: Any, place: Place) -> None:
    await planes[0].session()
    results: list[Any] = []

    async def accept() -> None:
        results.extend(await at_once(lambda: planes[0].accept("t", "s")))

    async with anyio.create_task_group() as tasks:
        raw.execute("BEGIN; DELETE FROM corral_sessions")
        tasks.start_soon(accept)
        await wait_blocked_by(raw, place)
        raw.execute("COMMIT")
    assert isinstance(results[0], NotFound)
    assert await planes[0].store.get_task("t") is None


@pytest.mark.promise("P4", "P5")
async def test_a_line_moves_on_whoever_ends_and_whoever_joins(planes: list[Any]) -> None:
    """Each of many tasks is accepted here, claimed there and ended elsewhere, three lines at a time."""
    sessions = ["x", "y", "z"]
    for session in sessions:
        await planes[0].session(session)
    left = Counter(dict.fromkeys(sessions, 15))
    ran: list[str] = []

    async def accept(session: str) -> None:
        for number in range(15):
            await planes[number % 3].accept(f"{session}{number:02}", session)

    async def work(session: str, start: int) -> None:
        driver = planes[start]
        while left[session]:
            for ticket in await driver.store.due_tickets():
                if (
                    ticket.task_id.startswith(session)
                    and await driver.claim(ticket.task_id, by=f"i{start}") is not None
                ):
                    assert (await planes[(start + 1) % 3].end(ticket.task_id, events=1)).status == "ok"
                    ran.append(ticket.task_id)
                    left[session] -= 1

    async with anyio.create_task_group() as tasks:
        for number, session in enumerate(sessions):
            tasks.start_soon(accept, session)
            tasks.start_soon(work, session, number)
            tasks.start_soon(work, session, (number + 1) % 3)
    for session in sessions:
        mine = [task_id for task_id in ran if task_id.startswith(session)]
        assert mine == sorted(mine) == [f"{session}{number:02}" for number in range(15)]


# Everything at once


class SharedLife(Life):
    """Lives of tasks in the hands of several control planes, whose steps are taken at the same time."""

    def __init__(self, drivers: list[Any], seed: int) -> None:
        super().__init__(drivers[0], seed)
        self.drivers = drivers

    async def steps(self, count: int) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                hand = Hand(self, self.random.choice(self.drivers))
                tasks.start_soon(hand.step)

    async def check(self) -> None:
        for task_id in (await self.driver.store.get_session("s") or SessionRecord("s")).task_ids:
            assert task_id in self.ids
        found = await self.store._read(lambda tx: tx.all("SELECT task_id FROM corral_tasks ORDER BY no", {}))
        assert sorted(self.ids) == sorted(task_id for (task_id,) in found)
        self.ids = [task_id for (task_id,) in found]
        await super().check()


class Hand(Life):
    """One step of a `SharedLife`: what it does and remembers is the life's."""

    def __init__(self, life: SharedLife, driver: Any) -> None:
        self.__dict__.update(life.__dict__)
        self.life = life
        self.driver, self.store = driver, driver.store

    async def accept(self, _: str) -> None:
        self.life.number += 1
        self.number = self.life.number - 1
        await super().accept(_)

    async def claim(self, task_id: str) -> None:
        claim = await self.driver.claim(task_id, by=self.random.choice(INSTANCES), nonce=str(self.random.random()))
        if claim is not None:
            known = self.claims.get(task_id, (0, 0))
            self.claims[task_id] = max(known, (claim.epoch, 0))

    async def fail(self, task_id: str) -> None:
        with suppress(AssertionError):  # that nobody else has claimed it since
            await super().fail(task_id)

    async def retry(self, task_id: str) -> None:
        accepted = await self.store.retry(task_id, 5.0, fresh=self.random.random() < 0.5)
        if accepted.created:
            assert accepted.task_id not in self.ids
            self.ids.append(accepted.task_id)


@pytest.mark.promise("P1", "P2", "P3", "P4")
@pytest.mark.parametrize("seed", range(3))
async def test_the_invariants_hold_whatever_several_do_at_once(planes: list[Any], seed: int) -> None:
    life = SharedLife(planes, seed)
    for session_id in SESSIONS:
        if session_id is not None:
            await planes[0].session(session_id)
    for _ in range(40):
        await life.steps(12)
        await life.check()
    assert life.endings
    await life.forget()


# In each other's way


@pytest.mark.promise("P9")
async def test_the_victim_of_a_deadlock_is_tried_again(planes: list[Any], raw: Any, place: Place) -> None:
    driver = planes[0]
    for task_id in ("a", "b"):
        await driver.accept(task_id, by="i")
    results: list[Any] = []

    async def write() -> None:
        # One transaction: it has `a` when it comes to `b`.
        both = [lambda task_id=task_id: driver.report(task_id, events=1) for task_id in ("a", "b")]
        results.extend(await as_one_batch(driver.store, *both))

    raw.execute("SET deadlock_timeout = '20s'; SET lock_timeout = '20s'")  # the other one is to find it
    async with anyio.create_task_group() as tasks:
        raw.execute("BEGIN; UPDATE corral_tasks SET nonce = 'x' WHERE task_id = 'b'")
        tasks.start_soon(write)
        await wait_blocked_by(raw, place)
        lock = "UPDATE corral_tasks SET nonce = 'x' WHERE task_id = 'a'"
        await anyio.to_thread.run_sync(raw.execute, lock)
        raw.execute("COMMIT")
    assert [result.status for result in results] == ["ok", "ok"]
    assert driver.store.statistics()["redone_batches"] >= 1
    assert [await driver.indices(task_id) for task_id in ("a", "b")] == [[0], [0]]


async def as_one_batch(store: SqlStore, *calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    entered, gate = threading.Event(), threading.Event()

    def wait(tx: Any) -> None:
        entered.set()
        assert gate.wait(30)

    results: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store._write, wait)
        assert await anyio.to_thread.run_sync(entered.wait, 30)

        async def call() -> None:
            results.extend(await at_once(*calls))

        tasks.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    return results


@pytest.mark.promise("P9")
async def test_a_lock_that_is_never_given_back_fails_what_needs_it_and_nothing_else(place: Place, raw: Any) -> None:
    url = place.url_with(f"-csearch_path={place.schema} -clock_timeout=200ms")
    async with SqlStore(url) as store:
        for task_id in ("a", "b", "c"):
            await store.accept(NewTask(task_id, "svc", "{}", 1.0))
        raw.execute("BEGIN; SELECT 1 FROM corral_tasks WHERE task_id = 'b' FOR UPDATE")
        claims = [
            lambda task_id=task_id: store.claim(ClaimRequest(task_id, "i", "n", 1.0)) for task_id in ("a", "b", "c")
        ]
        results = await as_one_batch(store, *claims)
        assert [isinstance(result, StoreUnavailable) for result in results] == [False, True, False]
        assert "lock" in results[1].hint
        assert "in_doubt" not in results[1].fields
        raw.execute("ROLLBACK")
        assert (await store.claim(ClaimRequest("b", "i", "n", 1.0))).epoch == 1


async def test_a_control_plane_that_stands_still_loses_its_transaction(place: Place, raw: Any) -> None:
    """Its locks go with it: the others go on, and its own units are done when it wakes up."""
    slow = place.url_with(f"-csearch_path={place.schema} -cidle_in_transaction_session_timeout=300ms")
    async with SqlStore(slow) as standing, SqlStore(place.url) as other:
        await other.accept(NewTask("t", "svc", "{}", 1.0))
        stood, entered = threading.Event(), threading.Event()
        calls = 0

        def stand_still(tx: Any) -> str:
            nonlocal calls
            calls += 1
            state = tx.one(tx.sql.lock_state, {"task_id": "t"})
            entered.set()
            if calls == 1:
                assert stood.wait(30)
            return tx.one(tx.sql.lock_state, {"task_id": "t"})[5] if state else ""

        results: list[Any] = []

        async def stand() -> None:
            results.append(await standing._write(stand_still))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stand)
            assert await anyio.to_thread.run_sync(entered.wait, 30)
            claim = await other.claim(ClaimRequest("t", "i", "n", 1.0))
            assert claim is not None
            stood.set()
        assert (results, calls) == (["running"], 2)


async def test_strays_are_taken_away_once(planes: list[Any]) -> None:
    for number in range(12):
        await planes[0].accept(f"t{number}", by="i")
    strays = [HeldTask(f"t{number}", 1) for number in range(12)]
    results = await at_once(*(lambda store=driver.store: store.reclaim("i", strays, 4.0) for driver in planes))
    taken = [ticket.task_id for result in results for ticket in result.tickets]
    assert sorted(taken) == sorted(stray.task_id for stray in strays)
