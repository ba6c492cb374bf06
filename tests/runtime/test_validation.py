"""What upstream refuses is refused before anything runs, with upstream's own words, and what it lets pass runs.

Upstream refuses three times: where a step is decorated, where a workflow is made, and where it is run. Only the last
is the runtime's.
"""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version
from typing import Annotated

import anyio.to_thread
import pytest
from pydantic import BaseModel
from workflows import Workflow, catch_error, step
from workflows.errors import WorkflowRuntimeError, WorkflowValidationError
from workflows.events import Event, HumanResponseEvent, StartEvent, StepFailedEvent, StopEvent
from workflows.resource import ResourceConfig

from llama_corral.runtime import make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P9")]


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Begin(StartEvent):
    n: int


class Config(BaseModel):
    size: int


class Counts(Workflow):
    """No step of a refused workflow is ever called."""

    calls = 0

    def count(self):
        type(self).calls += 1
        return StopEvent()


class Unreachable(Counts):
    @step
    async def start(self, ev: StartEvent) -> StopEvent:
        return self.count()

    @step
    async def apart(self, ev: Item) -> Item | StopEvent:
        return Item()


class NeverConsumed(Counts):
    @step
    async def start(self, ev: StartEvent) -> Item | StopEvent:
        return self.count()


class NeverProduced(Counts):
    @step
    async def start(self, ev: StartEvent) -> StopEvent:
        return self.count()

    @step
    async def wait(self, ev: Item) -> StopEvent:
        return StopEvent()


class DeadEnd(Counts):
    @step
    async def start(self, ev: StartEvent) -> Item | StopEvent:
        return self.count()

    @step
    async def circle(self, ev: Item) -> Done:
        return Done()

    @step
    async def back(self, ev: Done) -> Item:
        return Item()


class TakesStop(Counts):
    @step
    async def start(self, ev: StartEvent) -> StopEvent:
        return self.count()

    @step
    async def after(self, ev: StopEvent) -> StopEvent:
        return StopEvent()


class JoinsNothing(Counts):
    @step
    async def start(self, ev: StartEvent) -> Item | StopEvent:
        return self.count()

    @step
    async def join(self, items: list[Item]) -> StopEvent:
        return StopEvent()


class JoinsLevels(Counts):
    @step
    async def start(self, ev: StartEvent) -> list[Item]:
        self.count()
        return [Item()]

    @step
    async def other(self, ev: StartEvent) -> Done:
        return Done()

    @step
    async def join(self, item: Item, done: Done) -> StopEvent:
        return StopEvent()


class Handled(Counts):
    @step
    async def start(self, ev: StartEvent) -> StopEvent:
        return self.count()

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


class TwoWildcards(Handled):
    @catch_error
    async def handle_too(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


class HandlesNothing(Handled):
    @catch_error(for_steps=["nowhere"])
    async def handle_too(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


class HandlesHandlers(Handled):
    @catch_error(for_steps=["handle"])
    async def handle_too(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


class ClaimedTwice(Counts):
    @step
    async def start(self, ev: StartEvent) -> StopEvent:
        return self.count()

    @catch_error(for_steps=["start"])
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()

    @catch_error(for_steps=["start"])
    async def handle_too(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


class NoConfig(Counts):
    @step
    async def start(self, ev: StartEvent, config: Annotated[Config, ResourceConfig("nowhere.json")]) -> StopEvent:
        return self.count()


class NeedsStart(Counts):
    @step
    async def start(self, ev: Begin) -> StopEvent:
        return self.count()


REFUSED = {
    "unreachable": (Unreachable, {}, WorkflowValidationError, "Unreachable steps: apart"),
    "never-consumed": (NeverConsumed, {}, WorkflowValidationError, "produced but never consumed: Item"),
    "never-produced": (NeverProduced, {}, WorkflowValidationError, "consumed but never produced: Item"),
    "dead-end": (DeadEnd, {}, WorkflowValidationError, "Dead-end steps: back, circle"),
    "stop": (TakesStop, {}, WorkflowValidationError, "cannot accept StopEvent"),
    "join": (JoinsNothing, {}, WorkflowValidationError, "no returned-list producer"),
    "levels": (JoinsLevels, {}, WorkflowValidationError, "common stream level"),
    "wildcards": (TwoWildcards, {}, WorkflowValidationError, "Only one wildcard"),
    "unknown": (HandlesNothing, {}, WorkflowValidationError, "unknown step 'nowhere'"),
    "handler": (HandlesHandlers, {}, WorkflowValidationError, "cannot cover another handler"),
    "claimed": (ClaimedTwice, {}, WorkflowValidationError, "claimed by two"),
    "config": (NoConfig, {}, WorkflowValidationError, "nowhere.json"),
    "no-field": (NeedsStart, {}, WorkflowRuntimeError, "Begin"),
    "bad-field": (NeedsStart, {"n": "many"}, WorkflowRuntimeError, "Begin"),
    "no-start-event": (NeedsStart, {"start_event": Item()}, ValueError, "instance of 'StartEvent'"),
}


def upstream_refuses(make, start):
    async def run():
        await make().run(**start)

    with pytest.raises(Exception) as refused:
        asyncio.run(run())
    return refused.value


@pytest.mark.parametrize("why", REFUSED)
async def test_refused_before_anything_runs_with_upstreams_words(flavour, why):
    make, start, error, words = REFUSED[why]
    make.calls = 0
    theirs = await anyio.to_thread.run_sync(upstream_refuses, make, start)
    with pytest.raises(error, match=words) as by_run_workflow:
        await run_workflow(make(), flavour=flavour, **start)
    with pytest.raises(error) as by_open_run:
        async with open_run(make(), flavour=flavour, **start):
            pytest.fail("unreachable")
    arguments = {"start_event": start["start_event"]} if "start_event" in start else {"start_kwargs": start}
    with pytest.raises(error) as by_make_run:
        make_run(make(), **arguments)
    assert {str(refused.value) for refused in (by_run_workflow, by_open_run, by_make_run)} == {str(theirs)}
    assert make.calls == 0


async def test_a_refused_workflow_is_refused_again(flavour):
    workflow = Unreachable()
    for _ in range(2):
        with pytest.raises(WorkflowValidationError):
            await run_workflow(workflow, flavour=flavour)


@pytest.mark.parametrize("make", [Unreachable, NeverConsumed, NeverProduced, DeadEnd])
async def test_a_workflow_without_validation_runs(flavour, make):
    make.calls = 0
    await run_workflow(make(disable_validation=True), flavour=flavour)
    assert make.calls == 1


@pytest.mark.skipif(version("llama-index-workflows") == "2.26.0", reason="upstream looks at it from 2.26.1 on")
@pytest.mark.parametrize("make", [TwoWildcards, HandlesNothing, ClaimedTwice])
async def test_who_handles_an_error_must_be_clear_without_validation_too(flavour, make):
    with pytest.raises(WorkflowValidationError):
        await run_workflow(make(disable_validation=True), flavour=flavour)


class SkipsInSteps(Counts):
    @step
    async def start(self, ev: StartEvent) -> Item | StopEvent:
        return self.count()

    @step(skip_graph_checks=["dead_end"])
    async def circle(self, ev: Item) -> Done:
        return Done()

    @step(skip_graph_checks=["dead_end"])
    async def back(self, ev: Done) -> Item:
        return Item()


async def test_single_checks_can_be_skipped(flavour):
    SkipsInSteps.calls = DeadEnd.calls = 0
    await run_workflow(SkipsInSteps(), flavour=flavour)
    await run_workflow(DeadEnd(skip_graph_checks={"dead_end"}), flavour=flavour)
    assert (SkipsInSteps.calls, DeadEnd.calls) == (1, 1)
    with pytest.raises(WorkflowValidationError, match="Unknown graph check"):
        DeadEnd(skip_graph_checks={"spelling"})


async def test_a_step_that_is_added_later_is_looked_at(flavour):
    class Grows(Counts):
        @step
        async def start(self, ev: StartEvent) -> StopEvent:
            return self.count()

    workflow = Grows()
    await run_workflow(workflow, flavour=flavour)

    @step(workflow=Grows)
    async def stray(ev: Item) -> StopEvent:
        return StopEvent()

    with pytest.raises(WorkflowValidationError, match="never produced"):
        await run_workflow(workflow, flavour=flavour)


async def test_fields_beside_a_start_event_are_ignored_with_a_warning(flavour, caplog):
    NeedsStart.calls = 0
    await run_workflow(NeedsStart(), start_event=Begin(n=1), flavour=flavour, n=2)
    assert NeedsStart.calls == 1
    assert "ignored: {'n': 2}" in caplog.text


def configured(path):
    class Configured(Workflow):
        @step
        async def start(self, ev: StartEvent, config: Annotated[Config, ResourceConfig(path)]) -> Item:
            return Item(n=config.size)

        @step
        def finish(
            self, ev: Item, config: Annotated[Config, ResourceConfig(path, path_selector="deep.er")]
        ) -> StopEvent:
            return StopEvent(result=(ev.n, config.size))

    return Configured()


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        ({"size": 3, "deep": {"er": {"size": 4}}}, (3, 4)),
        ({"size": "big", "deep": {"er": {"size": 4}}}, "validation error"),
        ({"size": 3, "deep": {}}, "deep.er"),
    ],
)
async def test_configuration_from_files(flavour, content, outcome, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    if isinstance(outcome, str):
        with pytest.raises(WorkflowValidationError, match=outcome):
            await run_workflow(configured(str(path)), flavour=flavour)
    else:
        assert await run_workflow(configured(str(path)), flavour=flavour) == outcome


class HumanOnly(Workflow):
    """Asks nobody, but may be told: `validate()` says that people are part of it."""

    @step
    async def start(self, ev: StartEvent) -> None:
        return None

    @step
    async def told(self, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result=ev.response)


async def test_a_step_for_people_alone_is_reachable(flavour):
    workflow = HumanOnly()
    assert workflow.validate() is True
    async with open_run(workflow, flavour=flavour) as run:
        run.send_event(HumanResponseEvent(response="hello"))
        assert await run.result() == "hello"
