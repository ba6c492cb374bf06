"""`ctx.store` as upstream documents it: paths, types, edits, clearing; and from outside. (From threads: test_sync_steps.)"""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from pydantic import BaseModel, Field
from workflows import Context, Workflow, step
from workflows.context.state_store import DictState
from workflows.errors import ContextSerdeError, WorkflowRuntimeError
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

from llama_corral.runtime import new_context, open_run, run_workflow

from .compare import Case, check

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int = 0


class Profile(BaseModel):
    name: str = "nobody"
    tags: list[str] = Field(default_factory=list)


class State(BaseModel):
    count: int = 0
    profile: Profile = Field(default_factory=Profile)
    extra: dict[str, Any] = Field(default_factory=dict)


class MoreState(State):
    more: str = "default"


async def raised(awaitable):
    try:
        await awaitable
    except Exception as exc:
        return type(exc).__name__
    return None


class Paths(Workflow):
    @step
    async def paths(self, ctx: Context, ev: StartEvent) -> StopEvent:
        store = ctx.store
        await store.set("user.profile.name", "ada")
        await store.set("user.langs", ["en", "fr"])
        await store.set("user.langs.1", "de")
        return StopEvent(
            result=[
                await store.get("user"),
                await store.get("user.langs.0"),
                await store.get("user.profile.age", default=36),
                await store.get("nothing", default=None),
                await raised(store.get("user.profile.age")),
                await raised(store.get("user.langs.7")),
                await raised(store.set("", 1)),
            ]
        )


class TypedPaths(Workflow):
    @step
    async def paths(self, ctx: Context[State], ev: StartEvent) -> StopEvent:
        store = ctx.store
        await store.set("count", 2)
        await store.set("profile.name", "ada")
        await store.set("extra.deep.er", [1])
        async with store.edit_state() as state:
            state.count += 1
            state.profile.tags.append("pioneer")
        state = await store.get_state()
        state.count = 99  # a copy: nobody else sees it
        return StopEvent(
            result=[
                (await store.get_state()).model_dump(),
                await store.get("profile.tags.0"),
                type(await store.get("profile")).__name__,
                await raised(store.get("profile.age")),
            ]
        )


class Clears(Workflow):
    @step
    async def clear(self, ctx: Context[State], ev: StartEvent) -> StopEvent:
        await ctx.store.set("count", 5)
        await ctx.store.clear()
        return StopEvent(result=(await ctx.store.get_state()).model_dump())


class ClearsDict(Workflow):
    @step
    async def clear(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.store.set("count", 5)
        await ctx.store.clear()
        state = await ctx.store.get_state()
        return StopEvent(result=(type(state).__name__, len(state), await ctx.store.get("count", default=None)))


class Isolated(Workflow):
    """An edit is seen when its block is left, as a whole; a failed one never."""

    @step
    async def edit(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.store.set("list", [1])
        async with ctx.store.edit_state() as state:
            state["list"].append(2)
            inside = list(await ctx.store.get("list"))
        try:
            async with ctx.store.edit_state() as state:
                state["list"].append(3)
                raise LookupError
        except LookupError:
            pass
        return StopEvent(result=(inside, await ctx.store.get("list")))


class NestedWriters(Workflow):
    @step
    async def nest(self, ctx: Context, ev: StartEvent) -> StopEvent:
        store = ctx.store
        async with store.edit_state() as state:
            state["a"] = 1
            refused = [
                await raised(store.set("b", 2)),
                await raised(store.clear()),
                await raised(store.set_state(DictState())),
            ]
        return StopEvent(result=(refused, (await store.get_state()).to_dict()))


class Replaces(Workflow):
    """`set_state` takes the type, what is derived from it, or a parent whose fields are merged in."""

    @step
    async def replace(self, ctx: Context[MoreState], ev: StartEvent) -> StopEvent:
        await ctx.store.set_state(MoreState(count=1, more="mine"))
        await ctx.store.set_state(State(count=2))  # type: ignore[arg-type]
        merged = await ctx.store.get_state()
        return StopEvent(result=(merged.count, merged.more, await raised(ctx.store.set_state(Profile()))))  # type: ignore[arg-type]


class Derived(Workflow):
    """Steps may name a type and a type derived from it: the store is of the derived one."""

    @step
    async def first(self, ctx: Context[State], ev: StartEvent) -> Item:
        await ctx.store.set("count", 1)
        return Item()

    @step
    async def second(self, ctx: Context[MoreState], ev: Item) -> StopEvent:
        state = await ctx.store.get_state()
        return StopEvent(result=(type(state).__name__, state.count, state.more))


class Unrelated(Workflow):
    @step
    async def first(self, ctx: Context[State], ev: StartEvent) -> Item:
        return Item()

    @step
    async def second(self, ctx: Context[Profile], ev: Item) -> StopEvent:
        return StopEvent()


STATES = [
    Case(
        Paths,
        result=[
            {"profile": {"name": "ada"}, "langs": ["en", "de"]},
            "en",
            36,
            None,
            "ValueError",
            "ValueError",
            "ValueError",
        ],
    ),
    Case(
        TypedPaths,
        result=[
            {"count": 3, "profile": {"name": "ada", "tags": ["pioneer"]}, "extra": {"deep": {"er": [1]}}},
            "pioneer",
            "Profile",
            "ValueError",
        ],
    ),
    Case(Clears, result={"count": 0, "profile": {"name": "nobody", "tags": []}, "extra": {}}),
    Case(ClearsDict, result=("DictState", 0, None)),
    Case(Isolated, result=([1], [1, 2])),
    Case(NestedWriters, result=(["RuntimeError"] * 3, {"a": 1})),
    Case(Replaces, result=(2, "mine", "ValueError")),
    Case(Derived, result=("MoreState", 1, "default")),
]


@pytest.mark.parametrize("case", STATES, ids=str)
async def test_the_store_as_upstream(flavour, case):
    await check(case, flavour)


async def test_state_types_that_do_not_fit_together_are_refused_before_the_run(flavour):
    with pytest.raises(ValueError, match="Multiple state types"):
        await run_workflow(Unrelated(), flavour=flavour)


# From outside


class Waits(Workflow):
    @step
    async def wait(self, ctx: Context[State], ev: StartEvent) -> StopEvent:
        await ctx.store.set("count", 1)
        await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=(await ctx.store.get_state()).model_dump())


async def test_whoever_holds_the_run_reads_and_writes_its_store(flavour):
    async with open_run(Waits(), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        assert await run.context.store.get("count") == 1
        async with run.context.store.edit_state() as state:
            state.profile.name = "ada"
        run.send_event(HumanResponseEvent())
        assert (await run.result())["profile"]["name"] == "ada"
        assert await run.context.store.get("profile.name") == "ada"


async def test_a_context_may_leave_its_state_out(flavour):
    async with open_run(Waits(), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        assert run.context.to_dict()["state"]["state_type"] == "State"
        stored = json.loads(json.dumps(run.context.to_dict(include_state=False)))
        assert stored["state"] == {}
    workflow = Waits()
    async with open_run(workflow, context=Context.from_dict(workflow, stored), flavour=flavour) as again:
        again.send_event(HumanResponseEvent())
        assert (await again.result())["count"] == 1  # the step ran once more, on a fresh state
    assert new_context(workflow, stored).to_dict(include_state=False)["state"] == {}


class Own:
    """Of no type that JSON knows."""


class Unserializable(Workflow):
    @step
    async def keep(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.store.set("own", Own())
        return StopEvent(result=type(await ctx.store.get("own")).__name__)


async def test_state_that_cannot_be_stored_works_until_it_is_stored(flavour):
    async with open_run(Unserializable(), flavour=flavour) as run:
        assert await run.result() == "Own"
        with pytest.raises(ValueError, match="own"):
            run.context.to_dict()
        assert run.context.to_dict(include_state=False)["is_running"] is False


@pytest.mark.parametrize("damage", [{"version": 99}, {"workers": 3}, {"version": "x"}])
async def test_a_damaged_context_is_refused(flavour, damage):
    async with open_run(Waits(), flavour=flavour) as run:
        stored = run.context.to_dict()
    with pytest.raises(ContextSerdeError):
        Context.from_dict(Waits(), stored | damage)
    with pytest.raises(ContextSerdeError):
        new_context(Waits(), stored | damage)


async def test_state_that_lives_in_another_kind_of_store_is_refused(flavour):
    workflow = Waits()
    stored = Context(workflow).to_dict() | {"state": {"store_type": "sqlite", "run_id": "x"}}
    with pytest.raises(WorkflowRuntimeError, match="sqlite"):
        await run_workflow(workflow, context=Context.from_dict(workflow, stored), flavour=flavour)
