"""What a workflow can do in its steps, in every flavour."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowRuntimeError, WorkflowValidationError
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.runtime import make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

caller: ContextVar[str] = ContextVar("caller", default="nobody")


class Note(Event):
    text: str = ""


class Item(Event):
    n: int


class Done(Event):
    n: int


class Summary(StopEvent):
    total: int = 0


class Hello(Workflow):
    @step
    async def say(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        ctx.write_event_to_stream(Note(text=f"hi {ev.get('name')}"))
        return StopEvent(result=f"hello {ev.get('name')}")


async def test_a_result(flavour):
    assert await run_workflow(Hello(), name="ada", flavour=flavour) == "hello ada"


async def test_a_given_start_event(flavour):
    assert await run_workflow(Hello(), start_event=StartEvent(name="bob"), flavour=flavour) == "hello bob"


async def test_events_then_the_result(flavour):
    async with open_run(Hello(), name="ada", flavour=flavour) as run:
        seen = [event async for event in run.events()]
        assert [type(event) for event in seen] == [Note, StopEvent]
        assert await run.result() == "hello ada"
        assert run.is_done
        assert run.stop_event.result == "hello ada"


class Returns(Workflow):
    @step
    async def give(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result={"none": None, "dict": {"a": [1]}, "object": self}[ev.get("kind")])


@pytest.mark.parametrize(("kind", "check"), [("none", None), ("dict", {"a": [1]})])
async def test_results_are_what_the_stop_event_carries(flavour, kind, check):
    assert await run_workflow(Returns(), kind=kind, flavour=flavour) == check


async def test_any_object_can_be_a_result(flavour):
    workflow = Returns()
    assert await run_workflow(workflow, kind="object", flavour=flavour) is workflow


class OwnStop(Workflow):
    @step
    async def give(self, ev: StartEvent) -> Summary:
        return Summary(total=7)


async def test_a_stop_event_of_an_own_class_is_the_result(flavour):
    result = await run_workflow(OwnStop(), flavour=flavour)
    assert type(result) is Summary
    assert result.total == 7


class InThreads(Workflow):
    @step(num_workers=2)
    def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        assert threading.current_thread() is not threading.main_thread()
        assert caller.get() == "opener"
        assert ctx.retry_info().elapsed_seconds == 0
        for n in range(3):
            ctx.write_event_to_stream(Note(text=str(n)))
            ctx.send_event(Item(n=n))
        return None

    @step
    def work(self, ctx: Context, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def gather(self, ctx: Context, ev: Done) -> StopEvent | None:
        all_done = ctx.collect_events(ev, [Done] * 3)
        return None if all_done is None else StopEvent(result=sorted(done.n for done in all_done))


async def test_sync_steps_send_and_publish_from_their_thread(flavour):
    caller.set("opener")
    async with open_run(InThreads(), flavour=flavour) as run:
        notes = [event.text async for event in run.events() if isinstance(event, Note)]
        assert notes == ["0", "1", "2"]
        assert await run.result() == [0, 1, 2]


class Boom(Exception):
    pass


class Failing(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        raise Boom("on purpose")


class FailingInThread(Workflow):
    @step
    def fail(self, ev: StartEvent) -> StopEvent:
        raise Boom("on purpose")


@pytest.mark.parametrize("workflow", [Failing, FailingInThread])
async def test_errors_are_raised_as_the_workflow_raised_them(flavour, workflow):
    with pytest.raises(Boom, match="on purpose"):
        await run_workflow(workflow(), flavour=flavour)
    async with open_run(workflow(), flavour=flavour) as run:
        with pytest.raises(Boom):
            await run.result()
        with pytest.raises(Boom) as again:
            await run.result()
        depth = len(again.traceback)
        with pytest.raises(Boom) as third:
            await run.result()
        assert len(third.traceback) == depth  # callers do not add to each other's traceback
        with pytest.raises(Boom):
            _ = run.stop_event


@pytest.mark.parametrize("error", [Boom("body"), KeyboardInterrupt(), ExceptionGroup("own", [Boom("a")])])
async def test_errors_of_the_block_pass_through_as_they_are(flavour, error):
    with pytest.raises(type(error)) as caught:
        async with open_run(Waiting(), flavour=flavour):
            raise error
    assert caught.value is error


class Waiting(Workflow):
    @step
    async def wait(self, ev: StartEvent) -> StopEvent:
        await anyio.sleep_forever()
        return StopEvent()


class Wrong(Workflow):
    @step
    async def wrong(self, ev: StartEvent) -> StopEvent:
        return 42  # type: ignore[return-value]


async def test_a_step_that_returns_no_event_fails_by_name(flavour):
    with pytest.raises(WorkflowRuntimeError, match=r"wrong.*int"):
        await run_workflow(Wrong(), flavour=flavour)


class Unfinished(Workflow):
    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def finish(self, ev: Note) -> StopEvent:
        return StopEvent()


async def test_an_invalid_workflow_is_refused_before_it_starts(flavour):
    with pytest.raises(WorkflowValidationError):
        await run_workflow(Unfinished(), flavour=flavour)
    with pytest.raises(WorkflowValidationError):
        async with open_run(Unfinished(), flavour=flavour):
            pytest.fail("unreachable")


class Needy(StartEvent):
    n: int


class NeedsArgument(Workflow):
    @step
    async def start(self, ev: Needy) -> StopEvent:
        return StopEvent(result=ev.n)


async def test_wrong_start_arguments_are_refused_before_it_starts(flavour):
    with pytest.raises(WorkflowRuntimeError, match="Needy"):
        await run_workflow(NeedsArgument(), flavour=flavour)
    assert await run_workflow(NeedsArgument(), n=3, flavour=flavour) == 3


class Pool(Workflow):
    running = 0
    peak = 0

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(9):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=3)
    async def work(self, ctx: Context, ev: Item) -> Done:
        self.running += 1
        self.peak = max(self.peak, self.running)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        self.running -= 1
        return Done(n=ev.n)

    @step
    async def gather(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 9)
        return None if done is None else StopEvent(result=sorted(d.n for d in done))


async def test_collect_events_and_num_workers(flavour):
    workflow = Pool()
    assert await run_workflow(workflow, flavour=flavour) == list(range(9))
    assert workflow.peak == 3


class FanOut(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(ev.get("count"))]

    @step
    async def work(self, ev: Item) -> Done:
        await anyio.lowlevel.checkpoint()
        return Done(n=ev.n * 10)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=sorted(d.n for d in done))


@pytest.mark.parametrize("count", [0, 1, 12])
async def test_list_fan_out_and_collect_step(flavour, count):
    assert await run_workflow(FanOut(), count=count, flavour=flavour) == [n * 10 for n in range(count)]


class Addressed(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        ctx.send_event(Item(n=1), step=ev.get("to"))
        return None

    @step
    async def left(self, ctx: Context, ev: Item) -> StopEvent:
        return StopEvent(result="left")

    @step
    async def right(self, ctx: Context, ev: Item) -> StopEvent:
        return StopEvent(result="right")


async def test_send_event_to_a_named_step(flavour):
    assert await run_workflow(Addressed(), to="left", flavour=flavour) == "left"
    assert await run_workflow(Addressed(), to="right", flavour=flavour) == "right"


async def test_send_event_to_a_step_that_does_not_take_it(flavour):
    with pytest.raises(WorkflowRuntimeError, match="nowhere"):
        await run_workflow(Addressed(), to="nowhere", flavour=flavour)
    with pytest.raises(WorkflowRuntimeError, match="start"):
        await run_workflow(Addressed(), to="start", flavour=flavour)
    async with open_run(Waiting(), flavour=flavour) as run:
        with pytest.raises(WorkflowRuntimeError, match="nowhere"):
            run.send_event(Item(n=1), step="nowhere")
        with pytest.raises(WorkflowRuntimeError, match="wait"):
            run.send_event(Item(n=1), step="wait")


class Parent(Workflow):
    @step
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        flavour = ev.get("flavour")
        async with open_run(Hello(), name="child", flavour=flavour) as child:
            async for event in child.events():
                if isinstance(event, Note):
                    ctx.write_event_to_stream(event)
            first = await child.result()
        second = await run_workflow(Hello(), name="other", flavour=flavour)
        return StopEvent(result=[first, second])


@pytest.mark.parametrize("inner", ["anyio", "asyncio"])
async def test_nested_runs(flavour, inner):
    result = await run_workflow(Parent(), start_event=StartEvent(flavour=inner), flavour=flavour)
    assert result == ["hello child", "hello other"]


class Vars(Workflow):
    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Note:
        await ctx.store.set("first", caller.get())
        return await ctx.wait_for_event(Note)

    @step
    async def second(self, ctx: Context, ev: Note) -> StopEvent:
        return StopEvent(result=[await ctx.store.get("first"), caller.get(), Context.get_step_context() is not None])


async def test_steps_see_the_context_variables_of_whoever_opened_the_run(flavour):
    caller.set("opener")
    async with open_run(Vars(), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        caller.set("sender")
        run.send_event(Note())
        assert await run.result() == ["opener", "opener", True]


async def test_a_run_is_driven_once(flavour):
    run = make_run(Hello(), start_kwargs={"name": "x"})
    await run.drive()
    with pytest.raises(RuntimeError, match="already driven"):
        await run.drive()


async def test_many_runs_at_once(flavour):
    workflow = Hello()
    results: dict[int, str] = {}

    async def one(n: int) -> None:
        results[n] = await run_workflow(workflow, name=n, flavour=flavour)

    async with anyio.create_task_group() as group:
        for n in range(50):
            group.start_soon(one, n)
    assert results == {n: f"hello {n}" for n in range(50)}


async def test_a_step_added_to_the_class_later(flavour):
    class Growing(Workflow):
        @step
        async def start(self, ev: StartEvent) -> Item:
            return Item(n=5)

    @step(workflow=Growing)
    async def finish(ev: Item) -> StopEvent:
        return StopEvent(result=ev.n)

    assert await run_workflow(Growing(), flavour=flavour) == 5


async def test_statistics_and_running_steps(flavour):
    async with open_run(Waiting(), flavour=flavour, run_id="mine") as run:
        await anyio.wait_all_tasks_blocked()
        assert run.running_steps() == ["wait"]
        statistics = run.statistics()
        assert (statistics.run_id, statistics.is_done, statistics.is_idle) == ("mine", False, False)
        assert statistics.working_steps == 1
        assert statistics.timers == 1  # the workflow's timeout
