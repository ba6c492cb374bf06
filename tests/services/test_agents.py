"""Agents of llama-index-core as services: their events, results, questions to people, and what a session remembers.

No postponed annotations here: upstream looks at those of a tool's function to find its context.
"""

import json

import anyio
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from pydantic import BaseModel
from workflows import Context, Workflow, step
from workflows.context import JsonSerializer
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.exceptions import BadInput, FlavourError
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.runtime import KeptElsewhere, open_run
from llama_corral.services import WorkflowCodec, WorkflowService, WorkflowServiceConfig

from ..runtime.agents import (
    UPSTREAM_WARNS,
    add,
    add_in_thread,
    adds,
    asks,
    chats,
    function_agent,
    heard,
    reacts,
    reacts_asking,
    team_adds,
    team_asks,
    then,
)
from ..runtime.scripted_llm import call, in_turn
from .rig import open_bare

pytestmark = [pytest.mark.anyio, *UPSTREAM_WARNS]

UNSERIALIZABLE = pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning")
APPROVAL = json.dumps({"type": "Approval", "value": {"response": "yes", "by": "ada"}})
TURN = ["AgentInput", "AgentStream", "AgentOutput", "ToolCall", "ToolCallResult"]
ANSWER = ["AgentInput", *["AgentStream"] * 3, "AgentOutput", "StopEvent"]


@pytest.fixture
def native(configuration):
    """Natively on Trio an agent needs a memory of its own."""
    return configuration == "trio-anyio"


@pytest.mark.promise("P3")
@pytest.mark.parametrize("make", [adds, team_adds])
async def test_an_agent_is_served(rig, native, make):
    await rig.serve(make(native=native))
    record = await rig.run(user_msg="add")
    assert (record.status, record.result_text) == ("completed", "it is 3")
    result = json.loads(record.result)
    assert result["response"]["blocks"] == [{"block_type": "text", "text": "it is 3"}]
    assert result["current_agent_name"] == ("Agent" if make is adds else "second")
    assert result["tool_calls"][-1] == {"tool_id": "call-add", "tool_name": "add", "tool_kwargs": {"a": 1, "b": 2}}
    events = await rig.events(record.task_id)
    assert [event.type for event in events] == TURN * (1 if make is adds else 2) + ANSWER
    payloads = [json.loads(event.payload) for event in events]
    assert [payload["delta"] for payload in payloads[-5:-2]] == ["it ", "is ", "3"]
    assert payloads[-7]["tool_output"]["raw_output"] == 3
    assert payloads[-1]["result"] == result


async def test_a_reasoning_agent_is_served(rig, native):
    await rig.serve(reacts(native=native))
    record = await rig.run(user_msg="add")
    assert (record.status, record.result_text) == ("completed", "it is 3")
    assert [each["tool_name"] for each in json.loads(record.result)["tool_calls"]] == ["add"]


async def test_an_agent_on_a_bare_queue(flavour, native, nothing_left):
    async with open_bare(adds(native=native), flavour) as bare:
        await bare.new_task("t", user_msg="add")
        assert (await bare.result("t"))["result"] == "it is 3"
        assert len(bare.streamed("t")) == len(TURN + ANSWER)


@pytest.mark.parametrize("native", [False, True])
async def test_an_agent_that_cannot_work_is_not_served(configuration, flavour, nothing_left, native):
    async with MemoryMessageQueue() as queue:
        agent = adds(add_in_thread if native else add, native=native)
        service = WorkflowService(agent, queue, WorkflowServiceConfig(service_name="svc"), step_flavour=flavour)
        async with anyio.create_task_group() as tasks:
            if configuration == "trio-anyio":
                with pytest.raises(FlavourError, match="sync tool" if native else "its memory, a ChatMemoryBuffer"):
                    await service.processing_loop()
            else:
                await tasks.start(service.processing_loop)
            tasks.cancel_scope.cancel()


@pytest.mark.promise("P4")
async def test_a_session_remembers_its_conversation(rig, native):
    agent = chats("one", "two", "three", native=native)
    await rig.serve(agent)
    for session in ("a", "b"):
        await rig.plane.sessions.create(session)
    for session, message in (("a", "first"), ("b", "other"), ("a", "second")):
        record = await rig.run(session=session, user_msg=message)
        assert (record.status, record.context_saved, record.context_error) == ("completed", True, None)
    assert heard(agent) == [["user: first"], ["user: other"], ["user: first", "assistant: one", "user: second"]]


@pytest.mark.promise("P2", "P3", "P4", "P7")
@pytest.mark.parametrize("make", [asks, reacts_asking, team_asks])
async def test_a_person_answers_another_instance(rig, native, make):
    service = await rig.serve(make(native=native))
    await rig.plane.sessions.create("s")
    task_id = await rig.submit(session="s", user_msg="go")
    await rig.wait_status(task_id, "waiting")
    await rig.stop(service)
    assert (await rig.plane.get_task(task_id)).status == "queued"
    agent = make(native=native)
    await rig.serve(agent)
    await rig.plane.send_event(task_id, APPROVAL)
    record = await rig.result(task_id)
    assert (record.status, record.result_text, record.context_saved) == ("completed", "thank you", True)
    indices = [event.index for event in await rig.events(task_id)]
    assert indices == list(range(len(indices)))
    llm = getattr(agent, "llm", None) or agent.agents["second"].llm
    assert len(llm.heard) == 1  # what was said before was not said again
    again = await rig.submit(session="s", user_msg="again")
    await rig.wait_status(again, "waiting")
    assert any("thank you" in str(message.content) for message in llm.heard[1])
    await rig.plane.cancel(again)


@pytest.mark.promise("P9")
async def test_what_a_person_answers_is_checked(rig, native):
    await rig.serve(asks(native=native))
    task_id = await rig.submit(user_msg="go")
    await rig.wait_status(task_id, "waiting")
    with pytest.raises(BadInput, match="by"):
        await rig.plane.send_event(task_id, '{"type": "Approval", "value": {"response": "yes"}}')
    with pytest.raises(BadInput, match="does not know"):
        await rig.plane.send_event(task_id, '{"type": "ChatMessage", "value": {}}')
    await rig.plane.send_event(task_id, APPROVAL)
    assert (await rig.result(task_id)).result_text == "thank you"


class Order(BaseModel):
    llamas: int


async def order(ctx: Context, llamas: int) -> str:
    """Keeps a model of its own."""
    orders = await ctx.store.get("orders", default=[])
    await ctx.store.set("orders", [*orders, Order(llamas=llamas)])
    state = await ctx.store.get("state")
    return f"{[each.llamas for each in [state['first'], *orders]]} then {llamas}"


class First(BaseModel):
    llamas: int = 0


@pytest.mark.promise("P4")
async def test_models_of_the_state_and_of_tools_are_known(rig, native):
    turns = in_turn([call("order", llamas=1)], "ok", [call("order", llamas=2)], "ok")
    await rig.serve(function_agent(turns, order, native=native, initial_state={"first": First()}))
    await rig.plane.sessions.create("s")
    for expected in ("[0] then 1", "[0, 1] then 2"):
        record = await rig.run(session="s", user_msg="order")
        assert (record.status, record.context_saved) == ("completed", True)
        (outcome,) = (each for each in await rig.events(record.task_id) if each.type == "ToolCallResult")
        assert json.loads(outcome.payload)["tool_output"]["raw_output"] == expected


class Thing:
    def __str__(self) -> str:
        return "a thing"


async def fetch() -> Thing:
    """Return what JSON does not know."""
    return Thing()


async def test_a_tool_whose_output_is_not_json(rig, native):
    await rig.serve(function_agent(then([call("fetch")], "a thing", "done"), fetch, native=native))
    record = await rig.run(user_msg="go")
    assert (record.status, record.result_text) == ("completed", "done")
    (outcome,) = (each for each in await rig.events(record.task_id) if each.type == "ToolCallResult")
    payload = json.loads(outcome.payload)
    assert "ToolCallResult cannot be encoded as JSON" in payload["error"]
    assert payload["tool_output"]["blocks"] == [{"block_type": "text", "text": "a thing"}]


async def spoil(ctx: Context) -> str:
    """Remember what JSON does not know."""
    memory = await ctx.store.get("memory")
    memory.put(ChatMessage(role="user", content="spoiled", additional_kwargs={"thing": Thing()}))
    return "spoilt"


@UNSERIALIZABLE
@pytest.mark.promise("P4")
async def test_a_conversation_that_is_not_json_is_not_forgotten_in_silence(rig, native):
    turns = in_turn("one", [call("spoil")], "two", "three")
    agent = function_agent(turns, spoil, native=native)
    await rig.serve(agent)
    await rig.plane.sessions.create("s")
    saved = [await rig.run(session="s", user_msg=str(n)) for n in range(3)]
    assert [(record.status, record.context_saved) for record in saved] == [
        ("completed", True),
        ("completed", False),
        ("completed", True),
    ]
    assert "Thing" in saved[1].context_error
    assert heard(agent)[-1] == ["user: 0", "assistant: one", "user: 2"]  # the last good context stands


class Remembers(Workflow):
    """Has a memory that is kept in a database, as an agent would."""

    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.store.set("memory", ev.get("memory"))
        await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent())
        return StopEvent()


@UNSERIALIZABLE
async def test_a_memory_that_is_kept_elsewhere(flavour, nothing_left, caplog):
    codec = WorkflowCodec(Remembers())
    async with open_run(Remembers(), memory=Memory.from_defaults(), flavour=flavour) as run:
        async for _ in run.events():
            break
        run.send_event(HumanResponseEvent(response="go on"))
        with pytest.raises(KeptElsewhere, match="a Memory does not write its sql_store"):
            codec.encode_context(run.context)  # whoever resumed it would miss it
        await run.result()
    context = codec.decode_context(codec.encode_context(run.context))
    assert "without its memory" in caplog.text
    assert context.to_dict()["state"]["state_data"] == {"_data": {}}


@pytest.mark.promise("P11")
def test_the_allow_list_of_agents():
    for make in (asks, reacts_asking, team_asks):
        codec = WorkflowCodec(make())
        names = {each["name"] for each in json.loads(codec.event_types())}
        assert {"Approval", "ApprovalRequired", "ToolCall", "ToolCallResult", "AgentStream"} <= names
        assert not {"AgentWorkflowStartEvent", "StopEvent", "FunctionAgent", "ChatMessage"} & names
        resolved = codec.serializer.resolve_class("llama_index.core.memory.chat_memory_buffer.ChatMemoryBuffer")
        assert resolved.__name__ == "ChatMemoryBuffer"
        for stranger in ("FunctionAgent", "AgentWorkflow", "ReActAgent"):
            with pytest.raises(ValueError, match="is refused"):
                codec.serializer.resolve_class(f"llama_index.core.agent.workflow.{stranger}")
    with pytest.raises(BadInput):
        WorkflowCodec(adds()).decode_event(APPROVAL)
    event = JsonSerializer().serialize(WorkflowCodec(asks()).decode_event(APPROVAL))
    assert WorkflowCodec(team_asks()).canonical_event(event) == event


@pytest.mark.promise("P9")
def test_start_arguments_of_an_agent():
    codec = WorkflowCodec(adds())
    start = codec.start_event({"user_msg": "hello", "chat_history": [{"role": "user", "content": "before"}]})
    assert [message.content for message in start.chat_history] == ["before"]
    with pytest.raises(BadInput, match="role"):
        codec.start_event({"user_msg": "hello", "chat_history": [{"role": "nobody"}]})
