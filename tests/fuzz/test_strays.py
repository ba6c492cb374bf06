"""Messages about tasks that are none of their sender's business, at the control plane itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from llama_corral.exceptions import BadInput, Conflict, CorralError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ActionTypes, QueueMessage, ServiceDefinition

from ..control_plane.corral import Corral, open_corral

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P9")]


@pytest.fixture
async def corral(anyio_backend: str) -> AsyncIterator[Corral]:
    async with open_corral() as opened:
        yield opened


def message(action: ActionTypes, **data) -> QueueMessage:
    return QueueMessage(action=action, data=data)


@pytest.mark.parametrize("action", [ActionTypes.TASK_STREAM, ActionTypes.COMPLETED_TASK])
async def test_a_message_takes_no_task_from_the_line_of_a_service_that_claims(corral: Corral, action: ActionTypes):
    service = await corral.service()
    accepted = await corral.plane.submit("svc", {})
    assert accepted.status is TaskStatus.QUEUED
    stray = message(action, task_id=accepted.task_id, data={}, index=0, result="")
    with pytest.raises(Conflict):
        await corral.plane.process_message(stray)
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    await service.complete(claim)
    assert (await corral.plane.get_task(accepted.task_id)).status is TaskStatus.COMPLETED


@pytest.mark.parametrize("index", [2**53 - 2, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 10**30])
async def test_an_index_beyond_all_bounds_does_not_keep_a_task_from_ending(corral: Corral, index: int):
    await corral.plane.services.define(ServiceDefinition(service_name="far"))
    await corral.plane.submit("far", {}, task_id="t")
    try:
        await corral.plane.process_message(message(ActionTypes.TASK_STREAM, task_id="t", index=index, data={}))
    except BadInput:
        assert index >= 2**53 - 1
    await corral.plane.process_message(message(ActionTypes.COMPLETED_TASK, task_id="t", result="done"))
    assert (await corral.plane.get_task("t")).status is TaskStatus.COMPLETED


async def test_a_task_without_a_session_that_is_sent_twice_is_one_task(corral: Corral):
    service = await corral.service(slots=2)
    sent = message(ActionTypes.NEW_TASK, task_id="mine", agent_id="svc", input="{}")
    await corral.plane.process_message(sent)
    claim = await service.wait_claim()
    await corral.plane.process_message(sent)
    assert service.claims == []
    sessions = await corral.plane.sessions.list()
    assert [session.session_id for session in sessions] == [claim.session_id]


@pytest.mark.parametrize("spoil", [{"agent_id": "nobody"}, {"input": "["}, {"input": '{"bad": 1}'}, {"task_id": "a/b"}])
async def test_a_refused_task_leaves_no_session(corral: Corral, spoil: dict[str, str]):
    await corral.service(slots=1)
    sent = {"task_id": "mine", "agent_id": "svc", "input": json.dumps({})} | spoil
    with pytest.raises(CorralError):
        await corral.plane.process_message(message(ActionTypes.NEW_TASK, **sent))
    assert await corral.plane.sessions.list() == []
