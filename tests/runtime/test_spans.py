"""Instrumentation: span and event handlers see of a run what they see of upstream's."""

from __future__ import annotations

import contextlib
import re

import anyio
import anyio.lowlevel
import pytest
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import active_instrument_tags, instrument_tags
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import BaseSpan, active_span_id
from llama_index_instrumentation.span_handlers import BaseSpanHandler
from pydantic import PrivateAttr
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

dispatcher = get_dispatcher("test_spans")


class Spans(BaseSpanHandler[BaseSpan]):
    """Notes what happens, with ids made comparable: a name for each id, in the order in which they come up."""

    _names: dict[str, str] = PrivateAttr(default_factory=dict)
    _log: list = PrivateAttr(default_factory=list)

    def name(self, id_):
        if id_ is None:
            return None
        base = re.sub(r"-[0-9a-f-]{36}$", "", id_)
        assert base != id_, id_
        return self._names.setdefault(id_, f"{base}#{sum(n.startswith(base) for n in self._names.values())}")

    def new_span(self, id_, bound_args, instance=None, parent_span_id=None, tags=None, **kwargs):
        shown = {k: v for k, v in (tags or {}).items() if k != "llamaindex.run_id"}
        arguments = {k: type(v).__name__ for k, v in bound_args.arguments.items()}
        self._log.append(
            ("enter", self.name(id_), self.name(parent_span_id), arguments, type(instance).__name__, shown)
        )
        return BaseSpan(id_=id_, parent_id=parent_span_id)

    def prepare_to_exit_span(self, id_, bound_args, instance=None, result=None, **kwargs):
        self._log.append(("exit", self.name(id_), type(result).__name__))
        return self.open_spans[id_]

    def prepare_to_drop_span(self, id_, bound_args, instance=None, err=None, **kwargs):
        self._log.append(("drop", self.name(id_), type(err).__name__))
        return self.open_spans[id_]

    def capture_propagation_context(self):
        return {"trace": "carried"}

    def restore_propagation_context(self, context):
        self._log.append(("restore", context.get("trace")))


class Events(BaseEventHandler):
    _spans: Spans = PrivateAttr()

    def __init__(self, spans):
        super().__init__()
        self._spans = spans

    def handle(self, event, **kwargs):
        text = {k: v for k, v in event.model_dump().items() if k in ("output", "reason", "err_str", "note")}
        tags = sorted(event.tags)
        self._spans._log.append(("event", event.class_name(), self._spans.name(event.span_id), text, tags))


@pytest.fixture
def watch():
    """Attach handlers to the root dispatcher for a test. Yields the log."""
    root = get_dispatcher()
    spans = Spans()
    events = Events(spans)
    root.add_span_handler(spans)
    root.add_event_handler(events)
    yield spans
    root.span_handlers.remove(spans)
    root.event_handlers.remove(events)


class Item(Event):
    n: int


class Chain(Workflow):
    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def second(self, ev: Item) -> StopEvent:
        await helper(2)
        return StopEvent(result="done")


@dispatcher.span
async def helper(x):
    await anyio.lowlevel.checkpoint()
    return x


class Threaded(Workflow):
    @step
    def first(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=threaded_helper(2))


@dispatcher.span
def threaded_helper(x):
    return x


class Waits(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
        return StopEvent(result="done")


class Retries(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(2)))
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")


class Decorated(Workflow):
    @step
    @dispatcher.span
    async def first(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result="done")


class Hangs(Workflow):
    @step
    async def hang(self, ev: StartEvent) -> StopEvent:
        await anyio.sleep_forever()
        return StopEvent()


class TimesOut(Hangs):
    def __init__(self):
        super().__init__(timeout=0.2)


async def settle(run_events, result, answer):
    with contextlib.suppress(Exception):
        async for event in run_events:
            if isinstance(event, InputRequiredEvent):
                answer(HumanResponseEvent(response="yes"))
        await result()


async def ours(make, flavour, then=None):
    async with open_run(make(), flavour=flavour, note="x") as run:
        if then is not None:
            await anyio.wait_all_tasks_blocked()
            then(run)
        await settle(run.events(), run.result, run.send_event)


@pytest.mark.parametrize("make", [Chain, Threaded, Waits, Retries, Decorated, TimesOut])
async def test_handlers_see_what_they_see_upstream(configuration, flavour, watch, make):
    if configuration != "asyncio":
        pytest.skip("upstream's own runtime needs asyncio")
    handler = make().run(note="x")
    await settle(handler.stream_events(), handler.stop_event_result, handler.ctx.send_event)
    theirs, watch._log, watch._names = watch._log, [], {}
    await ours(make, flavour)
    assert watch._log == theirs


@pytest.mark.parametrize("make", [Chain, Threaded, Waits, Retries, Decorated, TimesOut])
async def test_they_see_the_same_in_every_configuration(flavour, watch, make, anyio_backend):
    await ours(make, flavour)
    log = [entry[:2] for entry in watch._log if entry[0] != "restore"]
    assert log == EXPECTED[make]
    assert not watch.open_spans


EXPECTED = {
    Chain: [
        ("enter", "Chain.run#0"),
        ("enter", "Chain.first#0"),
        ("event", "step.output"),
        ("exit", "Chain.first#0"),
        ("enter", "Chain.second#0"),
        ("enter", "helper#0"),
        ("exit", "helper#0"),
        ("event", "step.output"),
        ("exit", "Chain.second#0"),
        ("event", "workflow.output"),
        ("exit", "Chain.run#0"),
    ],
    Threaded: [
        ("enter", "Threaded.run#0"),
        ("enter", "Threaded.first#0"),
        ("enter", "threaded_helper#0"),
        ("exit", "threaded_helper#0"),
        ("event", "step.output"),
        ("exit", "Threaded.first#0"),
        ("event", "workflow.output"),
        ("exit", "Threaded.run#0"),
    ],
    Waits: [
        ("enter", "Waits.run#0"),
        ("enter", "Waits.ask#0"),
        ("exit", "Waits.ask#0"),
        ("enter", "Waits.ask#1"),
        ("event", "step.output"),
        ("exit", "Waits.ask#1"),
        ("event", "workflow.output"),
        ("exit", "Waits.run#0"),
    ],
    Retries: [
        ("enter", "Retries.run#0"),
        ("enter", "Retries.fail#0"),
        ("event", "SpanDropEvent"),
        ("drop", "Retries.fail#0"),
        ("enter", "Retries.fail#1"),
        ("event", "SpanDropEvent"),
        ("drop", "Retries.fail#1"),
        ("event", "SpanDropEvent"),
        ("drop", "Retries.run#0"),
    ],
    Decorated: [
        ("enter", "Decorated.run#0"),
        ("enter", "Decorated.first#0"),
        ("exit", "Decorated.first#0"),
        ("event", "step.output"),
        ("event", "workflow.output"),
        ("exit", "Decorated.run#0"),
    ],
    TimesOut: [
        ("enter", "TimesOut.run#0"),
        ("enter", "Hangs.hang#0"),
        ("event", "SpanCancelledEvent"),
        ("exit", "Hangs.hang#0"),
        ("event", "SpanDropEvent"),
        ("drop", "TimesOut.run#0"),
    ],
}


@pytest.mark.parametrize("how", ["cancel", "leave", "scope"])
async def test_a_run_that_is_cancelled_leaves_no_open_span(flavour, watch, how):
    with anyio.CancelScope() as scope:
        async with open_run(Hangs(), flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            assert len(watch.open_spans) == 2
            if how == "cancel":
                run.cancel()
                with contextlib.suppress(Exception):
                    await run.result()
            elif how == "scope":
                scope.cancel()
                await anyio.lowlevel.checkpoint()
    assert not watch.open_spans
    endings = [entry[:2] for entry in watch._log if entry[0] in ("exit", "drop")]
    assert endings == [("exit", "Hangs.hang#0"), ("exit" if how == "cancel" else "drop", "Hangs.run#0")]


async def test_a_run_is_below_the_span_of_who_starts_it_and_leaves_no_trace(flavour, watch):
    seen = []

    class Looks(Workflow):
        @step
        async def look(self, ev: StartEvent) -> StopEvent:
            seen.append((active_span_id.get(), dict(active_instrument_tags.get())))
            return StopEvent()

    @dispatcher.span
    async def caller():
        before = active_span_id.get()
        with instrument_tags({"mine": 1}):
            await run_workflow(Looks(), flavour=flavour, run_id="abc", note="x")
            assert active_instrument_tags.get() == {"mine": 1}
        assert active_span_id.get() == before

    await caller()
    enters = {entry[1].partition("#")[0].rpartition(".")[2]: entry for entry in watch._log if entry[0] == "enter"}
    assert enters["run"][2] == enters["caller"][1]
    assert enters["look"][2] == enters["run"][1]
    span_id, tags = seen[0]
    assert watch.name(span_id) == enters["look"][1]
    assert tags == {
        "mine": 1,
        "llamaindex.run_id": "abc",
        "llamaindex.step.input_event": "StartEvent",
        "llamaindex.step.input_summary": "StartEvent(note='x')",
    }


async def test_nobody_listens_and_nothing_is_made(flavour, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("made for nobody")

    monkeypatch.setattr("llama_corral.runtime.spans.summarize_event", never)
    monkeypatch.setattr("llama_corral.runtime.spans.RunSpan.__init__", never)
    assert await run_workflow(Chain(), flavour=flavour) == "done"


async def test_a_handler_attached_in_the_middle_sees_the_steps_that_follow(flavour):
    root = get_dispatcher()
    spans = Spans()

    class Attaches(Chain):
        @step
        async def first(self, ctx: Context, ev: StartEvent) -> Item:
            root.add_span_handler(spans)
            return Item(n=1)

    try:
        await run_workflow(Attaches(), flavour=flavour)
    finally:
        root.span_handlers.remove(spans)
    assert next(entry[:2] for entry in spans._log) == ("enter", "Chain.second#0")


async def test_a_handler_that_raises_breaks_no_run(flavour, watch):
    class Bad(Spans):
        def new_span(self, *args, **kwargs):
            raise LookupError("broken handler")

        capture_propagation_context = restore_propagation_context = prepare_to_exit_span = new_span

    root = get_dispatcher()
    bad = Bad()
    root.add_span_handler(bad)
    try:
        assert await run_workflow(Chain(), flavour=flavour) == "done"
    finally:
        root.span_handlers.remove(bad)
