"""Runs in an environment with llama-deploy 0.6.1: its own client, unchanged, against the URL in argv[1]."""

from __future__ import annotations

import asyncio
import json
import sys

import httpx
from llama_deploy import Client
from llama_index.core.workflow import HumanResponseEvent


async def main(url: str) -> dict[str, object]:
    client = Client(control_plane_url=url, timeout=30.0, poll_interval=0.02)
    seen: dict[str, object] = {}
    seen["services"] = sorted(service.id for service in await client.core.services.list())

    session = await client.core.sessions.create()
    seen["listed"] = session.id in [known.id for known in await client.core.sessions.list()]
    seen["got"] = (await client.core.sessions.get(session.id)).id == session.id
    try:
        await client.core.sessions.get("no-such-session")
    except httpx.HTTPStatusError as exc:
        seen["unknown_session"] = exc.response.status_code
    seen["run"] = await session.run("echo", arg1="hello")
    seen["tasks"] = [task.agent_id for task in await session.get_tasks()]

    task_id = await session.run_nowait("streaming", arg1="events")
    seen["stream"] = [event async for event in session.get_task_result_stream(task_id)]
    result = await session.get_task_result(task_id)
    seen["stream_result"] = result.result if result else None

    seen["human"] = []
    for service in ("human", "waiting"):
        task_id = await session.run_nowait(service)
        await session.send_event(service_name=service, task_id=task_id, ev=HumanResponseEvent(response="42"))
        while (result := await session.get_task_result(task_id)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # noqa: TID251 - the original has nothing but polling
        seen["human"].append(result.result)

    counting = await client.core.sessions.create()
    other = await client.core.sessions.create()
    seen["counts"] = [await counting.run("counting"), await counting.run("counting"), await other.run("counting")]
    seen["failure"] = await session.run("failing")
    seen["fifty"] = len(set(await asyncio.gather(*(session.run("echo", arg1=str(n)) for n in range(50)))))

    await client.core.sessions.delete(session.id)
    try:
        await client.core.sessions.get(session.id)
    except httpx.HTTPStatusError as exc:
        seen["deleted"] = exc.response.status_code
    return seen


print(json.dumps(asyncio.run(main(sys.argv[1]))))
