"""The task protocol as a state machine over the real store: whatever is lost, doubled, late, dead or set, the promises hold
after every step, and in the end every accepted task has one ending.

`CORRAL_TEST_MODEL_EXAMPLES=5000` looks deeper than an everyday run does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import NewTask, Report
from llama_corral.stores import SqlStore

from .holding import check_everything
from .settling import clear, settle
from .world import FATES, RETRY, SERVICES, SESSIONS, Fate, Release, Run, World, pick_from

EXAMPLES: Final = int(os.environ.get("CORRAL_TEST_MODEL_EXAMPLES", "60"))
DEPTH: Final = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

SEES_STRANGERS: Final = False

picks = st.integers(0, 11)
fates = st.sampled_from(FATES)
few = st.integers(0, 3)
endings = st.sampled_from([TaskStatus.COMPLETED, *(status for status in TaskStatus if status.is_terminal)])
sessions = st.sampled_from(list(SESSIONS))


class Protocol(RuleBasedStateMachine):
    """Rules draw, the world acts. One event loop serves all examples of a test."""

    def __init__(self, portal: BlockingPortal) -> None:
        super().__init__()
        self.portal = portal
        self._opened: AbstractContextManager[SqlStore] = portal.wrap_async_context_manager(SqlStore("sqlite://"))
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
    def two_instances_and_a_session(self) -> None:
        self.call(self.world.start_instance)
        self.call(self.world.start_instance)
        self.call(self.world.create_session, "e")

    # Accept and claim

    @rule(
        session=st.sampled_from([None, "e", "e", "e", "r", "c"]),
        service=st.sampled_from(SERVICES),
        by=st.none() | picks,
        timeout=st.sampled_from([None, None, 5.0, 50.0]),
        later=st.sampled_from([None, None, None, 3.0]),
        attempts=st.integers(1, 3),
        retries=st.booleans(),
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
        instance = None if by is None else pick_from(world.alive(), by)
        now = world.now
        task = NewTask(
            f"t{world.number()}",
            service,
            "{}",
            now,
            session_id=session,
            deadline=None if timeout is None else now + timeout,
            not_before=None if later is None else now + later,
            max_attempts=attempts,
            retry=RETRY if retries else None,
        )
        self.call(world.accept, task, instance, fate)

    @rule(pick=picks, changed=st.booleans())
    def accept_a_known_id(self, pick: int, changed: bool) -> None:
        life = self.world.life_of(pick)
        if life is not None:
            task = NewTask(**{**_fields(life.task), "digest": "other" if changed else life.task.digest})
            self.call(self.world.accept, task, None)

    @rule(pick=picks, by=st.none() | picks)
    def accept_a_deleted_id(self, pick: int, by: int | None) -> None:
        task = pick_from(self.world.gone, pick)
        if task is not None:
            instance = None if by is None else pick_from(self.world.alive(), by)
            self.call(self.world.accept, task, instance)

    @rule(pick=picks)
    def repeat_an_unheard_accept(self, pick: int) -> None:
        if self.world.unheard_accepts:
            self.call(self.world.repeat_accept, pick % len(self.world.unheard_accepts))

    @rule(pick=picks, by=picks, fate=fates, keep=st.booleans())
    def claim(self, pick: int, by: int, fate: Fate, keep: bool) -> None:
        """Tickets come in any order, and some once more."""
        ticket = pick_from(self.world.tickets, pick)
        instance = pick_from(self.world.alive(), by)
        if ticket is not None and instance is not None:
            if not keep:
                self.world.tickets.remove(ticket)
            self.call(self.world.claim, ticket, instance, fate)

    @rule(pick=picks)
    def repeat_an_unheard_claim(self, pick: int) -> None:
        if self.world.unheard_claims:
            self.call(self.world.repeat_claim, pick % len(self.world.unheard_claims))

    @rule(pick=picks)
    def give_up_an_unheard_claim(self, pick: int) -> None:
        if self.world.unheard_claims:
            self.world.unheard_claims.pop(pick % len(self.world.unheard_claims))

    @rule()
    def lose_all_tickets(self) -> None:
        self.world.tickets.clear()

    @rule()
    def publish_what_is_due(self) -> None:
        self.world.publish(self.call(self.world.store.due_tickets, now=self.world.now))

    # Runs

    def _free_run(self, pick: int) -> Run | None:
        """A run at work; whatever it said last is said again first."""
        run = pick_from(self.world.working(), pick)
        if run is not None and run.pending is not None:
            self.call(self.world.repeat, run)
            return None
        return run

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

    @rule(pick=picks, status=endings, based_on=st.sampled_from([None, None, 0, 1]), retryable=st.booleans(), fate=fates)
    def end(self, pick: int, status: TaskStatus, based_on: int | None, retryable: bool, fate: Fate) -> None:
        run = self._free_run(pick)
        if run is not None:
            retryable = retryable and status is TaskStatus.FAILED
            ending = self.world.ending(run, status, based_on=based_on, retryable=retryable)
            self.call(self.world.say, run, ending, fate)

    @rule(pick=picks, fate=fates, snapshot=st.booleans(), idle=st.booleans(), timer=st.sampled_from([None, -1.0, 4.0]))
    def release(self, pick: int, fate: Fate, snapshot: bool, idle: bool, timer: float | None) -> None:
        run = self._free_run(pick)
        if run is not None:
            checkpoint = self.world.checkpoint(run) if snapshot or idle else None
            wake_at = self.world.now + timer if idle and timer is not None else None
            call = Release(run.task_id, run.claim.epoch, checkpoint, idle, wake_at)
            self.call(self.world.say, run, call, fate)

    @rule(pick=picks, heard=st.booleans())
    def pull(self, pick: int, heard: bool) -> None:
        run = self._free_run(pick)
        if run is not None:
            self.call(self.world.pull, run, heard=heard)

    # The past comes back

    @rule(pick=st.integers(0, 60))
    def a_late_copy_arrives(self, pick: int) -> None:
        call = pick_from(self.world.said, pick)
        if isinstance(call, (Report, Release)):
            self.call(self.world.tell, call)
        elif call is not None:
            self.call(self.world.tell_claim, call)

    @rule(pick=picks, what=st.sampled_from(["report", "end", "release", "pull"]))
    def a_zombie_goes_on(self, pick: int, what: str) -> None:
        world = self.world
        run = pick_from(world.stale(), pick)
        if run is None:
            return
        if what == "pull":
            self.call(world.pull, run, heard=False)
        elif what == "report":
            self.call(world.tell, world.report(run, events=2, waiting=True, checkpoint=world.checkpoint(run)))
        elif what == "end":
            self.call(world.tell, world.ending(run, TaskStatus.COMPLETED))
        else:
            self.call(world.tell, Release(run.task_id, run.claim.epoch, world.checkpoint(run), idle=True))

    # Instances

    @rule()
    def start_an_instance(self) -> None:
        if len(self.world.alive()) < 3:
            self.call(self.world.start_instance)

    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        instance = pick_from(self.world.alive(), pick)
        if instance is not None and (instance.instance_id in self.world.registered or SEES_STRANGERS):
            self.world.kill(instance)

    @rule(pick=picks, two=st.booleans())
    def reap(self, pick: int, two: bool) -> None:
        """Dead, or only slow: the reaper cannot know."""
        chosen = {pick % len(self.world.instances), (pick + two) % len(self.world.instances)}
        self.call(self.world.reap, [self.world.instances[number].instance_id for number in sorted(chosen)])

    @rule(pick=picks, heard=st.booleans())
    def heartbeat(self, pick: int, heard: bool) -> None:
        instance = pick_from(self.world.alive(), pick)
        if instance is not None:
            self.call(self.world.heartbeat, instance, heard=heard)

    # From outside

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        life = self.world.life_of(pick)
        self.call(self.world.cancel, life.task.task_id if life is not None else "unknown")

    @rule(pick=picks)
    def send(self, pick: int) -> None:
        life = self.world.life_of(pick)
        self.call(self.world.send, life.task.task_id if life is not None else "unknown")

    @rule(pick=picks, reader=st.integers(0, 1), limit=st.integers(0, 4))
    def read(self, pick: int, reader: int, limit: int) -> None:
        life = self.world.life_of(pick)
        if life is not None:
            self.call(self.world.read, life.task.task_id, reader, limit)

    @rule(session=sessions)
    def create_session(self, session: str) -> None:
        self.call(self.world.create_session, session)

    @rule(session=sessions)
    def delete_session(self, session: str) -> None:
        self.call(self.world.delete_session, session)

    @rule(pick=picks, fresh=st.booleans())
    def retry(self, pick: int, fresh: bool) -> None:
        life = pick_from((each for each in self.world.promised.lives.values() if not each.is_open), pick)
        self.call(self.world.retry, "unknown" if life is None else life.task.task_id, fresh=fresh)

    @rule(age=st.sampled_from([0.0, 5.0, 60.0]), limit=st.integers(1, 3))
    def purge(self, age: float, limit: int) -> None:
        self.call(self.world.purge, age, limit)

    # Time

    @rule(seconds=st.sampled_from([0.5, 0.5, 3.0, 10.0, 3600.0, -2.0, -3600.0]))
    def set_the_clock(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def expire(self) -> None:
        self.call(self.world.expire)

    @rule()
    def wake(self) -> None:
        self.call(self.world.wake)


def _fields(task: NewTask) -> dict[str, Any]:
    return {name: getattr(task, name) for name in NewTask.__slots__}


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal("trio") as opened:
        yield opened


@pytest.mark.promise("P1", "P2", "P3", "P4", "P5")
@pytest.mark.timeout(60 + EXAMPLES)
def test_the_promises_hold_whatever_happens(portal: BlockingPortal) -> None:
    run_state_machine_as_test(lambda: Protocol(portal), settings=DEPTH)
