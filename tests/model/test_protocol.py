"""The task protocol as a state machine over the real store: whatever is lost, doubled, late, dead or set, the promises hold
after every step, and in the end every accepted task has one ending.

`CORRAL_TEST_MODEL_EXAMPLES=5000` looks deeper than an everyday run does, and at others each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import NewTask, Report
from llama_corral.protocol.sealing import Sealer
from llama_corral.stores import SqlStore

from ..stores.postgres import open_place
from .ground import SESSIONS, pick_from
from .holding import check_everything
from .settling import clear, settle
from .world import FATES, RETRY, Fate, Release, Run, World

DEEP: Final = os.environ.get("CORRAL_TEST_MODEL_EXAMPLES")
EXAMPLES: Final = int(DEEP or "100")
DEPTH: Final = settings(
    max_examples=EXAMPLES,
    stateful_step_count=80,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    derandomize=DEEP is None,
    database=None,
)

picks = st.integers(0, 11)
fates = st.sampled_from(FATES)
few = st.integers(0, 3)
endings = st.sampled_from(["completed", "completed", "retryable", "retryable", "failed", "cancelled", "timed_out"])
session_ids = st.sampled_from(list(SESSIONS))


class Protocol(RuleBasedStateMachine):
    """Rules draw, the world acts. One event loop serves all examples of a test."""

    def __init__(self, portal: BlockingPortal, sealer: Sealer | None = None, url: str = "sqlite://") -> None:
        super().__init__()
        self.portal = portal
        store = SqlStore(url, sealer=sealer)
        self._opened: AbstractContextManager[SqlStore] = portal.wrap_async_context_manager(store)
        self.world = World(self._opened.__enter__())

    def teardown(self) -> None:
        try:
            self.call(settle, self.world)
            self.call(clear, self.world)
        finally:
            self._opened.__exit__(None, None, None)

    def call(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
        return self.portal.call(partial(function, *args, **kwargs))

    @invariant()
    def every_promise_holds(self) -> None:
        self.call(check_everything, self.world)

    @initialize()
    def a_world_at_work(self) -> None:
        """Two instances, two tasks in line, two side by side, one that is at work, one without a session."""
        world = self.world
        first = self.call(world.start_instance)
        self.call(world.start_instance)
        self.call(world.create_session, "e")
        self.call(world.create_session, "c")
        for session, by in (("e", None), ("e", None), ("c", None), ("c", None), (None, first), (None, None)):
            self.call(world.accept, self._task(session, "svc", max_attempts=2, retry=RETRY), by)

    def _task(self, session: str | None, service: str, **more: Any) -> NewTask:
        """Ids are chosen by clients, so the same may come again."""
        task_id = f"t{self.world.number()}"
        return NewTask(task_id, service, "{}", self.world.now, session_id=session, digest="content", **more)

    # Accept and claim

    @rule(
        session=st.sampled_from([None, "e", "e", "e", "c", "c", "r"]),
        service=st.sampled_from(("svc", "svc", "other")),
        by=st.none() | picks,
        timeout=st.sampled_from([None, None, 1.5, 5.0, 50.0]),
        later=st.sampled_from([None, None, None, 3.0, -1.0]),
        attempts=st.sampled_from([1, 2, 3, 3]),
        retries=st.sampled_from([True, True, False]),
        fate=fates,
    )
    def accept(
        self,
        session: str | None,
        service: str,
        by: int | None,
        timeout: float | None,
        later: float | None,
        attempts: int,
        retries: bool,
        fate: Fate,
    ) -> None:
        world = self.world
        task = self._task(
            session,
            service,
            deadline=None if timeout is None else world.now + timeout,
            not_before=None if later is None else world.now + later,
            max_attempts=attempts,
            retry=RETRY if retries else None,
        )
        self.call(world.accept, task, None if by is None else pick_from(world.alive(), by), fate)

    @rule(pick=picks, by=st.none() | picks, what=st.sampled_from(["known", "other content", "deleted", "unheard"]))
    def accept_again(self, pick: int, by: int | None, what: str) -> None:
        world = self.world
        if what == "unheard":
            if world.unheard_accepts:
                self.call(world.repeat_accept, pick % len(world.unheard_accepts))
            return
        life = world.life_of(pick)
        task = pick_from(world.gone, pick) if what == "deleted" else None if life is None else life.task
        if task is not None:
            task = replace(task, digest="other") if what == "other content" else task
            self.call(world.accept, task, None if by is None else pick_from(world.alive(), by))

    @rule(pick=picks, by=picks, fate=fates, keep=st.booleans())
    def claim(self, pick: int, by: int, fate: Fate, keep: bool) -> None:
        """Tickets come in any order, and some once more. Where none is left, the backstop publishes what is due."""
        world = self.world
        if not world.tickets:
            world.publish(self.call(world.store.due_tickets, now=world.now))
        ticket = pick_from(world.tickets, pick)
        instance = pick_from(world.alive(), by)
        if ticket is not None and instance is not None:
            if not keep:
                world.tickets.remove(ticket)
            self.call(world.claim, ticket, instance, fate)

    @precondition(lambda self: self.world.unheard_claims)
    @rule(pick=picks, again=st.booleans())
    def claim_again(self, pick: int, again: bool) -> None:
        """Ask for the claim whose answer was lost, or forget it."""
        position = pick % len(self.world.unheard_claims)
        if again:
            self.call(self.world.repeat_claim, position)
        else:
            self.world.unheard_claims.pop(position)

    @precondition(lambda self: self.world.tickets)
    @rule(keep=st.integers(0, 2))
    def the_queue_loses_tickets(self, keep: int) -> None:
        del self.world.tickets[keep:]

    # Runs

    def _free_run(self, pick: int) -> Run | None:
        """A run at work; whatever it said last is said again first."""
        run = pick_from(self.world.working(), pick)
        if run is not None and run.pending is not None:
            self.call(self.world.repeat, run)
            return None
        return run

    @precondition(lambda self: self.world.working())
    @rule(
        pick=picks,
        events=few,
        waiting=st.sampled_from([None, None, True, False]),
        snapshot=st.sampled_from([None, None, True, False]),
        fate=fates,
    )
    def report(self, pick: int, events: int, waiting: bool | None, snapshot: bool | None, fate: Fate) -> None:
        run = self._free_run(pick)
        if run is not None:
            checkpoint = None if snapshot is None else self.world.checkpoint(run, progress=snapshot)
            report = self.world.report(run, events=events, waiting=waiting, checkpoint=checkpoint)
            self.call(self.world.say, run, report, fate)

    @precondition(lambda self: self.world.working())
    @rule(pick=picks, ending=endings, off=st.sampled_from([0, 0, -1, 1]), fate=fates)
    def end(self, pick: int, ending: str, off: int, fate: Fate) -> None:
        run = self._free_run(pick)
        if run is not None:
            retryable = ending == "retryable"
            status = TaskStatus.FAILED if retryable else TaskStatus(ending)
            report = self.world.ending(run, status, off=off, retryable=retryable)
            self.call(self.world.say, run, report, fate)

    @precondition(lambda self: self.world.working())
    @rule(pick=picks, fate=fates, snapshot=st.booleans(), idle=st.sampled_from([None, "no timer", -1.0, 2.0, 4.0]))
    def release(self, pick: int, fate: Fate, snapshot: bool, idle: str | float | None) -> None:
        """Hand back, with or without a snapshot, or leave memory, with or without a timer."""
        run = self._free_run(pick)
        if run is not None:
            checkpoint = self.world.checkpoint(run) if snapshot or idle is not None else None
            wake_at = self.world.now + idle if isinstance(idle, float) else None
            call = Release(run.task_id, run.claim.epoch, checkpoint, idle is not None, wake_at)
            self.call(self.world.say, run, call, fate)

    @precondition(lambda self: self.world.working())
    @rule(pick=picks, heard=st.booleans())
    def pull(self, pick: int, heard: bool) -> None:
        run = self._free_run(pick)
        if run is not None:
            self.call(self.world.pull, run, heard=heard)

    # The past comes back

    @precondition(lambda self: self.world.said)
    @rule(back=st.integers(1, 30))
    def a_late_copy_arrives(self, back: int) -> None:
        call, of = self.world.said[-min(back, len(self.world.said))]
        if isinstance(call, (Report, Release)):
            self.call(self.world.tell, call, of)
        else:
            self.call(self.world.tell_claim, call)

    @precondition(lambda self: self.world.stale())
    @rule(pick=picks, what=st.sampled_from(["report", "end", "release", "pull"]))
    def a_zombie_goes_on(self, pick: int, what: str) -> None:
        world = self.world
        run = pick_from(world.stale(), pick)
        assert run is not None
        if what == "pull":
            self.call(world.pull, run, heard=False)
        elif what == "report":
            report = world.report(run, events=2, waiting=True, checkpoint=world.checkpoint(run))
            self.call(world.tell, report, run.life)
        elif what == "end":
            self.call(world.tell, world.ending(run, TaskStatus.COMPLETED), run.life)
        else:
            call = Release(run.task_id, run.claim.epoch, world.checkpoint(run), idle=True)
            self.call(world.tell, call, run.life)

    # Instances

    @precondition(lambda self: len(self.world.alive()) < 3)
    @rule()
    def start_an_instance(self) -> None:
        self.call(self.world.start_instance)

    @precondition(lambda self: len(self.world.alive()) > 1)
    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        instance = pick_from(self.world.alive(), pick)
        assert instance is not None
        self.world.kill(instance)

    @rule(pick=picks, two=st.booleans(), slow=st.booleans())
    def reap(self, pick: int, two: bool, slow: bool) -> None:
        """Dead, or only slow: the reaper cannot know."""
        silent = [instance for instance in self.world.instances if slow or not instance.alive]
        chosen = {(pick + number) % len(silent) for number in range(1 + two)} if silent else ()
        self.call(self.world.reap, [silent[number].instance_id for number in sorted(chosen)])

    @precondition(lambda self: self.world.alive())
    @rule(pick=picks, heard=st.booleans())
    def heartbeat(self, pick: int, heard: bool) -> None:
        instance = pick_from(self.world.alive(), pick)
        if instance is not None:
            self.call(self.world.heartbeat, instance, heard=heard)

    # From outside

    @precondition(lambda self: self.world.promised.lives)
    @rule(pick=picks, what=st.sampled_from(["cancel", "send", "send"]))
    def from_outside(self, pick: int, what: str) -> None:
        life = self.world.life_of(pick)
        assert life is not None
        self.call(self.world.cancel if what == "cancel" else self.world.send, life.task.task_id)

    @precondition(lambda self: self.world.promised.lives)
    @rule(pick=picks, reader=st.integers(0, 1), limit=st.integers(0, 4))
    def read(self, pick: int, reader: int, limit: int) -> None:
        life = self.world.life_of(pick)
        assert life is not None
        self.call(self.world.read, life.task.task_id, reader, limit)

    @rule(session=session_ids, create=st.sampled_from([True, True, False]))
    def sessions(self, session: str, create: bool) -> None:
        self.call(self.world.create_session if create else self.world.delete_session, session)

    @precondition(lambda self: any(not life.is_open for life in self.world.promised.lives.values()))
    @rule(pick=picks, fresh=st.booleans())
    def retry(self, pick: int, fresh: bool) -> None:
        life = pick_from((each for each in self.world.promised.lives.values() if not each.is_open), pick)
        assert life is not None
        self.call(self.world.retry, life.task.task_id, fresh=fresh)

    @precondition(lambda self: any(not life.is_open for life in self.world.promised.lives.values()))
    @rule(age=st.sampled_from([0.0, 5.0, 60.0]), limit=st.integers(1, 3))
    def purge(self, age: float, limit: int) -> None:
        self.call(self.world.purge, age, limit)

    # Time

    @rule(
        seconds=st.sampled_from([0.5, 0.5, 3.0, 10.0, 3600.0, -2.0, -3600.0]),
        then=st.sampled_from([None, "expire", "wake", "wake"]),
    )
    def the_clock_is_set(self, seconds: float, then: str | None) -> None:
        self.world.now += seconds
        if then is not None:
            self.call(self.world.expire if then == "expire" else self.world.wake)


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal("trio") as opened:
        yield opened


@pytest.mark.promise("P1", "P2", "P3", "P4", "P5")
@pytest.mark.timeout(60 + EXAMPLES)
def test_the_promises_hold_whatever_happens(portal: BlockingPortal) -> None:
    run_state_machine_as_test(lambda: Protocol(portal), settings=DEPTH)


@pytest.mark.promise("P4", "P11")
@pytest.mark.timeout(60 + EXAMPLES)
def test_sealed_state_is_never_refused_for_what_happened_to_it(portal: BlockingPortal) -> None:
    """Contexts grow versions, snapshots are replaced, replayed under another id, and left by dead epochs: each fits."""
    sealer = Sealer(["secret"])
    run_state_machine_as_test(lambda: Protocol(portal, sealer), settings=settings(DEPTH, max_examples=EXAMPLES // 3))


@pytest.mark.promise("P1", "P2", "P3", "P4", "P5")
@pytest.mark.timeout(60 + 2 * EXAMPLES)
def test_the_promises_hold_on_postgresql(portal: BlockingPortal) -> None:
    with open_place() as place:

        def protocol() -> Protocol:
            place.empty()
            return Protocol(portal, Sealer(["secret"]), place.url)

        short = settings(DEPTH, max_examples=max(4, EXAMPLES // 25), stateful_step_count=40)
        run_state_machine_as_test(protocol, settings=short)
