"""Retry policies and error handlers: who tries again, when, how often, and who picks up the pieces. As upstream."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows import retry_policy as rp
from workflows.errors import WorkflowRuntimeError, WorkflowTimeoutError
from workflows.events import Event, StartEvent, StepFailedEvent, StopEvent, WorkflowFailedEvent

from llama_corral.runtime import open_run, run_workflow
from llama_corral.runtime.upstream import decide_retry_delay

from .compare import Case, check

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


def at_once(retry=None, attempts=3):
    return rp.retry_policy(retry=retry, wait=rp.wait_none(), stop=rp.stop_after_attempt(attempts))


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Fallback(Event):
    reason: str


def flaky(policy, errors, *, sync=False):
    """A workflow whose step raises these errors, one a call, and then returns the number of its calls."""

    class Flaky(Workflow):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.calls = 0

        def one_call(self):
            self.calls += 1
            if self.calls <= len(errors):
                raise errors[self.calls - 1]
            return StopEvent(result=self.calls)

        if sync:

            @step(retry_policy=policy)
            def call(self, ev: StartEvent) -> StopEvent:
                return self.one_call()
        else:

            @step(retry_policy=policy)
            async def call(self, ev: StartEvent) -> StopEvent:
                await anyio.lowlevel.checkpoint()
                return self.one_call()

    return Flaky


def caused():
    error = RuntimeError("outer")
    error.__cause__ = ConnectionError("inner")
    return error


class NoSeed:
    """A policy of the user's, of the time before seeds."""

    def next(self, elapsed_time, attempts, error):
        return 0 if attempts < 3 else None


LOST, BUSY, WRONG = ConnectionError("lost"), RuntimeError("busy, try again"), ValueError("wrong")

CONDITIONS = {
    "any": (None, [LOST, WRONG], 3),
    "type": (rp.retry_if_exception_type((ConnectionError, RuntimeError)), [LOST, BUSY], 3),
    "type-no": (rp.retry_if_exception_type(ConnectionError), [LOST, WRONG], WRONG),
    "not-type": (rp.retry_if_not_exception_type(ValueError), [LOST, WRONG], WRONG),
    "unless": (rp.retry_unless_exception_type(ValueError), [LOST, BUSY], 3),
    "message": (rp.retry_if_exception_message(message="lost"), [LOST, BUSY], BUSY),
    "match": (rp.retry_if_exception_message(match="try.again"), [BUSY, LOST], LOST),
    "not-match": (rp.retry_if_not_exception_message(match="try.again"), [LOST, BUSY], BUSY),
    "cause": (rp.retry_if_exception_cause_type(ConnectionError), [caused(), LOST], LOST),
    "predicate": (rp.retry_if_exception(lambda error: "b" in str(error)), [BUSY, LOST], LOST),
    "and": (rp.retry_if_exception_type(RuntimeError) & rp.retry_if_exception_message(match="busy"), [BUSY, LOST], LOST),
    "or": (rp.retry_if_exception_type(RuntimeError) | rp.retry_if_exception_message("lost"), [BUSY, LOST], 3),
    "always": (rp.retry_always(), [LOST, WRONG], 3),
    "never": (rp.retry_never(), [LOST], LOST),
    "never-or": (rp.retry_never() | rp.retry_if_exception_type(ConnectionError), [LOST], 2),
}


@pytest.mark.parametrize("condition", CONDITIONS)
async def test_conditions_decide_which_errors_are_tried_again(flavour, condition):
    retry, errors, outcome = CONDITIONS[condition]
    make = flaky(at_once(retry), errors)
    if isinstance(outcome, Exception):
        await check(Case(make, error=type(outcome), match=str(outcome)), flavour)
    else:
        await check(Case(make, result=outcome), flavour)


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_steps_of_both_kinds_are_tried_again(flavour, sync):
    await check(Case(flaky(at_once(), [LOST, LOST], sync=sync), result=3), flavour)
    await check(Case(flaky(at_once(), [LOST] * 3, sync=sync), error=ConnectionError, match="lost"), flavour)
    await check(Case(flaky(None, [LOST], sync=sync), error=ConnectionError), flavour)
    await check(Case(flaky(NoSeed(), [LOST] * 3, sync=sync), error=ConnectionError), flavour)


WAITS = {
    "fixed": (rp.wait_fixed(1000), [1000, 1000, 1000]),
    "timedelta": (rp.wait_fixed(timedelta(hours=1)), [3600, 3600, 3600]),
    "exponential": (rp.wait_exponential(multiplier=1000, exp_base=3, max=5000), [1000, 3000, 5000]),
    "incrementing": (rp.wait_incrementing(start=1000, increment=500, max=1700), [1000, 1500, 1700]),
    "chain": (rp.wait_chain(rp.wait_fixed(1000), rp.wait_fixed(3000)), [1000, 3000, 3000]),
    "combined": (rp.wait_fixed(1000) + rp.wait_exponential(multiplier=1000, max=9000), [2000, 3000, 5000]),
    "random": (rp.wait_random(1000, 2000), None),
    "jitter": (rp.wait_exponential_jitter(initial=1000, jitter=500, max=9000), None),
    "full-jitter": (rp.wait_full_jitter(multiplier=1000, min=500, max=9000), None),
}


def delay_of(run, name="call"):
    """How long the waiting retry of a step waits, as a snapshot tells it."""
    [attempt] = run.context.to_dict()["workers"][name]["queue"]
    return attempt["not_before"] - attempt["last_failed_at"]


@pytest.mark.parametrize("wait", WAITS)
async def test_delays_are_what_the_policy_says(flavour, wait):
    strategy, expected = WAITS[wait]
    policy = rp.retry_policy(wait=strategy, stop=rp.stop_after_attempt(9))
    delays = []
    for failures in range(1, 4):
        # Without a clock to move, each run is looked at in its first delay; the attempts before it are at once.
        first = rp.wait_chain(*[rp.wait_none()] * (failures - 1), strategy)
        workflow = flaky(rp.retry_policy(wait=first, stop=policy.stop), [LOST] * failures)()
        async with open_run(workflow, run_id=f"run-{wait}", flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            assert run.is_idle
            assert workflow.calls == failures
            delays.append(delay_of(run))
    assert delays == pytest.approx(expected or [strategy(n, seed=seed_of(f"run-{wait}", n + 1)) for n in range(3)])


def seed_of(run_id, failures):
    """The seed that upstream gives a policy for its jitter."""

    class Seen:
        def next(self, elapsed_time, attempts, error, seed=None):
            self.seed = seed

    seen = Seen()
    decide_retry_delay(seen, elapsed_time=0, failures=failures, exception=LOST, run_id=run_id, step_name="call")
    return seen.seed


async def test_jitter_is_the_runs_own_and_the_same_for_the_same_run(flavour):
    make = flaky(rp.retry_policy(wait=rp.wait_random(1000, 2000)), [LOST])
    delays = []
    for run_id in ("a", "a", "b"):
        random.seed(0)  # not what decides
        async with open_run(make(), run_id=run_id, flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            delays.append(delay_of(run))
    assert delays[0] == pytest.approx(delays[1])
    assert delays[0] != pytest.approx(delays[2])


STOPS = {
    "attempts": (rp.stop_after_attempt(4), 4),
    "after": (rp.stop_after_delay(0), 1),
    "after-timedelta": (rp.stop_after_delay(timedelta(days=1)) | rp.stop_after_attempt(2), 2),
    "before": (rp.stop_before_delay(1e-9), 1),
    "any": (rp.stop_after_attempt(2) | rp.stop_after_attempt(5), 2),
    "all": (rp.stop_after_attempt(2) & rp.stop_after_attempt(5), 5),
    "all-with-never": ((rp.stop_never() & rp.stop_after_attempt(1)) | rp.stop_after_attempt(3), 3),
}


@pytest.mark.parametrize("stop", STOPS)
async def test_stop_conditions_end_the_retries(flavour, stop):
    condition, calls = STOPS[stop]
    make = flaky(rp.retry_policy(wait=rp.wait_none(), stop=condition), [ConnectionError(n) for n in range(1, 9)])
    await check(Case(make, error=ConnectionError, match=str(calls)), flavour)


async def test_a_policy_that_never_stops_is_ended_by_the_workflows_timeout(flavour):
    policy = rp.retry_policy(wait=rp.wait_fixed(0.005), stop=rp.stop_never())
    workflow = flaky(policy, [LOST] * 10_000)(timeout=0.5)
    with pytest.raises(WorkflowTimeoutError):
        await run_workflow(workflow, flavour=flavour)
    assert workflow.calls > 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: rp.ConstantDelayRetryPolicy(maximum_attempts=2, delay=0),
        lambda: rp.ExponentialBackoffRetryPolicy(maximum_attempts=2, initial_delay=0),
        lambda: rp.ExponentialBackoffRetryPolicy(maximum_attempts=2, initial_delay=0, jitter=False),
    ],
)
async def test_the_old_names_of_policies(flavour, make):
    with pytest.warns(DeprecationWarning, match="RetryPolicy is deprecated"):
        policy = make()
    await check(Case(flaky(policy, [LOST]), result=2), flavour)
    await check(Case(flaky(policy, [LOST] * 2), error=ConnectionError), flavour)


class Informed(Workflow):
    def __init__(self):
        super().__init__()
        self.infos = []

    @step(retry_policy=at_once())
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.infos.append(ctx.retry_info())
        if len(self.infos) < 3:
            raise ConnectionError(f"attempt {len(self.infos)}")
        return StopEvent()


async def test_a_step_knows_its_attempts(flavour):
    before = datetime.now(UTC)
    workflow = Informed()
    await run_workflow(workflow, flavour=flavour)
    first, second, third = workflow.infos
    assert (first.retry_number, first.elapsed_seconds, first.last_exception, first.last_failed_at) == (
        0,
        0.0,
        None,
        None,
    )
    assert [info.retry_number for info in (second, third)] == [1, 2]
    assert [str(info.last_exception) for info in (second, third)] == ["attempt 1", "attempt 2"]
    assert second.last_exception.__traceback__ is not None
    moments = [second.last_failed_at, third.last_failed_at]
    assert before - timedelta(seconds=1) <= moments[0] <= moments[1] <= datetime.now(UTC) + timedelta(seconds=1)


class DelayedAndOthers(Workflow):
    """One worker: a call that waits for its retry keeps nobody else from working."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(3):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=1, retry_policy=rp.retry_policy(wait=rp.wait_fixed(1000)))
    async def work(self, ctx: Context, ev: Item) -> Done:
        if ev.n == 0:
            raise LOST
        return Done(n=ev.n)

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=[d.n for d in done])


async def test_a_delayed_call_keeps_no_worker(flavour):
    await check(Case(DelayedAndOthers, result=[1, 2], parallel=True), flavour)


# Error handlers


class Handled(Workflow):
    """After its retries; with all that is known of the failure."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=5)

    @step(retry_policy=at_once())
    async def work(self, ev: Item) -> StopEvent:
        raise LookupError("gone")

    @catch_error
    async def handle(self, ctx: Context, ev: StepFailedEvent) -> StopEvent:
        assert ev.elapsed_seconds >= 0
        assert ev.failed_at.tzinfo is UTC
        assert ev.exception.__traceback__ is not None
        return StopEvent(result=(ev.step_name, ev.attempts, type(ev.exception).__name__, ev.input_event.n))


class Scoped(Workflow):
    @step
    async def start(self, ev: StartEvent) -> Item | Done:
        return Item() if ev.fails == "left" else Done()

    @step
    async def left(self, ev: Item) -> StopEvent:
        raise LookupError("left")

    @step
    async def right(self, ev: Done) -> StopEvent:
        raise LookupError("right")

    @catch_error(for_steps=["left"])
    async def for_left(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=f"scoped: {ev.exception}")

    @catch_error
    async def for_the_rest(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=f"wildcard: {ev.exception}")


class GoesOn(Workflow):
    """The handler gives an event of its own, from which the workflow goes on."""

    @step
    async def fetch(self, ev: StartEvent) -> Done:
        raise ConnectionError("down")

    @catch_error(for_steps=["fetch"])
    def handle(self, ev: StepFailedEvent) -> Fallback:
        return Fallback(reason=str(ev.exception))

    @step
    async def fall_back(self, ev: Fallback) -> Done:
        return Done(n=len(ev.reason))

    @step
    async def finish(self, ev: Done) -> StopEvent:
        return StopEvent(result=ev.n)


class HandlerFails(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("first")

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        raise RuntimeError("second")


def budget(recoveries):
    class Budget(Workflow):
        """What the handler gives fails again, until its budget for this line of events is spent."""

        @step
        async def start(self, ev: StartEvent) -> Item:
            return Item()

        @step
        async def work(self, ev: Item) -> StopEvent:
            raise LookupError(f"round {ev.n}")

        @catch_error(max_recoveries=recoveries)
        async def handle(self, ev: StepFailedEvent) -> Item:
            return Item(n=ev.input_event.n + 1)

    return Budget


class Lines(Workflow):
    """Each line of events has a budget of its own, also where it goes on by `send_event`."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in (10, 20):
            ctx.send_event(Item(n=n))
        return None

    @step
    async def work(self, ev: Item) -> Done:
        if ev.n % 10 < 2:
            raise LookupError
        return Done(n=ev.n)

    @catch_error(max_recoveries=2)
    async def handle(self, ctx: Context, ev: StepFailedEvent) -> Item | None:
        ctx.send_event(Item(n=ev.input_event.n + 1))
        return None

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=sorted(d.n for d in done))


class TwoHandlers(Workflow):
    """One handler's fallback fails into another handler."""

    @step
    async def fail(self, ev: StartEvent) -> Item:
        raise LookupError("one")

    @catch_error(for_steps=["fail"])
    async def first(self, ev: StepFailedEvent) -> Fallback:
        return Fallback(reason=str(ev.exception))

    @step
    async def again(self, ev: Fallback) -> Item:
        raise LookupError(f"{ev.reason} two")

    @catch_error(for_steps=["again"])
    async def second(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=str(ev.exception))

    @step
    async def unreached(self, ev: Item) -> StopEvent:
        return StopEvent()


class WrongReturn(Workflow):
    @step
    async def wrong(self, ev: StartEvent) -> StopEvent:
        return 42  # type: ignore[return-value]

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=type(ev.exception).__name__)


HANDLERS = [
    Case(Handled, result=("work", 3, "LookupError", 5)),
    Case(Scoped, {"fails": "left"}, result="scoped: left", name="scoped"),
    Case(Scoped, {"fails": "right"}, result="wildcard: right", name="wildcard"),
    Case(GoesOn, result=4),
    Case(HandlerFails, error=RuntimeError, match="second"),
    Case(budget(1), error=LookupError, match="round 1", name="1"),
    Case(budget(3), error=LookupError, match="round 3", name="3"),
    Case(Lines, result=[12, 22], parallel=True),
    Case(TwoHandlers, result="one two"),
    Case(WrongReturn, result=WorkflowRuntimeError.__name__),
]


@pytest.mark.parametrize("case", HANDLERS, ids=str)
async def test_error_handlers(flavour, case):
    await check(case, flavour)


async def test_the_failed_event_tells_attempts_and_time(flavour):
    async with open_run(flaky(at_once(), [LOST] * 3)(), flavour=flavour) as run:
        with pytest.raises(ConnectionError):
            await run.result()
        [failed] = [event async for event in run.events()]
    assert isinstance(failed, WorkflowFailedEvent)
    assert (failed.step_name, failed.attempts, failed.exception) == ("call", 3, LOST)
    assert 0 <= failed.elapsed_seconds < 10
