"""The contract with upstream: what the reducer makes of recorded ticks of list fan-outs, collect steps and collected events.

By hand, as in `test_upstream_ticks.py`.
"""

from __future__ import annotations

from typing import Annotated

from workflows import Workflow, step
from workflows.collect import Collect, Take
from workflows.events import StartEvent, StopEvent
from workflows.runtime.types.results import AddCollectedEvent, DeleteCollectedEvent

from llama_corral.runtime import upstream as up

from .recorded import Done, Item, Recorded, failed, fanned_out, kinds, returned

# Fan-out and collect steps


class Fans(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return []

    @step(num_workers=2)
    async def work(self, ev: Item) -> Done | None:
        return Done()

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent()


def batch(recorded):
    """What the collect step that was started last is given."""
    return [event.n for event in recorded.call_of(recorded.started[-1]).shared_state.collection_release_payload.events]


def test_a_batch_is_complete_when_its_stream_has_ended(kept):
    fans = Recorded(Fans(), kept).begin()
    assert kinds(fans.ended(*fanned_out(Item(n=0), Item(n=1)))) == ["StepStateChanged", "QueueEvent", "QueueEvent"]
    streams = [command.scope_path for command in fans.queued]
    assert streams[0] == streams[1]
    assert len(streams[0]) == 1
    for _ in range(2):
        assert kinds(fans.deliver()) == ["RunWorker", "StepStateChanged"]
    assert [command.id for command in fans.started[1:]] == [0, 1]

    assert kinds(fans.ended(returned(Done(n=1)), of=2)) == ["StepStateChanged", "QueueEvent"]
    assert fans.queued[0].scope_path == streams[0]
    assert kinds(fans.deliver()) == []
    assert kinds(fans.ended(returned(Done(n=0)), of=1)) == ["StepStateChanged", "QueueEvent"]
    assert kinds(fans.deliver()) == ["RunWorker", "StepStateChanged"]
    assert str(fans.started[-1].step_id) == "join"
    assert batch(fans) == [1, 0]  # as they came
    assert kinds(fans.ended(returned(StopEvent()))) == ["StepStateChanged", "StopEvent", "CompleteRun"]


def test_an_empty_list_is_an_empty_batch(kept):
    fans = Recorded(Fans(), kept).begin()
    assert kinds(fans.ended(*fanned_out())) == ["StepStateChanged", "RunWorker", "StepStateChanged"]
    assert batch(fans) == []


def test_who_returns_nothing_leaves_the_batch(kept):
    fans = Recorded(Fans(), kept).begin()
    fans.ended(*fanned_out(Item(n=0), Item(n=1)))
    fans.deliver()
    fans.deliver()
    fans.ended(returned(Done(n=0)), of=1)
    assert kinds(fans.deliver()) == []
    assert kinds(fans.ended(returned(), of=2)) == ["StepStateChanged", "RunWorker", "StepStateChanged"]
    assert batch(fans) == [0]


def test_who_tries_again_stays_in_the_batch(kept):
    fans = Recorded(Fans(), kept).begin()
    fans.ended(*fanned_out(Item(n=0)))
    fans.deliver()
    assert kinds(fans.ended(failed(ConnectionError(), again_after=5.0))) == ["StepStateChanged", "ScheduleWakeup"]
    assert kinds(fans(up.TickWakeup(due=7.0), now=7.0)) == ["RunWorker", "StepStateChanged"]
    fans.ended(returned(Done(n=3)))
    assert kinds(fans.deliver()) == ["RunWorker", "StepStateChanged"]
    assert batch(fans) == [3]


def test_what_a_step_sends_is_in_no_batch(kept):
    fans = Recorded(Fans(), kept).begin()
    fans.ended(*fanned_out(Item(n=0)))
    assert kinds(fans(up.TickAddEvent(event=Done(n=9)))) == []
    targeted = fans(up.TickAddEvent(event=Done(n=9), step_id=up.StepId.root("join")))
    assert kinds(targeted) == ["WorkflowFailedEvent", "FailWorkflow"]


class FirstOne(Fans):
    @step
    async def join(self, done: Annotated[list[Done], Collect(Take(1))]) -> StopEvent:
        return StopEvent()


def test_the_first_one_is_enough(kept):
    fans = Recorded(FirstOne(), kept).begin()
    fans.ended(*fanned_out(Item(n=0), Item(n=1)))
    fans.deliver()
    fans.deliver()
    fans.ended(returned(Done(n=1)), of=2)
    assert kinds(fans.deliver()) == ["RunWorker", "StepStateChanged"]
    assert batch(fans) == [1]
    fans.ended(returned(Done(n=0)), of=1)
    assert kinds(fans.deliver()) == []
    assert [str(command.step_id) for command in fans.started] == ["split", "work", "work", "join"]


def test_a_batch_is_collected_across_a_resume(kept):
    fans = Recorded(Fans(), kept).begin()
    fans.ended(*fanned_out(Item(n=0), Item(n=1)))
    fans.deliver()
    fans.deliver()
    fans.ended(returned(Done(n=0)), of=1)
    fans.deliver()
    again = fans.resumed()
    assert kinds(again(up.TickSessionStart(), now=50.0)) == ["RunWorker", "StepStateChanged"]
    assert again.started[0].event == Item(n=1)
    again.ended(returned(Done(n=1)), now=51.0)
    assert kinds(again.deliver(now=51.0)) == ["RunWorker", "StepStateChanged"]
    assert batch(again) == [0, 1]


# ctx.collect_events


class Gathers(Workflow):
    @step
    async def first(self, ev: StartEvent) -> Item:
        return Item()

    @step(num_workers=2)
    async def gather(self, ev: Item) -> StopEvent | None:
        return None


def test_a_call_that_missed_what_another_collected_runs_again(kept):
    gathers = Recorded(Gathers(), kept).begin()
    gathers(up.TickAddEvent(event=Item(n=0)))
    gathers(up.TickAddEvent(event=Item(n=1)))
    add = [AddCollectedEvent(event_id="buffer", event=Item(n=n)) for n in (0, 1)]
    assert kinds(gathers.ended(add[0], returned(), of=1)) == ["StepStateChanged"]
    before = gathers.started[2]
    assert kinds(gathers.ended(add[1], returned(), of=2)) == ["RunWorker"]
    again = gathers.started[-1]
    assert (again.id, again.event) == (before.id, before.event)
    assert again.invocation_id != before.invocation_id
    assert gathers.call_of(again).shared_state.collected_events == {"buffer": [Item(n=0)]}
    commands = gathers.ended(returned(StopEvent()), DeleteCollectedEvent(event_id="buffer"))
    assert kinds(commands) == ["StepStateChanged", "StopEvent", "CompleteRun"]


def test_one_result_runs_a_call_again_once(kept):
    gathers = Recorded(Gathers(), kept).begin()
    gathers(up.TickAddEvent(event=Item(n=0)))
    gathers(up.TickAddEvent(event=Item(n=1)))

    def added(n, *buffers):
        return [AddCollectedEvent(event_id=name, event=Item(n=n)) for name in buffers]

    gathers.ended(*added(0, "a", "b"), returned(), of=1)
    assert kinds(gathers.ended(*added(1, "a", "b", "b"), returned(), of=2)) == ["RunWorker"]
