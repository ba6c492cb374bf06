"""A run cancelled at every moment of its life: nothing is left, all clean-up ran, nothing stays taken (P6)."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from contextlib import suppress
from functools import partial

import anyio
import anyio.lowlevel
import pytest
from workflows.errors import WorkflowCancelledByUser
from workflows.events import HumanResponseEvent, InputRequiredEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.exceptions import RunClosed
from llama_corral.runtime import Slot, open_run

from ..moments import living_tasks, strike
from .everything import RESULT, Everything, Item, Ledger, Owner, ledger_of_the_run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]

AGAIN = 14
"""After every so many trials the same workflow is run once more."""


STEPS = 13
"""Steps that a run of it starts, without those of its children."""


class Left(Exception):
    """The body of the block leaves it."""


class Trial:
    """A run of `Everything` that is struck once, and what came of it."""

    def __init__(self, flavour, workflow=None, slots=None, threads=None) -> None:
        self.flavour = flavour
        self.ledger = Ledger() if workflow is None else workflow.ledger
        self.workflow = workflow or Everything(self.ledger, flavour)
        self.threads = threads or anyio.CapacityLimiter(1)
        self.slots = slots or anyio.CapacityLimiter(1)
        self.slot = Slot(self.slots)
        self.owner = Owner(self.slot)
        self.around = anyio.CancelScope()
        self.body = anyio.CancelScope()
        self.task = None
        self.way = None
        self.run = None
        self.was_running = False
        self.send_in = 0
        self.result = None
        self.raised = None
        self.seen = []

    # Ways to strike

    def cancel_scope(self):
        self.around.cancel()

    def cancel_run(self):
        if self.run is not None:
            self.was_running = not self.run.is_done
            self.run.cancel()

    def leave_block(self):
        self.body.cancel()

    def cancel_task(self):
        if self.task is not None:
            self.task.cancel()

    def cancel_scope_then_send(self):
        self.around.cancel()
        self.send_in -= 1
        if not self.send_in and not self.run.is_done:
            self.run.send_event(Item(n=9))

    # The run

    async def live(self):
        """In a task of its own, all of whose steps are moments."""
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            self.task = asyncio.current_task()
        ledger_of_the_run.set(self.ledger)
        with self.around:
            try:
                await self.open()
            except (Left, WorkflowCancelledByUser) as exc:
                self.raised = exc
            except asyncio.CancelledError as exc:
                self.raised = exc
                raise

    async def open(self):
        options = {"flavour": self.flavour, "hooks": self.owner, "sync_limiter": self.threads}
        try:
            async with open_run(self.workflow, **options) as self.run:
                with self.body:
                    await self.talk(self.run)
                if self.body.cancel_called:
                    raise Left
        finally:
            self.slot.release()

    async def talk(self, run):
        async for event in run.events():
            self.seen.append(event)
            if isinstance(event, InputRequiredEvent):
                with suppress(RunClosed):  # cancelled since it asked
                    run.send_event(HumanResponseEvent(response="yes"))
        self.result = await run.result()

    # What came of it

    @property
    def outcome(self):
        """What ended the run: its result, or the class of what it raised. None: it was never opened."""
        if self.run is None:
            return None
        assert self.run.is_done
        try:
            return self.run.stop_event.result
        except Exception as exc:
            return type(exc)

    async def check_nothing_is_taken(self):
        with anyio.fail_after(5):
            places = [object() for _ in range(int(self.threads.total_tokens))]
            for place in places:  # an abandoned thread keeps its own until it ends
                await self.threads.acquire_on_behalf_of(place)
            for place in places:
                self.threads.release_on_behalf_of(place)
            if self.run is not None:
                await self.run.context.store.set("free", True)
        for limiter in (self.slots.statistics(), self.threads.statistics()):
            assert (limiter.borrowed_tokens, limiter.tasks_waiting) == (0, 0)

    async def check_clean_up(self):
        ledger = self.ledger
        if ledger.began["crunch"] != ledger.ended["crunch"]:  # an abandoned thread ends by itself
            await anyio.to_thread.run_sync(ledger.wait_threads, "crunch")
        assert ledger.ended == ledger.began
        if self.flavour == "anyio":
            # Hosted asyncio tasks are cancelled by asyncio's own means, which know no shields: clean-up that had begun
            # by itself is interrupted there.
            assert ledger.tidied == {name: ledger.ended[name] for name in ledger.ended if name != "crunch"}

    def check_events(self):
        heard = self.owner.heard
        assert self.seen == heard[: len(self.seen)]
        stops = [event for event in heard if isinstance(event, StopEvent)]
        assert len(stops) == (self.outcome not in (None, RunClosed))
        assert heard[len(heard) - len(stops) :] == stops


async def in_a_task(trial, moment=0, way="cancel_scope", *, keep_on=False):
    before = living_tasks()
    with strike(moment, getattr(trial, way), keep_on=keep_on) as moments:
        async with anyio.create_task_group() as tasks:  # noqa: ASYNC112 - a task whose first moment counts
            tasks.start_soon(trial.live)
    assert living_tasks() == before
    return moments


def endings(trial, way):
    """What may have become of a run that was struck in this way."""
    if way == "cancel_scope":
        cancelled = trial.around.cancelled_caught and trial.outcome in (None, RunClosed, RESULT)
        return cancelled or trial.result == trial.outcome == RESULT
    if way == "leave_block":
        assert isinstance(trial.raised, Left) or trial.result == RESULT
        return trial.outcome in (RunClosed, RESULT)
    if way == "cancel_task":
        assert isinstance(trial.raised, asyncio.CancelledError) or trial.result == RESULT
        return trial.outcome in (None, RunClosed, RESULT)
    assert type(trial.raised) is (WorkflowCancelledByUser if trial.was_running else type(None))
    return trial.outcome == (WorkflowCancelledByUser if trial.was_running else RESULT)


@pytest.mark.parametrize("way", ["cancel_scope", "cancel_run", "leave_block", "cancel_task"])
async def test_at_every_moment(flavour, configuration, caplog, way):
    if way == "cancel_task" and configuration != "asyncio":
        pytest.skip("asyncio's own cancellation")
    reached = set()
    # Cancelling a scope is what all ways come to: the others strike where a task has begun to wait.
    for moment in range(1, 1000) if way == "cancel_scope" else range(2, 1000, 2):
        trial = Trial(flavour)
        moments = await in_a_task(trial, moment, way)
        await trial.check_clean_up()
        await trial.check_nothing_is_taken()
        trial.check_events()
        assert endings(trial, way)
        reached.update(trial.ledger.began)
        if not moments.struck:
            break
        if not moment % AGAIN:
            again = Trial(flavour, trial.workflow)
            await in_a_task(again)
            assert again.result == RESULT
            await again.check_clean_up()
    assert (trial.result, trial.outcome, trial.raised) == (RESULT, RESULT, None)
    assert moment > 150
    assert len(reached) == 8
    gc.collect()  # what asyncio or a coroutine has to say about having been lost, it says now
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("moment", [40, 80, 120])
async def test_an_event_that_comes_while_a_cancelled_run_unwinds(flavour, caplog, moment):
    for later in range(1, 30):
        trial = Trial(flavour)
        trial.send_in = later
        await in_a_task(trial, moment, "cancel_scope_then_send", keep_on=True)
        await trial.check_clean_up()
        await trial.check_nothing_is_taken()
        assert trial.outcome is RunClosed
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


class Doomed(Owner):
    """Says when so many steps of its run are about to start."""

    def __init__(self, slot, steps, say) -> None:
        super().__init__(slot)
        self._steps = steps
        self._say = say

    async def before_step(self, step):
        await super().before_step(step)
        self._steps -= 1
        if not self._steps:
            self._say()


class Crowd:
    """Many runs of one workflow under one cap; four of five are struck by chance."""

    def __init__(self, flavour, count, seed) -> None:
        self.chance = random.Random(seed)
        self.slots = anyio.CapacityLimiter(20)
        self.threads = anyio.CapacityLimiter(4)
        self.workflow = Everything(Ledger(), flavour)
        self.trials = [Trial(flavour, self.workflow, self.slots, self.threads) for _ in range(count)]
        self.due, self.next_due = anyio.create_memory_object_stream(count)
        for trial in self.chance.sample(self.trials, count * 4 // 5):
            trial.way = self.chance.choice(["cancel_scope", "cancel_run", "leave_block"])
            trial.owner = Doomed(trial.slot, self.chance.randint(1, STEPS), partial(self.due.send_nowait, trial))

    async def live(self):
        async with open_asyncio_loop(), anyio.create_task_group() as strikes:
            strikes.start_soon(self.strike)
            async with anyio.create_task_group() as runs:
                for trial in self.trials:
                    runs.start_soon(trial.live)
            self.due.close()

    async def strike(self):
        with self.next_due:
            async for trial in self.next_due:
                for _ in range(self.chance.randrange(5)):
                    await anyio.lowlevel.checkpoint()
                getattr(trial, trial.way)()


async def test_a_thousand_runs_at_once(flavour, caplog):
    before = living_tasks()
    crowd = Crowd(flavour, 1000, seed=3)
    await crowd.live()
    assert living_tasks() == before
    await crowd.trials[0].check_clean_up()
    await crowd.trials[0].check_nothing_is_taken()
    for trial in crowd.trials:
        trial.check_events()
        assert trial.result == trial.outcome == RESULT if trial.way is None else endings(trial, trial.way)
    struck = [trial for trial in crowd.trials if trial.outcome in (RunClosed, WorkflowCancelledByUser)]
    assert len(struck) > 600
    assert len({len(trial.owner.heard) for trial in struck}) > 4  # at all stages
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
