"""What can be told before a run: agents of llama-index-core that would call asyncio in steps that run natively on Trio.

Such a call fails. In a tool it does not fail the run: the agent hands the error to its LLM as the tool's output and goes
on, so nobody may ever see why it answers badly. What is refused here is refused because llama-index-core's own code
names asyncio where the agent will come by; an own class that does without is never refused.

llama-index-core is not imported here: whoever has an agent has imported it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..exceptions import FlavourError
from .inline import drive_inline
from .options import StepFlavour
from .upstream import StartEvent, Workflow

if TYPE_CHECKING:
    from .driver import RunDriver

_AGENT = ("llama_index.core.agent.workflow.base_agent", "BaseWorkflowAgent")
_TEAM = ("llama_index.core.agent.workflow.multi_agent_workflow", "AgentWorkflow")
_CALLS_TOOLS = ("call_tool", "_call_tool", "get_tools", "_ensure_tools_are_async")
_CHOOSES_MEMORY = ("init_run", "_init_context")
_SQL = "llama_index.core.storage.chat_store.sql"  # SQLAlchemy's asyncio half, without naming asyncio itself


def check_run(run: RunDriver, start: StartEvent | None) -> None:
    """Refuse a run of an agent that cannot work in the flavour.

    Nothing is kept from call to call: an agent's list of tools may grow at any time, and looking is cheap beside a run.

    Args:
        run: The run, not yet driven. A memory in its state comes before the one in the start event.
        start: The start event; None for a run that goes on from a snapshot.

    Raises:
        FlavourError: a tool is sync, structured output would go through asyncio, or the memory calls asyncio. Fields:
            `step`, `flavour`, `agent`, and `tools`, `output_cls` or `memory`.
    """
    workflow = run.workflow
    agents = _native_agents(workflow, run.options.flavour, run.home.backend)
    if agents:
        _refuse_agents(workflow, agents)
        memory = drive_inline(run.store.get("memory", default=None)) or None
        if memory is None and start is not None and _is_as_shipped(workflow, *_CHOOSES_MEMORY):
            memory = start.get("memory") or _default_memory(workflow)
        _refuse_memory(agents[0], memory, start, "start it with a memory whose async methods call none")


def check_served(workflow: Workflow, flavour: StepFlavour, backend: str | None) -> None:
    """Refuse an agent whose every task would be refused: what `check_run` refuses, and the memory that an agent makes,
    because start arguments that come over a wire bring no other one.

    Raises:
        FlavourError: as `check_run`.
    """
    agents = _native_agents(workflow, flavour, backend)
    if agents:
        _refuse_agents(workflow, agents)
        if _is_as_shipped(workflow, *_CHOOSES_MEMORY):
            instead = "override its step init_run to put another memory into ctx.store first"
            _refuse_memory(agents[0], _default_memory(workflow), None, instead)


def tool_error(result: Any) -> Exception | None:
    """The exception that an agent's tool raised and the agent kept to itself, if that is what a step returned."""
    if type(result).__name__ != "ToolCallResult":
        return None
    error = getattr(getattr(result, "tool_output", None), "exception", None)
    return error if isinstance(error, Exception) else None


def _native_agents(workflow: Workflow, flavour: StepFlavour, backend: str | None) -> list[Any]:
    """The agents that the workflow is or consists of, the first to speak in front; none where they need not be native."""
    if flavour != "anyio" or backend != "trio":
        return []
    one, team = _loaded(_AGENT), _loaded(_TEAM)
    if one is not None and isinstance(workflow, one):
        return [workflow]
    if team is not None and isinstance(workflow, team):
        members: Any = workflow
        first = members.agents[members.root_agent]
        return [first, *(agent for agent in members.agents.values() if agent is not first)]
    return []


def _loaded(place: tuple[str, str]) -> Any:
    """A class of llama-index-core if its module has been imported, else None."""
    return getattr(sys.modules.get(place[0]), place[1], None)


def _refuse_agents(workflow: Workflow, agents: list[Any]) -> None:
    """Raise for what needs no start to be told."""
    calls_tools = _is_as_shipped(workflow, *_CALLS_TOOLS)
    structures = _is_as_shipped(workflow, "parse_agent_output")
    for agent in agents:
        tools = [str(tool.metadata.name) for tool in agent.tools or () if _tool_calls_asyncio(tool)]
        if tools and calls_tools:
            names = f"tool{'s' if len(tools) > 1 else ''} {', '.join(map(repr, tools))}"
            why = f"llama-index-core calls its sync {names} through asyncio"
            raise _refusal(agent, why, "give it async functions as tools", step="call_tool", tools=tools)
        output_cls = _structured_output(workflow, agent)
        if output_cls is not None and structures and _predicts_through_asyncio(agent.llm):
            name = output_cls.__name__
            why = f"llama-index-core makes its output_cls {name} through asyncio"
            raise _refusal(agent, why, "give it a structured_output_fn", step="parse_agent_output", output_cls=name)


def _refuse_memory(agent: Any, memory: Any, start: StartEvent | None, instead: str) -> None:
    """Raise if the memory, or the class of the one that the agent will make, calls asyncio."""
    calls = _asyncio_calls(memory, _memory_calls(agent, start))
    if calls:
        name = (memory if isinstance(memory, type) else type(memory)).__name__
        why = f"its memory, a {name}, calls asyncio ({', '.join(calls)})"
        raise _refusal(agent, why, instead, step="init_run", memory=name)


def _refusal(agent: Any, why: str, instead: str, **fields: Any) -> FlavourError:
    return FlavourError(
        f"agent {agent.name!r} cannot run in the 'anyio' flavour on trio: {why}",
        hint=f"set the step flavour to 'asyncio' (flavour='asyncio', --step-flavour asyncio), or {instead}",
        flavour="anyio",
        agent=agent.name,
        **fields,
    )


def _calls_asyncio(function: Any) -> bool:
    """Whether it is a function of llama-index-core's whose code names asyncio."""
    return _is_shipped(function) and ("asyncio" in function.__code__.co_names or function.__module__ == _SQL)


def _is_shipped(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module.startswith("llama_index.core.") and hasattr(function, "__code__")


def _is_as_shipped(workflow: Workflow, *methods: str) -> bool:
    """Whether these methods of an agent are llama-index-core's own, so that what they do is known."""
    return all(_is_shipped(getattr(type(workflow), name, None)) for name in methods)


# Tools


def _tool_calls_asyncio(tool: Any) -> bool:
    call = getattr(type(tool), "acall", None)
    if call is None:  # a sync tool of an own class: the agent wraps it in a thread of asyncio's
        return _calls_asyncio(getattr(_loaded(("llama_index.core.tools.types", "BaseToolAsyncAdapter")), "acall", None))
    if _calls_asyncio(call):
        return True
    if not _is_shipped(call):
        return False
    # A FunctionTool: what it awaits. A sync function or callback is wrapped when the tool is made.
    return any(_calls_asyncio(getattr(tool, name, None)) for name in ("_async_fn", "_async_callback"))


# Structured output


def _structured_output(workflow: Any, agent: Any) -> Any:
    """The class of the structured output of an agent; a team's own setting comes before its members'."""
    for owner in (workflow, agent):
        output_cls = getattr(owner, "output_cls", None)
        if output_cls is not None or getattr(owner, "structured_output_fn", None) is not None:
            return output_cls
    return None


def _predicts_through_asyncio(llm: Any) -> bool:
    """Whether the LLM makes it by calling a function, in llama-index-core's way and not in one of its own."""
    if not llm.metadata.is_function_calling_model or llm.pydantic_program_mode not in ("default", "function"):
        return False
    predict = getattr(type(llm), "astructured_predict", None)
    return _is_shipped(predict) and _calls_asyncio(getattr(type(llm), "apredict_and_call", None))


# Memory


def _default_memory(workflow: Any) -> Any:
    """The memory class that llama-index-core makes where none is given, None if it has another way by now."""
    return type(workflow)._init_context.__globals__.get("ChatMemoryBuffer")


def _memory_calls(agent: Any, start: StartEvent | None) -> set[str]:
    """The methods of the memory that a run is going to await."""
    calls = {"aget"}
    if start is not None and start.get("user_msg"):
        calls.add("aput")
    if start is not None and start.get("chat_history"):
        calls.add("aset")
    finalize: Any = getattr(type(agent), "finalize", None)
    names = finalize.__code__.co_names if _is_shipped(finalize) else ()
    return calls | ({"aput", "aput_messages"} & set(names))


def _asyncio_calls(memory: Any, calls: set[str]) -> list[str]:
    """Those of the methods that call asyncio: by themselves, or by the store that they pass the call to."""
    cls = memory if isinstance(memory, type) else type(memory)
    return sorted(name for name in calls if _reaches_asyncio(memory, getattr(cls, name, None)))


def _reaches_asyncio(memory: Any, function: Any) -> bool:
    if _calls_asyncio(function):
        return True
    if not _is_shipped(function):
        return False
    names = function.__code__.co_names
    stores = [getattr(memory, field, None) for field in ("chat_store", "sql_store") if field in names]
    return any(_calls_asyncio(getattr(type(store), name, None)) for store in stores for name in names)
