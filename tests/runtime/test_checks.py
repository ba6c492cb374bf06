"""Agents that cannot work natively on Trio are refused before they run; what can work is not refused.

No postponed annotations here: upstream looks at those of a tool's function to find its context.
"""

import asyncio
import subprocess
import sys
from functools import partial

import pytest
from llama_index.core.agent.workflow import AgentInput, AgentOutput, FunctionAgent, ToolCall
from llama_index.core.memory import ChatMemoryBuffer, Memory, SimpleComposableMemory
from llama_index.core.storage.chat_store import SimpleChatStore
from llama_index.core.tools import BaseTool, FunctionTool, ToolMetadata, ToolOutput
from pydantic import BaseModel
from workflows import Context, Workflow, step
from workflows.events import StartEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.exceptions import FlavourError
from llama_corral.runtime import check_served, open_run, run_workflow

from .agents import (
    UPSTREAM_WARNS,
    ApprovalRequired,
    NativeMemory,
    add,
    add_in_thread,
    adds,
    asks,
    chats,
    function_agent,
    native_memory,
    react_agent,
    reacts,
    team_adds,
    team_of,
    then,
)
from .scripted_llm import call, in_turn, react_answer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), *UPSTREAM_WARNS]


class Plain(BaseTool):
    """A sync tool of an own class: upstream runs it in a thread of asyncio's."""

    metadata = ToolMetadata("plain", "plain")

    def __call__(self, input):  # noqa: A002 -- upstream's name
        return ToolOutput("plain", "3", raw_input={}, raw_output=3)


class CalledHere(FunctionTool):
    async def acall(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class CalledAsync:
    async def __call__(self, a: int, b: int) -> int:
        return a + b


async def add_with_context(ctx: Context, a: int, b: int) -> int:
    return a + b


async def add_elsewhere(a: int, b: int) -> int:
    await asyncio.sleep(0.001)  # noqa: TID251 -- what users write in their tools
    return a + b


tool_of = FunctionTool.from_defaults
SYNC = {
    "function": lambda: add_in_thread,
    "lambda": lambda: tool_of(lambda a, b: a + b, name="add"),
    "fn": lambda: tool_of(add_in_thread),
    "callback": lambda: tool_of(async_fn=add, callback=str),
    "own class": Plain,
    "an object that is called": lambda: tool_of(CalledAsync(), name="add"),
}
ASYNC = {
    "function": lambda: add,
    "fn": lambda: tool_of(fn=add),
    "async_fn": lambda: tool_of(async_fn=add),
    "both": lambda: tool_of(fn=add_in_thread, async_fn=add),
    "partial": lambda: tool_of(partial(add, b=2), name="add"),
    "context": lambda: add_with_context,
    "own class": lambda: CalledHere.from_defaults(add_in_thread),
}


def calling(tool, **options):
    agent = function_agent(in_turn(), tool, **options)
    name = agent.tools[0].metadata.name
    agent.llm = function_agent(then([call(name, a=1, b=2)], "3", "it is 3")).llm
    return agent


@pytest.mark.parametrize("name", SYNC)
async def test_sync_tools_are_refused_on_trio_alone(configuration, flavour, name):
    agent = calling(SYNC[name]())
    start = {"user_msg": "add", "memory": native_memory()}
    if configuration != "trio-anyio":
        async with open_run(agent, flavour=flavour, **start):
            pass
        return
    with pytest.raises(FlavourError, match=f"agent 'Agent' .* sync tool '{agent.tools[0].metadata.name}'") as caught:
        await run_workflow(agent, flavour=flavour, **start)
    assert "flavour='asyncio'" in caught.value.hint
    assert caught.value.fields == {
        "flavour": "anyio",
        "agent": "Agent",
        "step": "call_tool",
        "tools": [agent.tools[0].metadata.name],
    }


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("name", ASYNC)
async def test_async_tools_work(flavour, name, hosted):
    async def run():
        return await run_workflow(calling(ASYNC[name]()), user_msg="add", memory=native_memory(), flavour=flavour)

    if hosted:
        async with open_asyncio_loop():
            result = await run()
    else:
        result = await run()
    assert str(result) == "it is 3"
    assert [tool.tool_output.raw_output for tool in result.tool_calls] == [3]


async def test_all_sync_tools_of_any_member_are_named(configuration, flavour):
    agent = team_of(in_turn(), add, add_in_thread, Plain())
    start = {"user_msg": "add", "memory": native_memory()}
    if configuration == "trio-anyio":
        with pytest.raises(FlavourError, match=r"agent 'second' .* sync tools 'add_in_thread', 'plain'"):
            await run_workflow(agent, flavour=flavour, **start)
    else:
        async with open_run(agent, flavour=flavour, **start):
            pass


async def test_a_tool_that_came_later_is_seen(configuration, flavour):
    agent = calling(add)
    await run_workflow(agent, user_msg="add", memory=native_memory(), flavour=flavour)
    agent.tools.append(tool_of(add_in_thread))
    if configuration == "trio-anyio":
        with pytest.raises(FlavourError, match="add_in_thread"):
            await run_workflow(agent, user_msg="add", memory=native_memory(), flavour=flavour)


class Sum(BaseModel):
    total: int


async def test_structured_output_of_a_function_calling_llm(configuration, flavour):
    agent = function_agent(in_turn("it is 3", [call("Sum", total=3)]), output_cls=Sum)
    start = {"user_msg": "add", "memory": native_memory()}
    if configuration == "trio-anyio":
        with pytest.raises(FlavourError, match="its output_cls Sum through asyncio"):
            await run_workflow(agent, flavour=flavour, **start)
    else:
        assert (await run_workflow(agent, flavour=flavour, **start)).structured_response == {"total": 3}


@pytest.mark.parametrize(
    "make",
    [
        lambda: react_agent(in_turn(react_answer("it is 3"), '{"total": 3}'), output_cls=Sum),
        lambda: chats("it is 3", structured_output_fn=lambda messages: {"total": 3}),
    ],
    ids=["text completion", "own function"],
)
async def test_other_structured_output_works(flavour, make):
    result = await run_workflow(make(), user_msg="add", memory=native_memory(), flavour=flavour)
    assert result.structured_response == {"total": 3}


class OwnCalls(FunctionAgent):
    """Has its own way to call sync tools."""

    async def _call_tool(self, ctx, tool, tool_input):
        return tool.call(**tool_input)


class OwnEnd(FunctionAgent):
    """Makes no structured output, whatever its output_cls."""

    @step
    async def parse_agent_output(self, ctx: Context, ev: AgentOutput) -> StopEvent | AgentInput | ToolCall | None:
        return StopEvent(result="fine")


async def test_an_agent_with_a_way_of_its_own_is_not_refused(flavour):
    agent = OwnCalls(llm=calling(add_in_thread).llm, tools=[add_in_thread])
    assert str(await run_workflow(agent, user_msg="add", memory=native_memory(), flavour=flavour)) == "it is 3"
    agent = OwnEnd(llm=chats("hello").llm, output_cls=Sum)
    assert await run_workflow(agent, user_msg="add", memory=native_memory(), flavour=flavour) == "fine"


# Memory


class OnlyRead(ChatMemoryBuffer):
    async def aget(self, *args, **kwargs):
        return self.get(*args, **kwargs)


class NativeStore(SimpleChatStore):
    async def async_add_message(self, *args, **kwargs):
        self.add_message(*args, **kwargs)


class ByItsStore(ChatMemoryBuffer):
    """Writes natively because its store does."""

    async def aget(self, *args, **kwargs):
        return self.get(*args, **kwargs)

    async def aput_messages(self, messages):
        for message in messages:
            await self.aput(message)


MEMORIES = {
    "none": (lambda: None, "ChatMemoryBuffer"),
    "buffer": (ChatMemoryBuffer.from_defaults, "ChatMemoryBuffer"),
    "sqlite": (Memory.from_defaults, "Memory"),
    "composed": (lambda: SimpleComposableMemory.from_defaults(native_memory()), "SimpleComposableMemory"),
    "half": (OnlyRead.from_defaults, "OnlyRead"),
    "its store": (ByItsStore.from_defaults, "ByItsStore"),
    "native": (native_memory, None),
    "native store": (lambda: ByItsStore.from_defaults(chat_store=NativeStore()), None),
}


@pytest.mark.parametrize("make", [lambda: chats("fine"), lambda: team_of(lambda messages: "fine")], ids=["one", "team"])
@pytest.mark.parametrize("name", MEMORIES)
async def test_memories_that_call_asyncio_are_refused_on_trio_alone(configuration, flavour, name, make):
    memory, refused = MEMORIES[name]
    start = {"user_msg": "hello", "memory": memory()}
    if configuration != "trio-anyio":
        async with open_run(make(), flavour=flavour, **start):
            pass
    elif refused is None:
        assert str(await run_workflow(make(), flavour=flavour, **start)) == "fine"
    else:
        with pytest.raises(FlavourError, match=f"its memory, a {refused}, calls asyncio") as caught:
            await run_workflow(make(), flavour=flavour, **start)
        assert caught.value.fields["memory"] == refused
        assert caught.value.fields["step"] == "init_run"


class OnlyReact(ChatMemoryBuffer):
    """Enough for a ReActAgent, which puts messages one by one."""

    async def aget(self, *args, **kwargs):
        return self.get(*args, **kwargs)

    async def aput(self, message):
        self.put(message)


async def test_a_memory_needs_only_what_its_agent_awaits(configuration, flavour):
    start = {"user_msg": "hello", "memory": OnlyReact.from_defaults()}
    assert str(await run_workflow(react_agent(in_turn(react_answer("fine"))), flavour=flavour, **start)) == "fine"
    if configuration == "trio-anyio":
        with pytest.raises(FlavourError, match=r"OnlyReact, calls asyncio \(aput_messages\)"):
            await run_workflow(chats("fine"), flavour=flavour, **start)
        with pytest.raises(FlavourError, match=r"OnlyReact, calls asyncio \(aset\)"):
            await run_workflow(react_agent(in_turn()), chat_history=[{"role": "user"}], flavour=flavour, **start)


async def test_a_snapshot_from_the_other_flavour(configuration):
    if configuration != "trio-anyio":
        pytest.skip("both flavours are on Trio")
    agent = asks()
    async with open_run(agent, user_msg="go", flavour="asyncio") as run:
        async for event in run.events():
            if isinstance(event, ApprovalRequired):
                break
        stored = run.context.to_dict()
    with pytest.raises(FlavourError, match="its memory, a ChatMemoryBuffer"):
        await run_workflow(agent, context=Context.from_dict(agent, stored), flavour="anyio")


# While it runs


@pytest.mark.parametrize("hosted", [False, True])
async def test_a_tool_that_calls_asyncio_fails_the_run_and_not_only_its_llm(configuration, flavour, hosted):
    async def run():
        return await run_workflow(calling(add_elsewhere), user_msg="add", memory=native_memory(), flavour=flavour)

    async def attempt():
        if hosted:
            async with open_asyncio_loop():
                return await run()
        return await run()

    if configuration == "trio-anyio":
        with pytest.raises(
            FlavourError, match="step 'call_tool' runs in the 'anyio' flavour on trio and called asyncio"
        ):
            await attempt()
    else:
        assert str(await attempt()) == "it is 3"


# Services


class Hello(Workflow):
    @step
    async def hello(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result="hello")


def test_what_is_served_natively():
    for good in (Hello(), chats(native=True), adds(native=True), reacts(native=True), team_adds(native=True)):
        check_served(good, "anyio", "trio")
    for bad, why in (
        (chats(), "its memory, a ChatMemoryBuffer"),
        (adds(add_in_thread, native=True), "sync tool"),
        (team_of(in_turn()), "its memory, a ChatMemoryBuffer"),
    ):
        with pytest.raises(FlavourError, match=why):
            check_served(bad, "anyio", "trio")
        check_served(bad, "asyncio", "trio")
        check_served(bad, "anyio", "asyncio")
        check_served(bad, "anyio", None)


@pytest.mark.parametrize("make", [adds, reacts, team_adds])
async def test_an_agent_that_starts_with_a_memory_of_its_own(flavour, make):
    async with open_run(make(native=True), user_msg="add", flavour=flavour) as run:
        assert str(await run.result()) == "it is 3"
        assert type(await run.store.get("memory")) is NativeMemory


@pytest.mark.process
def test_nobody_pays_for_agents_who_has_none():
    code = "import sys, llama_corral.deploy, llama_corral.runtime; sys.exit('llama_index.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
