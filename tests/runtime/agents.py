"""Agents for the tests of the runtime and of services. Everything in them is neutral except what says otherwise.

No postponed annotations here: upstream looks at those of a tool's function to find its context.
"""

from typing import Any

import anyio.lowlevel
import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.agent.workflow.workflow_events import AgentInput, AgentWorkflowStartEvent
from llama_index.core.memory import ChatMemoryBuffer
from workflows import Context, step
from workflows.events import HumanResponseEvent, InputRequiredEvent

from .scripted_llm import Script, ScriptedLLM, ScriptedTextLLM, Turn, call, in_turn, react_answer, react_call

UPSTREAM_WARNS = (
    # upstream looks at every attribute of the workflow, and an agent is a pydantic model with deprecated ones
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    # ReActAgent asks its context inside a step
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
)


class NativeMemory(ChatMemoryBuffer):
    """Its sync methods only touch a list, so that nothing of it needs a thread of asyncio's."""

    async def aget(self, input: str | None = None, **kwargs: Any) -> Any:  # noqa: A002 -- upstream's name
        return self.get(input, **kwargs)

    async def aset(self, messages: Any) -> None:
        self.set(messages)

    async def aput(self, message: Any) -> None:
        self.put(message)

    async def aput_messages(self, messages: Any) -> None:
        self.put_messages(messages)


class StartsNatively:
    """In front of an agent's class: puts a memory into the context before upstream looks for one."""

    @step
    async def init_run(self, ctx: Context, ev: AgentWorkflowStartEvent) -> AgentInput:
        if not await ctx.store.get("memory", default=None):
            await ctx.store.set("memory", NativeMemory.from_defaults())
        return await super().init_run(ctx, ev)


class NativeFunctionAgent(StartsNatively, FunctionAgent):
    pass


class NativeReActAgent(StartsNatively, ReActAgent):
    pass


class NativeTeam(StartsNatively, AgentWorkflow):
    pass


def native_memory() -> NativeMemory:
    return NativeMemory.from_defaults()


async def add(a: int, b: int) -> int:
    """Add."""
    await anyio.lowlevel.checkpoint()
    return a + b


def add_in_thread(a: int, b: int) -> int:
    """Add."""
    return a + b


async def broken() -> str:
    """Fails."""
    raise LookupError("no such llama")


class Approval(HumanResponseEvent):
    """What only the tool waits for, and nothing else names."""

    by: str


class ApprovalRequired(InputRequiredEvent):
    what: str


async def ask(ctx: Context, what: str) -> str:
    """Ask a person."""
    approval = await ctx.wait_for_event(
        Approval, waiter_id=what, waiter_event=ApprovalRequired(what=what), requirements={"by": "ada"}
    )
    return f"{what}: {approval.response}"


def then(first: Turn, heard: str, second: Turn) -> Script:
    """Say the first until the last message has the text, then the second. For any number of conversations."""
    return lambda messages: second if heard in str(messages[-1].content) else first


def function_agent(script: Script, *tools: Any, native: bool = False, **options: Any) -> FunctionAgent:
    cls = NativeFunctionAgent if native else FunctionAgent
    return cls(llm=ScriptedLLM(script), tools=list(tools), **options)


def react_agent(script: Script, *tools: Any, native: bool = False, **options: Any) -> ReActAgent:
    cls = NativeReActAgent if native else ReActAgent
    return cls(llm=ScriptedTextLLM(script), tools=list(tools), **options)


def team_of(script: Script, *tools: Any, native: bool = False) -> AgentWorkflow:
    """The first agent hands off to the second, which says the script."""
    hand_off = [call("handoff", to_agent="second", reason="tools")]
    first = function_agent(lambda messages: hand_off, name="first", description="talks", can_handoff_to=["second"])
    second = function_agent(script, *tools, name="second", description="works")
    return (NativeTeam if native else AgentWorkflow)(agents=[first, second], root_agent="first")


def adds(tool: Any = add, **options: Any) -> FunctionAgent:
    return function_agent(then([call(tool.__name__, a=1, b=2)], "3", "it is 3"), tool, **options)


def reacts(tool: Any = add, **options: Any) -> ReActAgent:
    first = react_call(tool.__name__, '{"a": 1, "b": 2}')
    return react_agent(then(first, "Observation: 3", react_answer("it is 3")), tool, **options)


def team_adds(tool: Any = add, **options: Any) -> AgentWorkflow:
    return team_of(then([call(tool.__name__, a=1, b=2)], "3", "it is 3"), tool, **options)


def asks(**options: Any) -> FunctionAgent:
    """Asks a person, and thanks for a yes."""
    return function_agent(then([call("ask", what="go on")], "go on: yes", "thank you"), ask, **options)


def reacts_asking(**options: Any) -> ReActAgent:
    first = react_call("ask", '{"what": "go on"}')
    return react_agent(then(first, "go on: yes", react_answer("thank you")), ask, **options)


def team_asks(**options: Any) -> AgentWorkflow:
    return team_of(then([call("ask", what="go on")], "go on: yes", "thank you"), ask, **options)


def chats(*answers: str, **options: Any) -> FunctionAgent:
    return function_agent(in_turn(*answers), **options)


def heard(agent: Any) -> list[list[str]]:
    """What the agent's LLM was asked, message by message."""
    return [[f"{message.role.value}: {message.content}" for message in messages] for messages in agent.llm.heard]
