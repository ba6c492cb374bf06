"""A remote workflow is run as any workflow is."""

from __future__ import annotations

import gc
import json
import sys
from datetime import date
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest
from pydantic import BaseModel
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.client import Client, TaskEvent
from llama_corral.exceptions import BadInput, Conflict, FlavourError, NotFound, TaskFailed
from llama_corral.remote import RemoteEvent, RemoteHandler, RemoteWorkflow
from llama_corral.remote import call as remote_call
from llama_corral.remote.events import EventTypes
from llama_corral.runtime import StructuredRuntime, open_run, run_workflow

from .flows import Approval, Awaits, Calls, Progress, Question, Report

pytestmark = pytest.mark.anyio


class Does(Workflow):
    """A step that does what a test wants."""

    def __init__(self, act: Any) -> None:
        super().__init__(timeout=None)
        self.act = act

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await self.act(ctx))


@pytest.mark.parametrize("way", ["url", "factory", "client"])
async def test_a_step_awaits_it(url: str, client: Client, flavour: Any, way: str) -> None:
    reached: Any = {"url": url, "factory": lambda: Client(url), "client": client}[way]
    remote = RemoteWorkflow("echo", reached)
    assert await run_workflow(Awaits(remote), value={"a": [1, 2]}, flavour=flavour) == {"a": [1, 2]}


async def test_its_events_pass_through(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("echo", url, events=[Progress])
    async with open_run(Calls(remote), count=3, value="done", flavour=flavour) as run:
        events = [event async for event in run.events()]
        assert await run.result() == "done"
    assert [event.n for event in events[:-1]] == [0, 1, 2]
    assert type(events[-1]) is StopEvent


async def test_without_a_step_it_is_run_as_any_other(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("echo", url, events=[Progress])
    assert isinstance(remote, Workflow)
    assert not remote.validate()
    assert await run_workflow(remote, value=1, flavour=flavour) == 1
    async with open_run(remote, start_event=StartEvent(count=2, value=2), flavour=flavour) as run:
        assert [type(event) async for event in run.events()] == [Progress, Progress, StopEvent]
        assert await run.result() == 2


async def test_outside_events_of_its_own_run_are_handed_on(url: str, flavour: Any, caplog: Any) -> None:
    async with open_run(RemoteWorkflow("asks", url), questions=2, flavour=flavour) as run:
        run.send_event(HumanResponseEvent(response="early"))
        run.send_event(Approval(by="nobody"))  # it knows no such event
        async for event in run.events():
            if isinstance(event, RemoteEvent) and event.fields.get("number") == 1:
                run.send_event(HumanResponseEvent(response="late"))
        assert await run.result() == ["early", "late"]
    assert "an outside Approval was not taken" in caplog.text


async def test_plain_run_on_asyncio(url: str, anyio_backend: str) -> None:
    remote = RemoteWorkflow("asks", url, events=[Question])
    if anyio_backend == "trio":
        with pytest.raises(FlavourError, match="is for async steps") as caught:
            remote.run()
        assert "run_workflow" in (caught.value.hint or "")
        return
    handler = remote.run()
    async for event in handler.stream_events():
        if isinstance(event, Question):
            await handler.send_event(HumanResponseEvent(response="so"))
    assert await handler == ["so"]
    assert remote._calls_upstream == {}
    async with StructuredRuntime() as runtime, Client(url) as client:
        remote = RemoteWorkflow("echo", client)
        remote._switch_runtime(runtime)
        assert await remote.run(value=7, run_id="seven" + url) == 7
        assert await remote.run(value=7, run_id="seven" + url) == 7
        with pytest.raises(Conflict):
            await remote.run(value=8, run_id="seven" + url)
    assert remote._calls_upstream == {}


async def test_a_sync_step_goes_through_the_loop(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("echo", url)

    class Blocks(Workflow):
        @step
        def work(self, ev: StartEvent) -> StopEvent:
            with pytest.raises(FlavourError, match="async steps"):
                remote.run()
            return StopEvent(result=anyio.from_thread.run(partial(run_workflow, remote, value=3)))

    assert await run_workflow(Blocks(), flavour=flavour) == 3


async def test_several_at_a_time(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("asks", url, events=[Question])

    async def act(ctx: Context) -> Any:
        handlers = [remote.run() for _ in range(3)]
        with pytest.raises(BadInput, match="3 remote runs are open") as caught:
            await remote.send_event(HumanResponseEvent(response="whose?"))
        assert handlers[2].run_id in (caught.value.hint or "")
        for number, handler in enumerate(handlers):
            await remote.send_event(HumanResponseEvent(response=str(number)), run_id=handler.run_id)
        results = [await handler for handler in handlers]
        with pytest.raises(Conflict, match="has ended"):
            await remote.send_event(HumanResponseEvent(response="too late"))
        return results

    assert await run_workflow(Does(act), flavour=flavour) == [["0"], ["1"], ["2"]]


async def test_the_handler_is_upstreams(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("asks", url, events=[Question])

    async def act(ctx: Context) -> Any:
        handler = remote.run(questions=1)
        assert isinstance(handler, RemoteHandler)
        assert not handler.is_done()
        assert handler.get_stop_event() is None
        events = handler.stream_events()
        assert isinstance(await anext(events), Question)
        with pytest.raises(BadInput, match=r"does not know an event"):
            await handler.send_event(Approval(by="nobody"))
        with pytest.raises(BadInput, match="not to a step"):
            await handler.send_event(HumanResponseEvent(response="so"), step="take")
        await handler.send_event(RemoteEvent(name="HumanResponseEvent", fields={"response": "so"}))
        result = await handler
        assert [event async for event in events] == []
        assert handler.is_done()
        assert handler.exception() is None
        assert not handler.cancelled()
        stop = handler.get_stop_event()
        assert stop is not None
        assert stop.result == result
        with pytest.raises(Conflict):
            await handler.send_event(HumanResponseEvent(response="late"))
        assert handler.run_id in str(handler)
        return result

    assert await run_workflow(Does(act), flavour=flavour) == ["so"]


async def test_an_event_of_a_class_of_its_own_is_sent(url: str, flavour: Any) -> None:
    async def act(ctx: Context) -> Any:
        handler = RemoteWorkflow("approval", url).run()
        await handler.send_event(Approval(by="Ada"))
        return await handler

    assert await run_workflow(Does(act), flavour=flavour) == "Ada"


# How it ends


async def test_what_it_raised_is_raised(url: str, client: Client, flavour: Any) -> None:
    async def act(ctx: Context) -> Any:
        handler = RemoteWorkflow("fails", url, events=[Progress]).run()
        assert [type(event) async for event in handler.stream_events()] == [Progress]
        with pytest.raises(TaskFailed, match="in step explode: ValueError: no such llama") as caught:
            await handler
        assert isinstance(handler.exception(), TaskFailed)
        assert handler.get_stop_event() is None
        record = caught.value.fields["error"]
        assert (record.type, record.message, record.step) == ("ValueError", "no such llama", "explode")
        return caught.value.fields["task_id"]

    task_id = await run_workflow(Does(act), flavour=flavour)
    assert (await client.task(task_id).status()).status == "failed"
    with pytest.raises(TaskFailed):
        await run_workflow(Awaits(RemoteWorkflow("fails", url)), flavour=flavour)


async def test_what_the_client_raises_is_raised(url: str, flavour: Any) -> None:
    with pytest.raises(NotFound, match="no service 'nobody'"):
        await run_workflow(Awaits(RemoteWorkflow("nobody", url)), flavour=flavour)
    with pytest.raises(NotFound, match="session"):
        await run_workflow(Awaits(RemoteWorkflow("echo", url, session_id="nowhere")), flavour=flavour)
    with pytest.raises(BadInput, match="URL"):
        RemoteWorkflow("echo", "nonsense")
    with pytest.raises(BadInput, match="no JSON form"):
        await run_workflow(Awaits(RemoteWorkflow("echo", url)), value=object(), flavour=flavour)


async def test_a_context_stays_where_it_is(url: str, flavour: Any) -> None:
    async def act(ctx: Context) -> Any:
        with pytest.raises(BadInput, match="takes no Context") as caught:
            RemoteWorkflow("echo", url).run(ctx=ctx)
        return caught.value.hint

    assert "in_session" in await run_workflow(Does(act), flavour=flavour)


async def test_runs_of_a_session_share_their_context(url: str, client: Client, flavour: Any) -> None:
    session = await client.sessions.create()
    remote = RemoteWorkflow("counts", client)

    async def act(ctx: Context) -> Any:
        mine = remote.in_session(session.id)
        return [await mine.run(), await mine.run(), await remote.run()]

    assert await run_workflow(Does(act), flavour=flavour) == [1, 2, 1]
    assert len(await session.tasks()) == 2


# What comes off the wire


class Order(BaseModel):
    item: str
    day: date


async def test_results_of_a_type(url: str, flavour: Any) -> None:
    run = partial(run_workflow, flavour=flavour)
    value = {"item": "llama", "day": "2024-02-29"}
    assert await run(RemoteWorkflow("echo", url, result_type=Order), value=value) == Order.model_validate(value)
    with pytest.raises(BadInput, match=r"not what was asked for: day: "):
        await run(RemoteWorkflow("echo", url, result_type=Order), value={**value, "day": "never"})
    with pytest.raises(BadInput, match="not what was asked for: it: "):
        await run(RemoteWorkflow("echo", url, result_type=int), value=None)
    start = StartEvent(value=Order.model_validate(value))
    assert await run(RemoteWorkflow("echo", url), start_event=start) == value


async def test_a_stop_event_of_an_own_class_is_the_result(url: str, flavour: Any) -> None:
    expected = Report(topic="llamas", pages=3)
    for remote in (
        RemoteWorkflow("reports", url, events=[Report]),
        RemoteWorkflow("reports", url, result_type=Report),
    ):
        assert await run_workflow(Awaits(remote), topic="llamas", flavour=flavour) == expected
    plain = await run_workflow(Awaits(RemoteWorkflow("reports", url)), topic="llamas", flavour=flavour)
    assert plain == {"topic": "llamas", "pages": 3}


async def test_events_of_other_classes_come_by_their_name(url: str, flavour: Any) -> None:
    async with open_run(RemoteWorkflow("echo", url), count=1, flavour=flavour) as run:
        events = [event async for event in run.events()]
    assert events[0] == RemoteEvent(name="Progress", fields={"n": 0})


def typed(types: EventTypes, name: str, **fields: Any) -> Event:
    return types.event_of(TaskEvent(0, name, fields))


def test_classes_of_events(caplog: Any) -> None:
    types = EventTypes([Progress, Report])
    assert typed(types, "Progress", n=1, more="x") == Progress(n=1, more="x")
    assert typed(types, "far.away.Progress", n=1) == Progress(n=1)
    assert typed(types, "InputRequiredEvent", prefix="?") == InputRequiredEvent(prefix="?")
    assert typed(types, "WorkflowFailedEvent", step_name="x") == StopEvent()
    assert typed(types, "Report", topic="x", pages=1, result=2).result == 2
    for _ in range(2):
        assert typed(types, "Progress", n="many") == RemoteEvent(name="Progress", fields={"n": "many"})
    assert caplog.text.count("do not fit") == 1
    assert typed(types, "Report") == StopEvent()

    class Other:
        class Progress(Event):
            pass

    with pytest.raises(BadInput, match="two classes of events are called Progress"):
        EventTypes([Progress, Other.Progress])
    with pytest.raises(BadInput, match="not a class of events"):
        EventTypes([dict])  # type: ignore[list-item]


@pytest.mark.promise("P11")
def test_no_name_from_the_wire_is_imported() -> None:
    from workflows.events import StepFailedEvent

    assert "sndhdr_of_nobody" not in sys.modules
    types = EventTypes([StepFailedEvent])
    inner = {"__is_pydantic": True, "qualified_name": "wave.Wave_read", "value": {}}
    sys.modules.pop("wave", None)
    found = typed(
        types,
        "StepFailedEvent",
        step_name="x",
        input_event=inner,
        exception={"exception_type": "wave.Error", "exception_message": "x"},
        attempts=1,
        elapsed_seconds=1.0,
        failed_at="2024-01-01T00:00:00Z",
    )
    assert isinstance(found, RemoteEvent)
    typed(types, "WorkflowFailedEvent", step_name="x", exception={"exception_type": "wave.Error"})
    assert "wave" not in sys.modules
    assert json.dumps(found.fields["input_event"]) == json.dumps(inner)


@pytest.mark.promise("P12")
async def test_no_more_is_read_than_is_taken(url: str, flavour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_call, "BEHIND", 10)

    async def act(ctx: Context) -> Any:
        handler: Any = RemoteWorkflow("echo", url, events=[Progress]).run(count=300, value="done")
        reader = handler.stream_events()
        seen = []
        for _ in range(100):
            seen.append((await anext(reader)).n)
            assert handler._call.published - reader.taken <= 10
        with anyio.move_on_after(0.05):  # time enough to read on
            await handler._run.wait_closed()
        assert handler._call.published <= 110
        assert await handler == "done"  # for the result nobody waits for a reader
        return seen + [event.n async for event in reader]

    assert await run_workflow(Does(act), flavour=flavour) == list(range(300))


@pytest.mark.promise("P12")
async def test_nothing_is_kept_of_calls_that_have_ended(url: str, flavour: Any) -> None:
    remote = RemoteWorkflow("echo", url)
    for _ in range(5):
        assert await run_workflow(Calls(remote), value=1, flavour=flavour) == 1
        assert await run_workflow(remote, value=1, flavour=flavour) == 1
    gc.collect()
    assert len(remote._calls) == len(remote._callers) == len(remote._calls_upstream) == 0
