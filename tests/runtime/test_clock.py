"""Every timer obeys the backend's clock, and what is stored is wall-clock time. Trio's clocks can be moved; asyncio's
cannot, so on asyncio the same timers are tested with milliseconds (test_failing, test_waiters, test_snapshots)."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import anyio
import pytest
import trio
from workflows import Context, Workflow, catch_error, step
from workflows import retry_policy as rp
from workflows.errors import ContextSerdeError, WorkflowTimeoutError
from workflows.events import Event, HumanResponseEvent, StartEvent, StepFailedEvent, StopEvent, WorkflowFailedEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import core, open_run, run_workflow

pytestmark = [pytest.mark.trio, pytest.mark.parametrize("flavour", ["anyio", "asyncio"])]

HOUR = 3600.0
DAY = 24 * HOUR


def close(seconds):
    """Timers wake up a little late, never early."""
    return pytest.approx(seconds, abs=1e-3)


class Item(Event):
    n: int = 0


class Flaky(Workflow):
    """Fails `failures` times; remembers when it was called and what it was told."""

    policy = rp.retry_policy()
    failures = 3

    def __init__(self):
        super().__init__(timeout=None)
        self.times = []
        self.infos = []

    def note(self, ctx):
        self.times.append(trio.current_time())
        self.infos.append(ctx.retry_info())
        if len(self.times) <= self.failures:
            raise ConnectionError(f"call {len(self.times)}")
        return StopEvent(result=len(self.times))

    @property
    def gaps(self):
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def flaky(**policy):
    class Policed(Flaky):
        @step(retry_policy=rp.retry_policy(**policy))
        async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
            return self.note(ctx)

    return Policed()


WAITS = {
    "fixed": (rp.wait_fixed(HOUR), [HOUR] * 3),
    "exponential": (rp.wait_exponential(multiplier=HOUR, exp_base=3, max=DAY), [HOUR, 3 * HOUR, 9 * HOUR]),
    "incrementing": (rp.wait_incrementing(start=HOUR, increment=HOUR), [HOUR, 2 * HOUR, 3 * HOUR]),
    "chain": (rp.wait_chain(rp.wait_none(), rp.wait_fixed(DAY)), [0, DAY, DAY]),
    "sum": (rp.wait_fixed(HOUR) + rp.wait_fixed(DAY), [HOUR + DAY] * 3),
}


@pytest.mark.parametrize("wait", WAITS)
async def test_retries_wait_as_their_policy_says(flavour, autojump_clock, wait):
    strategy, gaps = WAITS[wait]
    workflow = flaky(wait=strategy, stop=rp.stop_after_attempt(9))
    assert await run_workflow(workflow, flavour=flavour) == 4
    assert workflow.gaps == [close(gap) for gap in gaps]
    assert [info.elapsed_seconds for info in workflow.infos] == [close(sum(gaps[:n])) for n in range(4)]


@pytest.mark.parametrize(
    "wait",
    [
        rp.wait_random(HOUR, DAY),
        rp.wait_exponential_jitter(HOUR, max=DAY, jitter=HOUR),
        rp.wait_full_jitter(DAY, max=DAY),
    ],
    ids=["random", "exponential", "full"],
)
async def test_jitter_is_repeated_by_the_same_run_id(flavour, autojump_clock, wait):
    gaps = {}
    for attempt, run_id in enumerate(["one", "one", "other"]):
        workflow = flaky(wait=wait, stop=rp.stop_after_attempt(9))
        await run_workflow(workflow, run_id=run_id, flavour=flavour)
        gaps[attempt] = workflow.gaps
    assert gaps[0] == [close(gap) for gap in gaps[1]]
    assert gaps[0] != [close(gap) for gap in gaps[2]]
    assert all(0 < gap <= 2 * DAY for gap in gaps[0])


@pytest.mark.parametrize(
    ("stop", "calls"),
    [
        (rp.stop_after_delay(2.5 * HOUR), 4),  # the first failure after that time is the last
        (rp.stop_before_delay(2.5 * HOUR), 3),  # no retry begins after that time
        (rp.stop_after_delay(2.5 * HOUR) & rp.stop_after_attempt(6), 6),
        (rp.stop_before_delay(2.5 * HOUR) | rp.stop_after_attempt(2), 2),
    ],
)
async def test_stop_conditions_see_the_time_that_has_passed(flavour, autojump_clock, stop, calls):
    workflow = flaky(wait=rp.wait_fixed(HOUR), stop=stop)
    workflow.failures = 99
    async with open_run(workflow, flavour=flavour) as run:
        with pytest.raises(ConnectionError, match=f"call {calls}"):
            await run.result()
        failed = [event async for event in run.events()][-1]
    assert isinstance(failed, WorkflowFailedEvent)
    assert failed.attempts == calls
    assert failed.elapsed_seconds == close((calls - 1) * HOUR)


class Handled(Workflow):
    def __init__(self):
        super().__init__(timeout=None)

    @step(retry_policy=rp.retry_policy(wait=rp.wait_fixed(HOUR), stop=rp.stop_after_attempt(3)))
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise ConnectionError

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=(ev.attempts, ev.elapsed_seconds, ev.failed_at))


async def test_time_stamps_are_wall_clock_and_durations_are_the_clocks(flavour, autojump_clock):
    before = time.time()
    attempts, elapsed, failed_at = await run_workflow(Handled(), flavour=flavour)
    assert (attempts, elapsed) == (3, close(2 * HOUR))
    # The run began now; its clock went on by two hours.
    assert failed_at.tzinfo is UTC
    assert 0 <= failed_at.timestamp() - (before + 2 * HOUR) < 60


async def test_a_retry_knows_when_the_last_call_failed(flavour, autojump_clock):
    before = datetime.now(UTC).timestamp()
    workflow = flaky(wait=rp.wait_fixed(HOUR), stop=rp.stop_after_attempt(9))
    await run_workflow(workflow, flavour=flavour)
    assert workflow.infos[0].last_failed_at is None
    for number, info in enumerate(workflow.infos[1:]):
        assert 0 <= info.last_failed_at.timestamp() - (before + number * HOUR) < 60


# The workflow's timeout


class Turns(Workflow):
    """Works an hour a turn."""

    def __init__(self, turns=100, **kwargs):
        super().__init__(**kwargs)
        self.turns = turns
        self.done = []

    @step
    async def turn(self, ev: StartEvent | Item) -> Item | StopEvent:
        n = ev.n if isinstance(ev, Item) else 0
        if n == self.turns:
            return StopEvent(result=n)
        await anyio.sleep(HOUR)
        self.done.append(n)
        return Item(n=n + 1)


async def test_a_timeout_ends_a_run_that_works(flavour, autojump_clock):
    began = trio.current_time()
    workflow = Turns(timeout=10.5 * HOUR)
    with pytest.raises(WorkflowTimeoutError, match="active steps: turn"):
        await run_workflow(workflow, flavour=flavour)
    assert trio.current_time() - began == close(10.5 * HOUR)
    assert workflow.done == [*range(10)]


async def test_no_timeout_is_none(flavour, autojump_clock):
    assert await run_workflow(Turns(turns=1000, timeout=None), flavour=flavour) == 1000


# Resuming: the wall clock goes on with the backend's, as it does outside of tests


@pytest.fixture
def wall_clock(monkeypatch):
    began = time.time()

    class Moved:
        @staticmethod
        def time():
            return began + trio.current_time()

    monkeypatch.setattr(core, "time", Moved)


async def left_after(seconds, workflow, flavour):
    """The snapshot of a run that is left when that time has passed."""
    async with open_run(workflow, flavour=flavour) as run:
        await trio.sleep(seconds)
        return json.loads(json.dumps(run.context.to_dict()))


async def resumed(workflow, stored, flavour):
    return await run_workflow(workflow, context=Context.from_dict(workflow, stored), flavour=flavour)


async def test_a_resumed_runs_timeout_counts_the_time_it_was_alive(flavour, autojump_clock, wall_clock):
    """Up to the last thing that happened before it was left, and not while it was away."""
    stored = await left_after(6.5 * HOUR, Turns(timeout=10.25 * HOUR), flavour)
    assert stored["elapsed_alive"] == close(6 * HOUR)
    await trio.sleep(DAY)
    began = trio.current_time()
    workflow = Turns(timeout=10.25 * HOUR)
    with pytest.raises(WorkflowTimeoutError):
        await resumed(workflow, stored, flavour)
    assert trio.current_time() - began == close(4.25 * HOUR)
    assert workflow.done == [6, 7, 8, 9]


async def test_a_run_that_has_used_up_its_time_ends_at_once(flavour, autojump_clock, wall_clock):
    stored = await left_after(6.5 * HOUR, Turns(timeout=10 * HOUR), flavour)
    began = trio.current_time()
    workflow = Turns(timeout=5 * HOUR)
    with pytest.raises(WorkflowTimeoutError):
        await resumed(workflow, stored, flavour)
    assert trio.current_time() == began
    assert workflow.done == []


@pytest.mark.parametrize(("away", "waits"), [(0, 0.75), (0.5, 0.25), (24, 0)])
async def test_a_resumed_retry_is_due_when_it_was(flavour, autojump_clock, wall_clock, away, waits):
    policy = {"wait": rp.wait_fixed(HOUR), "stop": rp.stop_after_attempt(9)}
    stored = await left_after(0.25 * HOUR, flaky(**policy), flavour)
    await trio.sleep(away * HOUR)
    began = trio.current_time()
    workflow = flaky(**policy)
    workflow.failures = 1
    assert await resumed(workflow, stored, flavour) == 2
    assert [at - began for at in workflow.times] == [close(waits * HOUR), close((waits + 1) * HOUR)]
    first, second = workflow.infos
    assert (first.retry_number, second.retry_number) == (1, 2)
    assert str(first.last_exception) == "call 1"
    # Since the very first call, which was in the other run.
    assert first.elapsed_seconds == close((0.25 + away + waits) * HOUR)


async def test_stop_conditions_count_from_the_first_call_in_the_run_before(flavour, autojump_clock, wall_clock):
    policy = {"wait": rp.wait_fixed(HOUR), "stop": rp.stop_after_delay(DAY)}
    stored = await left_after(0.25 * HOUR, flaky(**policy), flavour)
    await trio.sleep(2 * DAY)
    workflow = flaky(**policy)
    with pytest.raises(ConnectionError):
        await resumed(workflow, stored, flavour)
    assert len(workflow.times) == 1


class Waits(Workflow):
    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            await ctx.wait_for_event(HumanResponseEvent, timeout=HOUR)
        except TimeoutError:
            return StopEvent(result="nobody came")
        return StopEvent(result="somebody came")


async def test_clocks_of_several_runs_are_one(flavour, autojump_clock):
    """Each run's timers count from its own start, whenever that was."""
    ended = {}

    async def one(n):
        await trio.sleep(n * 60)
        began = trio.current_time()
        assert await run_workflow(Waits(timeout=None), flavour=flavour) == "nobody came"
        ended[n] = trio.current_time() - began

    async with open_asyncio_loop(), trio.open_nursery() as nursery:
        for n in range(5):
            nursery.start_soon(one, n)
    assert ended == {n: close(HOUR) for n in range(5)}


# A resumed run's waiters, which upstream's snapshots leave without their timeouts


class Patient(Workflow):
    """Waits an hour for an answer. Remembers when it gave up."""

    user: str | None = None

    def __init__(self, *, stuck=False):
        super().__init__(timeout=None)
        self.stuck = stuck
        self.gave_up = []

    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            requirements = {"user": self.user} if self.user else None
            got = await ctx.wait_for_event(HumanResponseEvent, timeout=HOUR, requirements=requirements)
        except TimeoutError:
            self.gave_up.append(trio.current_time())
            if self.stuck:
                await anyio.sleep_forever()
            return StopEvent(result="nobody came")
        return StopEvent(result=got.response)


class PatientWithOne(Patient):
    user = "ada"


@pytest.mark.parametrize("make", [Patient, PatientWithOne])
@pytest.mark.parametrize(("away", "waits"), [(0, 0.75), (0.5, 0.25), (24, 0)])
async def test_a_resumed_waiter_times_out_when_it_would_have(flavour, autojump_clock, wall_clock, make, away, waits):
    stored = await left_after(0.25 * HOUR, make(), flavour)
    await trio.sleep(away * HOUR)
    began = trio.current_time()
    workflow = make()
    assert await resumed(workflow, stored, flavour) == "nobody came"
    assert [at - began for at in workflow.gave_up] == [close(waits * HOUR)]


@pytest.mark.parametrize("make", [Patient, PatientWithOne])
async def test_a_resumed_waiter_can_still_be_answered(flavour, autojump_clock, wall_clock, make):
    workflow = make()
    stored = await left_after(0.25 * HOUR, workflow, flavour)
    context = Context.from_dict(workflow, stored)
    async with open_run(workflow, context=context, flavour=flavour) as run:
        await trio.sleep(0.5 * HOUR)
        assert run.statistics().timers == 1
        run.send_event(HumanResponseEvent(response="here", user="ada"))
        assert await run.result() == "here"


@pytest.mark.parametrize("make", [Patient, PatientWithOne])
async def test_a_run_left_while_it_gives_up_gives_up_again_at_once(flavour, autojump_clock, wall_clock, make):
    stored = await left_after(1.25 * HOUR, make(stuck=True), flavour)
    began = trio.current_time()
    workflow = make()
    assert await resumed(workflow, stored, flavour) == "nobody came"
    assert workflow.gave_up == [close(began)]


async def test_a_waiter_is_timed_over_any_number_of_resumes(flavour, autojump_clock, wall_clock):
    began = trio.current_time()
    stored = None
    for _ in range(3):
        workflow = PatientWithOne()
        context = Context.from_dict(workflow, stored) if stored else None
        async with open_run(workflow, context=context, flavour=flavour) as run:
            await trio.sleep(0.25 * HOUR)
            stored = json.loads(json.dumps(run.context.to_dict()))
    workflow = PatientWithOne()
    assert await resumed(workflow, stored, flavour) == "nobody came"
    assert workflow.gave_up == [close(began + HOUR)]


@pytest.mark.parametrize("damage", [3, [3], [["wait", "id"]], [["wait", "id", "soon"]]])
async def test_damaged_deadlines_are_refused(flavour, autojump_clock, damage):
    stored = await left_after(0.25 * HOUR, Patient(), flavour)
    stored["state"]["waiter_deadlines"] = damage
    with pytest.raises(ContextSerdeError, match="waiter_deadlines"):
        await resumed(Patient(), stored, flavour)
