"""Resources: made once, shared by runs, and never a deadlock."""

from __future__ import annotations

from typing import Annotated

import anyio
import anyio.lowlevel
import pytest
from workflows import Workflow, step
from workflows.events import Event, StartEvent, StopEvent
from workflows.resource import Resource

from llama_corral.runtime import run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

made: list[str] = []


@pytest.fixture(autouse=True)
def _fresh():
    made.clear()


async def connection() -> str:
    await anyio.lowlevel.checkpoint()
    made.append("connection")
    await anyio.lowlevel.checkpoint()
    return "connection"


def settings() -> str:
    made.append("settings")
    return "settings"


async def session(using: Annotated[str, Resource(connection)]) -> list[str]:
    await anyio.lowlevel.checkpoint()
    made.append("session")
    return [using]


class Uses(Workflow):
    @step
    async def use(
        self,
        ev: StartEvent,
        db: Annotated[str, Resource(connection)],
        conf: Annotated[str, Resource(settings)],
        own: Annotated[list[str], Resource(session, cache=False)],
    ) -> StopEvent:
        own.append(conf)
        return StopEvent(result=[db, own])


async def test_cached_and_uncached(flavour):
    workflow = Uses()
    for _ in range(2):
        assert await run_workflow(workflow, flavour=flavour) == ["connection", ["connection", "settings"]]
    assert sorted(made) == ["connection", "session", "session", "settings"]


async def test_concurrent_runs_share_an_async_resource(flavour):
    workflow = Uses()
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(lambda: run_workflow(workflow, flavour=flavour))
    assert made.count("connection") == 1
    assert made.count("session") == 8


class InThread(Workflow):
    @step
    def use(self, ev: StartEvent, db: Annotated[str, Resource(connection)]) -> StopEvent:
        return StopEvent(result=db)


async def test_a_sync_step_gets_an_async_resource(flavour):
    assert await run_workflow(InThread(), flavour=flavour) == "connection"


async def broken() -> str:
    await anyio.lowlevel.checkpoint()
    raise ConnectionError("no database")


class Broken(Workflow):
    @step
    async def use(self, ev: StartEvent, db: Annotated[str, Resource(broken)]) -> StopEvent:
        return StopEvent(result=db)


async def test_a_resource_that_fails_fails_its_step_and_nothing_else(flavour):
    workflow = Broken()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="no database"):
            await run_workflow(workflow, flavour=flavour)


async def stuck() -> str:
    await anyio.sleep_forever()
    return ""


class Stuck(Workflow):
    @step
    async def use(self, ev: StartEvent, db: Annotated[str, Resource(stuck)]) -> StopEvent:
        return StopEvent(result=db)


@pytest.mark.promise("P6")
async def test_runs_that_wait_for_a_resource_can_be_cancelled(flavour):
    workflow = Stuck()
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: run_workflow(workflow, flavour=flavour))
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()


async def egg(hen: Annotated[str, Resource(lambda: "")]) -> str:
    await anyio.lowlevel.checkpoint()
    return "egg"


async def hen(egg: Annotated[str, Resource(egg)]) -> str:
    await anyio.lowlevel.checkpoint()
    return "hen"


egg.__annotations__["hen"] = Annotated[str, Resource(hen)]


class FromHen(Event):
    pass


class FromEgg(Event):
    pass


class Circle(Workflow):
    @step
    async def start(self, ev: StartEvent) -> FromHen | FromEgg:
        return FromHen() if ev.get("end") == "hen" else FromEgg()

    @step
    async def with_hen(self, ev: FromHen, hen: Annotated[str, Resource(hen)]) -> StopEvent:
        return StopEvent()

    @step
    async def with_egg(self, ev: FromEgg, egg: Annotated[str, Resource(egg)]) -> StopEvent:
        return StopEvent()


@pytest.mark.promise("P9")
async def test_a_circle_is_an_error_from_either_end_and_never_a_deadlock(flavour):
    workflow = Circle()
    errors = []

    async def one(end):
        with pytest.raises(ValueError, match="Circular") as caught:
            await run_workflow(workflow, end=end, flavour=flavour)
        errors.append(str(caught.value))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for end in ("hen", "egg", "hen", "egg"):
                group.start_soon(one, end)
    assert len(errors) == 4
    assert all("egg" in error and "hen" in error for error in errors)
