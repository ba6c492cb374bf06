"""wait_for_event: people, timeouts, several waiters. Clocks are Trio's own here, so that a day passes at once."""

from __future__ import annotations

import anyio
import pytest
import trio
import trio.testing
from workflows import Context, Workflow, step
from workflows.errors import WorkflowTimeoutError
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent, WorkflowTimedOutEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import open_run, run_workflow

DAY = 86_400.0
TRIO_FLAVOURS = pytest.mark.parametrize("flavour", ["anyio", "asyncio"])


class Named(Event):
    name: str


class Ask(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            answer = await ctx.wait_for_event(
                HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="name?"), timeout=ev.get("timeout", 1e6)
            )
        except TimeoutError:
            return StopEvent(result="nobody came")
        return StopEvent(result=answer.response)


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_left")
class TestEverywhere:
    async def test_a_person_in_the_loop(self, flavour):
        async with open_run(Ask(), flavour=flavour) as run:
            async for event in run.events():
                if isinstance(event, InputRequiredEvent):
                    assert event.prefix == "name?"
                    run.send_event(HumanResponseEvent(response="ada"))
            assert await run.result() == "ada"

    async def test_a_waiter_times_out(self, flavour):
        assert await run_workflow(Ask(), timeout=0.02, flavour=flavour) == "nobody came"

    async def test_the_workflow_times_out(self, flavour):
        async with open_run(Ask(timeout=0.03), flavour=flavour) as run:
            with pytest.raises(WorkflowTimeoutError, match=r"0\.03"):
                await run.result()
            assert isinstance([event async for event in run.events()][-1], WorkflowTimedOutEvent)

    async def test_several_waiters_at_once(self, flavour):
        async with open_run(Several(), flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            assert run.is_idle
            for name in ("c", "a", "b"):
                run.send_event(Named(name=name))
            assert await run.result() == ["a", "b", "c"]

    async def test_several_waiters_are_answered_early(self, flavour):
        async with open_run(Several(), flavour=flavour) as run:
            for name in ("c", "a", "b"):
                run.send_event(Named(name=name))
            assert await run.result() == ["a", "b", "c"]

    async def test_two_questions_in_one_step(self, flavour):
        async with open_run(Twice(), flavour=flavour) as run:
            for answer in ("one", "two"):
                run.send_event(HumanResponseEvent(response=answer))
            assert await run.result() == ["one", "two"]


class Part(Event):
    name: str


class PartDone(Event):
    name: str


class Several(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Part | None:
        for name in "abc":
            ctx.send_event(Part(name=name))
        return None

    @step(num_workers=4)
    async def wait(self, ctx: Context, ev: Part) -> PartDone:
        got = await ctx.wait_for_event(Named, requirements={"name": ev.name})
        return PartDone(name=got.name)

    @step
    async def gather(self, ctx: Context, ev: PartDone) -> StopEvent | None:
        done = ctx.collect_events(ev, [PartDone] * 3)
        return None if done is None else StopEvent(result=sorted(part.name for part in done))


class Twice(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        first = await ctx.wait_for_event(HumanResponseEvent, waiter_id="first")
        second = await ctx.wait_for_event(HumanResponseEvent, waiter_id="second")
        return StopEvent(result=[first.response, second.response])


@TRIO_FLAVOURS
@pytest.mark.trio
async def test_a_day_passes_in_no_time(flavour, autojump_clock):
    began = trio.current_time()
    assert await run_workflow(Ask(timeout=None), timeout=DAY, flavour=flavour) == "nobody came"
    assert trio.current_time() - began == pytest.approx(DAY, abs=1e-3)


@TRIO_FLAVOURS
@pytest.mark.trio
async def test_a_workflow_timeout_counts_from_its_start(flavour, autojump_clock):
    began = trio.current_time()
    with pytest.raises(WorkflowTimeoutError):
        await run_workflow(Ask(timeout=DAY), timeout=None, flavour=flavour)
    assert trio.current_time() - began == pytest.approx(DAY, abs=1e-3)


class Rounds(Workflow):
    """Asks again and again under one waiter id, with a timeout each time."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent | Part) -> Part | StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_id="again", timeout=100)
        count = await ctx.store.get("count", default=0) + 1
        await ctx.store.set("count", count)
        return StopEvent(result=count) if answer.response == "stop" else Part(name="next")


@pytest.mark.promise("P12")
@TRIO_FLAVOURS
@pytest.mark.trio
async def test_answered_waiters_leave_no_timer(flavour, autojump_clock):
    async with open_run(Rounds(timeout=None), flavour=flavour) as run:
        for _ in range(50):
            await trio.sleep(90)  # each within its own 100 s, all of them far beyond the first one's
            run.send_event(HumanResponseEvent(response="go"))
            await trio.testing.wait_all_tasks_blocked()
            assert run.statistics().timers == 1
        run.send_event(HumanResponseEvent(response="stop"))
        assert await run.result() == 51


class Flaky(Workflow):
    def __init__(self, policy_failures, **kwargs):
        super().__init__(**kwargs)
        self.failures = policy_failures
        self.times = []

    @step(retry_policy=retry_policy(wait=wait_fixed(3600), stop=stop_after_attempt(4)))
    async def flaky(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.times.append(trio.current_time())
        info = ctx.retry_info()
        assert info.retry_number == len(self.times) - 1
        assert info.elapsed_seconds == pytest.approx(3600 * info.retry_number, abs=1)
        if len(self.times) <= self.failures:
            raise ConnectionError(f"attempt {len(self.times)}")
        return StopEvent(result=len(self.times))


@TRIO_FLAVOURS
@pytest.mark.trio
async def test_retries_wait_as_long_as_their_policy_says(flavour, autojump_clock):
    workflow = Flaky(2, timeout=None)
    assert await run_workflow(workflow, flavour=flavour) == 3
    gaps = [later - earlier for earlier, later in zip(workflow.times, workflow.times[1:], strict=False)]
    assert gaps == [pytest.approx(3600, abs=1e-3)] * 2


@TRIO_FLAVOURS
@pytest.mark.trio
async def test_retries_end_with_the_last_error(flavour, autojump_clock):
    workflow = Flaky(99, timeout=None)
    with pytest.raises(ConnectionError, match="attempt 4"):
        await run_workflow(workflow, flavour=flavour)
    assert len(workflow.times) == 4


@pytest.mark.promise("P10")
@TRIO_FLAVOURS
@pytest.mark.trio
async def test_a_waiting_run_does_nothing(flavour, mock_clock):
    async with open_run(Ask(timeout=None), timeout=DAY, flavour=flavour) as run:
        await trio.testing.wait_all_tasks_blocked()
        before = run.statistics().ticks
        for _ in range(10):
            mock_clock.jump(DAY / 20)
            await trio.testing.wait_all_tasks_blocked()
        assert run.statistics().ticks == before
        mock_clock.jump(DAY)
        assert await run.result() == "nobody came"


@TRIO_FLAVOURS
@pytest.mark.trio
async def test_a_timeout_counts_from_the_runs_turn(flavour, autojump_clock):
    workflow = Ask(timeout=10, num_concurrent_runs=1)
    async with open_run(workflow, flavour=flavour) as first:
        await trio.testing.wait_all_tasks_blocked()
        async with open_run(workflow, flavour=flavour) as second:
            await trio.sleep(9)
            first.send_event(HumanResponseEvent(response="first"))
            await first.result()
            await trio.sleep(9)
            second.send_event(HumanResponseEvent(response="second"))
            assert await second.result() == "second"
