"""llama-index-core's agents: as upstream runs them, in every flavour; natively on Trio with a memory that lets them."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import anyio
import anyio.to_thread
import pytest
from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer, Memory
from sqlalchemy.ext.asyncio import create_async_engine
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowRuntimeError
from workflows.events import StartEvent, StopEvent

from llama_corral.aio import call_asyncio, open_asyncio_loop
from llama_corral.exceptions import FlavourError
from llama_corral.runtime import RunHooks, new_context, open_run, run_workflow

from .agents import (
    UPSTREAM_WARNS,
    Approval,
    ApprovalRequired,
    NativeMemory,
    add,
    add_in_thread,
    adds,
    asks,
    broken,
    chats,
    function_agent,
    heard,
    native_memory,
    reacts,
    reacts_asking,
    team_adds,
    team_asks,
)
from .scripted_llm import ScriptedLLM, call, in_turn

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), *UPSTREAM_WARNS]


@pytest.fixture
def memory(configuration):
    """What an agent must be started with: nothing, except natively on Trio."""
    return {"memory": native_memory()} if configuration == "trio-anyio" else {}


class Idle(RunHooks):
    """Tells when the run first waits for the outside."""

    def __init__(self):
        self._idle = anyio.Event()

    def on_idle(self):
        self._idle.set()

    async def wait(self):
        with anyio.fail_after(10):
            await self._idle.wait()


async def seen_by(agent, flavour, **start):
    async with open_run(agent, flavour=flavour, **start) as run:
        return [event async for event in run.events()], await run.result()


def seen_upstream(agent, **start):
    async def run():
        handler = agent.run(**start)
        return [event async for event in handler.stream_events()], await handler

    return asyncio.run(run())


def shown(events):
    """Events as JSON; the ids of ReAct's tool calls are random."""
    ids: dict[str, str] = {}

    def without_chance(value):
        if isinstance(value, dict):
            return {
                key: ids.setdefault(item, f"id {len(ids)}") if key == "tool_id" else without_chance(item)
                for key, item in value.items()
            }
        return [without_chance(item) for item in value] if isinstance(value, list) else value

    return [(type(event).__name__, without_chance(event.model_dump(mode="json"))) for event in events]


MAKERS = {
    "function": adds,
    "function without stream": partial(adds, streaming=False),
    "react": reacts,
    "react without stream": partial(reacts, streaming=False),
    "team": team_adds,
    "in a thread": partial(adds, add_in_thread),
    "react in a thread": partial(reacts, add_in_thread),
    "team in a thread": partial(team_adds, add_in_thread),
}


@pytest.mark.parametrize("name", MAKERS)
async def test_the_same_events_and_result_as_upstream(configuration, flavour, memory, name):
    make = MAKERS[name]
    if configuration == "trio-anyio" and "thread" in name:
        with pytest.raises(FlavourError, match="sync tool 'add_in_thread'"):
            await seen_by(make(), flavour, user_msg="add", **memory)
        return
    theirs, their_result = await anyio.to_thread.run_sync(partial(seen_upstream, make(), user_msg="add"))
    ours, result = await seen_by(make(), flavour, user_msg="add", **memory)
    assert shown(ours) == shown(theirs)
    assert str(result) == str(their_result) == "it is 3"
    assert result.current_agent_name == their_result.current_agent_name
    (their_tool,) = (each for each in their_result.tool_calls if each.tool_name != "handoff")
    (tool,) = (each for each in result.tool_calls if each.tool_name != "handoff")
    assert tool.tool_output == their_tool.tool_output
    assert tool.tool_output.raw_output == 3


async def test_deltas_come_in_order(flavour, memory):
    agent = chats("one two three")
    events, _ = await seen_by(agent, flavour, user_msg="count", **memory)
    stream = [(event.delta, event.response) for event in events if isinstance(event, AgentStream)]
    assert stream == [("one ", "one "), ("two ", "one two "), ("three", "one two three")]


async def test_a_hand_off_changes_who_speaks(flavour, memory):
    events, result = await seen_by(team_adds(), flavour, user_msg="add", **memory)
    speakers = [event.current_agent_name for event in events if isinstance(event, AgentStream)]
    assert speakers == ["first", "second", "second", "second", "second"]
    assert result.current_agent_name == "second"


async def test_tools_of_one_turn_run_side_by_side(flavour, memory):
    met = []

    async def meet(who: int) -> str:
        """Return when both are here."""
        event = anyio.Event()
        met.append(event)
        if len(met) == 2:
            for each in met:
                each.set()
        await event.wait()
        return f"{who} met"

    turns = in_turn([call("meet", "a", who=1), call("meet", "b", who=2)], "done")
    _, result = await seen_by(function_agent(turns, meet), flavour, user_msg="go", **memory)
    assert {tool.tool_output.content for tool in result.tool_calls} == {"1 met", "2 met"}


async def test_the_error_of_a_tool_is_what_the_llm_hears(flavour, memory):
    agent = function_agent(in_turn([call("broken")], "sorry"), broken)
    events, result = await seen_by(agent, flavour, user_msg="go", **memory)
    (outcome,) = (event.tool_output for event in events if isinstance(event, ToolCallResult))
    assert (outcome.is_error, outcome.content) == (True, "no such llama")
    assert heard(agent)[1][-1] == "tool: no such llama"
    assert str(result) == "sorry"


async def test_too_many_turns(flavour, memory):
    agent = function_agent(lambda messages: [call("add", a=1, b=1)], add)
    with pytest.raises(WorkflowRuntimeError, match="Max iterations of 3"):
        await run_workflow(agent, user_msg="go", max_iterations=3, flavour=flavour, **memory)


# Memory


CONVERSATION = ["user: add", "assistant: None", "tool: 3", "assistant: it is 3"]


def lines(messages):
    return [f"{message.role.value}: {message.content}" for message in messages]


@pytest.mark.parametrize("make", [ChatMemoryBuffer.from_defaults, native_memory])
async def test_what_is_remembered(configuration, flavour, make):
    memory = make()
    if configuration == "trio-anyio" and make is not native_memory:
        with pytest.raises(FlavourError, match="ChatMemoryBuffer"):
            await run_workflow(adds(), user_msg="add", memory=memory, flavour=flavour)
        return
    await run_workflow(adds(), user_msg="add", memory=memory, flavour=flavour)
    assert lines(memory.get_all()) == CONVERSATION
    agent = chats("again it is 3")
    await run_workflow(agent, user_msg="sure?", memory=memory, flavour=flavour)
    assert heard(agent) == [[*CONVERSATION, "user: sure?"]]


async def test_a_memory_in_sqlite(configuration, flavour):
    async with open_asyncio_loop():
        engine = create_async_engine("sqlite+aiosqlite://")
        memory = Memory.from_defaults(async_engine=engine)
        if configuration == "trio-anyio":
            with pytest.raises(FlavourError, match="Memory"):
                await run_workflow(adds(), user_msg="add", memory=memory, flavour=flavour)
            return
        try:
            await run_workflow(adds(), user_msg="add", memory=memory, flavour=flavour)
            assert lines(await call_asyncio(memory.aget_all)) == CONVERSATION
            agent = chats("again it is 3")
            await run_workflow(agent, user_msg="sure?", memory=memory, flavour=flavour)
            assert heard(agent) == [[*CONVERSATION, "user: sure?"]]
        finally:
            await call_asyncio(engine.dispose)  # noqa: ASYNC102 -- nobody cancels the test


async def test_a_given_history_comes_first(flavour, memory):
    agent = chats("fine")
    history = [ChatMessage(role="user", content="hello"), {"role": "assistant", "content": "hi"}]
    await run_workflow(agent, user_msg="how are you?", chat_history=history, flavour=flavour, **memory)
    assert heard(agent) == [["user: hello", "assistant: hi", "user: how are you?"]]


@pytest.mark.parametrize("make", [new_context, Context])
async def test_a_context_keeps_the_conversation(flavour, memory, make):
    agent = chats("one", "two", "three")
    context = make(agent)
    await run_workflow(agent, user_msg="first", context=context, flavour=flavour, **memory)
    await run_workflow(agent, user_msg="second", context=context, flavour=flavour)
    stored = json.dumps(context.to_dict())
    elsewhere = Context.from_dict(agent, json.loads(stored))
    await run_workflow(agent, user_msg="third", context=elsewhere, flavour=flavour)
    whole = ["user: first", "assistant: one", "user: second", "assistant: two", "user: third"]
    assert heard(agent) == [whole[:1], whole[:3], whole]
    remembered = await elsewhere.store.get("memory")
    assert type(remembered) is (NativeMemory if memory else ChatMemoryBuffer)


async def test_a_memory_put_into_a_fresh_context(configuration, flavour):
    agent = chats("fine")
    context = new_context(agent)
    memory = native_memory()
    memory.put(ChatMessage(role="user", content="hello"))
    await context.store.set("memory", memory)
    await run_workflow(agent, user_msg="how are you?", context=context, flavour=flavour)
    assert heard(agent) == [["user: hello", "user: how are you?"]]
    if configuration == "trio-anyio":
        context = new_context(agent)
        await context.store.set("memory", ChatMemoryBuffer.from_defaults())
        with pytest.raises(FlavourError, match="ChatMemoryBuffer"):
            await run_workflow(agent, user_msg="hm", context=context, memory=memory, flavour=flavour)


# A person


async def test_a_tool_asks_a_person(flavour, memory):
    idle = Idle()
    async with open_run(asks(), user_msg="go", flavour=flavour, hooks=idle, **memory) as run:
        await idle.wait()
        run.send_event(Approval(response="no", by="bob"))
        run.send_event(Approval(response="yes", by="ada"))
        result = await run.result()
        assert [event.what async for event in run.events() if isinstance(event, ApprovalRequired)] == ["go on"]
    assert str(result) == "thank you"
    assert result.tool_calls[0].tool_output.content == "go on: yes"


@pytest.mark.promise("P7")
@pytest.mark.parametrize("make", [asks, reacts_asking, team_asks])
async def test_an_agent_that_waits_for_a_person_is_resumed_elsewhere(flavour, memory, make):
    idle = Idle()
    async with open_run(make(), user_msg="go", flavour=flavour, hooks=idle, **memory) as run:
        await idle.wait()
        stored = json.dumps(run.context.to_dict())
    agent = make()
    async with open_run(agent, context=Context.from_dict(agent, json.loads(stored)), flavour=flavour) as again:
        again.send_event(Approval(response="yes", by="ada"))
        result = await again.result()
    assert str(result) == "thank you"
    assert result.tool_calls[-1].tool_output.content == "go on: yes"


# Scopes


@pytest.mark.promise("P6")
@pytest.mark.parametrize("how", ["block", "cancel"])
async def test_a_cancelled_agent_leaves_nothing(flavour, memory, how):
    started, ended = [anyio.Event(), anyio.Event()], []

    async def hang(which: int) -> str:
        """Hang."""
        try:
            started[which].set()
            await anyio.sleep_forever()
        finally:
            ended.append(which)
        return ""

    agent = function_agent(in_turn([call("hang", "a", which=0), call("hang", "b", which=1)]), hang)
    async with open_run(agent, user_msg="go", flavour=flavour, **memory) as run:
        for each in started:
            await each.wait()
        if how == "cancel":
            run.cancel()
            with pytest.raises(WorkflowCancelledByUser):
                await run.result()
    assert sorted(ended) == [0, 1]


@pytest.mark.promise("P6")
async def test_an_agent_is_cancelled_while_its_llm_speaks(flavour, memory):
    started, ended = anyio.Event(), []

    class Hangs(ScriptedLLM):
        async def astream_chat(self, messages, **kwargs):
            async def stream():  # noqa: ASYNC900 -- what upstream's LLMs give
                try:
                    started.set()
                    await anyio.sleep_forever()
                    yield
                finally:
                    ended.append("llm")

            return stream()

    agent = FunctionAgent(llm=Hangs(in_turn()))
    async with open_run(agent, user_msg="go", flavour=flavour, **memory):
        await started.wait()
    assert ended == ["llm"]


class Asker(Workflow):
    """Has an agent's run inside a step of its own."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        return StopEvent(result=str(await ev.get("how")()))


async def test_an_agent_inside_a_step(flavour, memory):
    def how():
        return run_workflow(adds(), user_msg="add", flavour=flavour, **memory)

    assert await run_workflow(Asker(), how=how, flavour=flavour) == "it is 3"


@pytest.mark.parametrize("make", [adds, reacts, team_adds, partial(adds, add_in_thread)])
async def test_a_plain_run_of_an_agent_inside_a_step(configuration, flavour, make):
    if configuration == "trio-anyio":
        pytest.skip("upstream's own runtime needs asyncio")

    async def how():
        return await make().run(user_msg="add")

    assert await run_workflow(Asker(), how=how, flavour=flavour) == "it is 3"


async def test_runs_of_one_agent_do_not_mix(flavour, memory):
    agent = function_agent(lambda messages: f"you said {messages[-1].content}")
    answers = {}

    async def talk(n):
        own = {"memory": native_memory()} if memory else {}
        answers[n] = str(await run_workflow(agent, user_msg=str(n), flavour=flavour, **own))

    async with open_asyncio_loop(), anyio.create_task_group() as tasks:
        for n in range(20):
            tasks.start_soon(talk, n)
    assert answers == {n: f"you said {n}" for n in range(20)}
