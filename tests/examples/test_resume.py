"""A run that waits for a person survives as JSON: what a service does when it hands a run to another process."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from workflows import Context, Workflow
from workflows.events import HumanResponseEvent, InputRequiredEvent

from llama_corral.examples.digest import digest
from llama_corral.examples.form import form
from llama_corral.examples.workloads import workload
from llama_corral.runtime import open_run

from .conftest import Engine, RunExample

pytestmark = pytest.mark.anyio

CASES = [
    pytest.param(form, {"item": "alpaca"}, ["Ada", "2", "yes"], id="form"),
    pytest.param(workload, {"waits": 3, "events": 2, "cpu_ms": 0}, ["", "", ""], id="workload"),
    pytest.param(digest, {"approve": True, "sentences": 4}, ["shorter", "maybe", "yes"], id="digest"),
]


@pytest.mark.parametrize(("workflow", "start", "answers"), CASES)
async def test_a_run_resumed_at_every_question_ends_as_if_it_had_never_stopped(
    run_example: RunExample, engine: Engine, workflow: Workflow, start: dict[str, Any], answers: list[str]
):
    flavour = engine.flavour or "asyncio"
    snapshot = None
    with anyio.fail_after(20):
        for answer in [None, *answers]:
            context = None if snapshot is None else Context.from_dict(workflow, json.loads(snapshot))
            kwargs = start if context is None else {}
            async with open_run(workflow, context=context, flavour=flavour, **kwargs) as run:
                if answer is not None:
                    run.send_event(HumanResponseEvent(response=answer))
                async for event in run.events():
                    if isinstance(event, InputRequiredEvent):
                        snapshot = json.dumps(run.context.to_dict())
                        break
                else:
                    resumed = await run.result()
    straight = (await run_example(workflow, answers=answers, **start)).result
    assert resumed == straight
