"""Cancelled at any moment, a caller leaves no remote run that goes on, and nothing of its own."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from llama_corral.client import Client
from llama_corral.remote import RemoteWorkflow
from llama_corral.runtime import run_workflow

from ..moments import living_tasks, strike
from .flows import Calls, Progress
from .waiting import far_tasks, wait_far_status

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P6")]

MOMENTS = (*range(1, 13), *range(13, 40, 2))
"""Later than that, all of it waits."""


@pytest.mark.parametrize("service", ["works", "approval"])
async def test_at_any_moment(url: str, client: Client, flavour: Any, service: str) -> None:
    remote = RemoteWorkflow(service, url, events=[Progress])
    for at in MOMENTS:
        before, tasks = await far_tasks(client, service), living_tasks()
        with anyio.fail_after(8), anyio.CancelScope() as scope, strike(at, scope.cancel) as moments:
            await run_workflow(Calls(remote), flavour=flavour)
        assert moments.struck
        assert living_tasks() <= tasks
        for task_id in await far_tasks(client, service) - before:
            assert await wait_far_status(client, task_id, "cancelled") == "cancelled"
