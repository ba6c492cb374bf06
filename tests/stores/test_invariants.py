"""Random lives of many tasks, with the invariants looked at after every step."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from llama_corral.exceptions import UsageError
from llama_corral.protocol.lifecycle import ENDINGS, TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import Checkpoint, HeldTask, RetryPolicy, TaskFilter, TaskRecord, Terminal
from llama_corral.stores import SqlStore

S = TaskStatus
INSTANCES = ("i", "j", "k")
SESSIONS = (None, "s", "r")


class Life:
    """Does something at random, and remembers what may never change again."""

    def __init__(self, driver: Any, seed: int) -> None:
        self.driver = driver
        self.store = driver.store
        self.random = random.Random(seed)
        self.claims: dict[str, tuple[int, int]] = {}  # task: epoch, last seq
        self.endings: dict[str, TaskRecord] = {}
        self.epochs: dict[str, int] = {}
        self.number = 0
        self.ids: list[str] = []  # in the order of acceptance

    async def step(self) -> None:
        name = self.random.choice(
            ["accept"] * 3 + ["claim"] * 3 + ["report"] * 4 + ["end"] * 3
            + ["release", "cancel", "send", "reap", "expire", "heartbeat", "fail", "retry", "wake", "reclaim"]
        )  # fmt: skip
        with suppress(UsageError):  # an ended task, an unknown one: a refusal is an answer
            await getattr(self, name)(self.random.choice(["unknown", *self.ids]))

    async def accept(self, _: str) -> None:
        self.number += 1
        by = self.random.choice([None, *INSTANCES])
        deadline = self.random.choice([None, None, 10.0])
        task_id = f"t{self.number}"
        retry = self.random.choice([None, RetryPolicy(backoff=0.0)])
        session = self.random.choice(SESSIONS)
        accepted = await self.driver.accept(task_id, session, by=by, deadline=deadline, retry=retry)
        self.ids.append(task_id)
        if accepted.claim is not None:
            self.claims[task_id] = (accepted.claim.epoch, 0)

    async def claim(self, task_id: str) -> None:
        claim = await self.driver.claim(task_id, by=self.random.choice(INSTANCES), nonce=str(self.random.random()))
        if claim is not None:
            assert claim.epoch > self.epochs.get(task_id, 0)
            self.claims[task_id] = (claim.epoch, 0)

    async def report(self, task_id: str) -> None:
        epoch, seq = self.claims.get(task_id, (self.random.randint(0, 2), 0))
        seq += self.random.choice([0, 1, 1, 1])
        waiting = self.random.choice([None, True, False])
        snapshot = self.random.choice([None, Checkpoint("{}", 0)])
        events = self.random.randint(0, 3)
        answer = await self.driver.report(task_id, seq, epoch, events=events, waiting=waiting, checkpoint=snapshot)
        if answer.status == "ok" and task_id in self.claims:
            self.claims[task_id] = (epoch, seq)

    async def end(self, task_id: str) -> None:
        epoch, seq = self.claims.get(task_id, (1, 0))
        status = self.random.choice(list(ENDINGS))
        based_on = self.random.choice([None, 0, 1])
        await self.driver.end(task_id, seq + 1, epoch, status=status, based_on=based_on, events=1)

    async def release(self, task_id: str) -> None:
        epoch, _ = self.claims.get(task_id, (1, 0))
        idle, wake_at = self.random.choice([(False, None), (True, None), (True, 3.0), (True, 6.0)])
        await self.store.release(task_id, epoch, Checkpoint("{}", 0), 4.0, idle=idle, wake_at=wake_at)

    async def fail(self, task_id: str) -> None:
        epoch, seq = self.claims.get(task_id, (1, 0))
        error = ErrorRecord(type="ValueError", message="no", retryable=True)
        answer = await self.driver.report(task_id, seq + 1, epoch, terminal=Terminal(S.FAILED, error=error), now=2.0)
        assert answer.retry_at is None or await self.driver.status(task_id) is S.QUEUED

    async def retry(self, task_id: str) -> None:
        accepted = await self.store.retry(task_id, 5.0, fresh=self.random.random() < 0.5)
        assert accepted.created == (accepted.task_id not in self.ids)
        if accepted.created:
            self.ids.append(accepted.task_id)

    async def wake(self, _: str) -> None:
        await self.store.wake(self.random.choice([5.0, 6.0]))

    async def reclaim(self, task_id: str) -> None:
        epoch, _ = self.claims.get(task_id, (1, 0))
        await self.store.reclaim(self.random.choice(INSTANCES), [HeldTask(task_id, epoch)], 5.0)

    async def cancel(self, task_id: str) -> None:
        await self.store.request_cancel(task_id, 4.0)

    async def send(self, task_id: str) -> None:
        await self.store.send(task_id, "{}", 4.0)

    async def reap(self, _: str) -> None:
        await self.store.reap([self.random.choice(INSTANCES)], 5.0)

    async def expire(self, _: str) -> None:
        await self.store.expire(self.random.choice([9.0, 10.0]))

    async def heartbeat(self, task_id: str) -> None:
        epoch, _ = self.claims.get(task_id, (1, 0))
        await self.store.heartbeat(self.random.choice(INSTANCES), [HeldTask(task_id, epoch)])

    async def forget(self) -> None:
        """Retention takes every ending with all that belongs to it, and nothing else."""
        taken = 0
        while (some := await self.store.purge(100.0, limit=7)) > 0:
            taken += some
        assert taken == len(self.endings)
        left = [task_id for task_id in self.ids if task_id not in self.endings]
        assert [record.task_id for record in await self.store.list_tasks(TaskFilter(limit=10_000))] == left[::-1]

        def orphans(tx: Any) -> list[int]:
            tables = ("task_events", "task_inbox", "checkpoints")
            condition = "task_no NOT IN (SELECT no FROM corral_tasks)"
            return [tx.one(f"SELECT count(*) FROM corral_{table} WHERE {condition}", {})[0] for table in tables]

        assert await self.store._read(orphans) == [0, 0, 0]

    async def check(self) -> None:
        records = await self.store.list_tasks(TaskFilter(limit=10_000))
        assert [record.task_id for record in records] == self.ids[::-1]
        lines: dict[tuple[str, str], list[TaskRecord]] = defaultdict(list)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for record in records:
            ended = record.status.is_terminal
            assert ended == (record.finished_at is not None)
            if record.task_id in self.endings:
                assert record == self.endings[record.task_id]  # one ending, and nothing after it
            elif ended:
                self.endings[record.task_id] = record
            assert record.epoch >= self.epochs.get(record.task_id, 0)
            self.epochs[record.task_id] = record.epoch
            assert (record.owner is not None) or record.status is not S.RUNNING
            assert record.status not in (S.QUEUED, S.HELD) or record.owner is None
            page = await self.store.read_events(record.task_id, 0)
            assert [event.index for event in page.events] == list(range(record.event_count))
            if not ended:
                counts[record.service_name][record.status] += 1
                if not record.implicit_session:
                    lines[record.session_id, record.service_name].append(record)
        assert await self.store.count_tasks() == counts
        for name, count in counts.items():
            assert await self.store.count_queued(name) == count[S.QUEUED] + count[S.HELD]
        for line in lines.values():
            assert [record.status is S.HELD for record in reversed(line)] == [False] + [True] * (len(line) - 1)


@pytest.mark.promise("P1", "P2", "P3", "P4")
@pytest.mark.parametrize("seed", range(12))
def test_the_invariants_hold_whatever_happens(seed: int, driver_of) -> None:
    async def main() -> None:
        async with SqlStore("sqlite://") as store:
            life = Life(driver_of(store), seed)
            for session_id in SESSIONS:
                if session_id is not None:
                    await life.driver.session(session_id)
            for _ in range(150):
                await life.step()
                await life.check()
            assert life.endings
            await life.forget()

    trio.run(main)


def test_a_store_in_memory_runs_under_an_autojump_clock(driver_of) -> None:
    """A day passes at once, because nothing waits for a thread."""

    async def main() -> None:
        async with SqlStore("sqlite://") as store:
            driver = driver_of(store)
            await driver.accept("t", by="i")
            await trio.sleep(86_400)
            assert (await driver.end("t", events=2)).status == "ok"
            assert await driver.indices("t") == [0, 1]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
