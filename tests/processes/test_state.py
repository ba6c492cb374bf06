"""What a restart finds in the store: a run of yesterday's code, and state that somebody has touched."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from llama_corral.client import Client
from llama_corral.exceptions import TaskFailed
from llama_corral.testing import open_stack

from .support import answer, check_endings, flows_stack, read_marks, wait_type

pytestmark = [pytest.mark.process, pytest.mark.trio]

APP = """
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

class Ready(Event):
    pass

class Flow(Workflow):
    @step
    async def begin(self, ctx: Context, ev: StartEvent) -> Ready:
        return Ready()

    @step
    async def ask(self, ctx: Context, ev: Ready) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=None)
        return StopEvent(result="RESULT" + answer.response)

flow = Flow(timeout=None)
"""
NEW_RESULT = APP.replace("RESULT", "new: ")
RENAMED = NEW_RESULT.replace("async def ask", "async def ask_for_it")


@pytest.mark.promise("P1", "P4")
@pytest.mark.parametrize(
    ("policy", "code", "ends"),
    [
        ("resume", NEW_RESULT, "new: yes"),
        ("restart", RENAMED, "new: yes"),
        ("resume", RENAMED, None),
        ("fail", RENAMED, None),
    ],
)
async def test_the_code_has_changed(tmp_path: Path, policy: str, code: str, ends: str | None) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP)
    async with open_stack([f"{app}:flow"], folder=tmp_path, options=("--on-change", policy)) as stack:
        async with Client(stack.url) as client:
            task = await client.start("flow")
            await wait_type(task, "InputRequiredEvent")
            stack.main.kill()
            await stack.main.wait_exit()
            app.write_text(code)
            await stack.main.restart()
            if ends is not None:
                await answer(task)
                assert await task.result() == ends
                return
            with pytest.raises(TaskFailed) as caught:
                await task.result()
            assert caught.value.fields["error"].type == "workflow_changed"
            again = await task.retry(fresh=True)
            await answer(again)
            assert await again.result() == "new: yes"


@pytest.mark.promise("P11")
async def test_a_checkpoint_that_somebody_touched_is_refused(tmp_path: Path) -> None:
    async with flows_stack(tmp_path, "person") as stack, Client(stack.url) as client:
        touched, left = [await client.start("person", name=name) for name in ("touched", "left")]
        for task in (touched, left):
            await wait_type(task, "InputRequiredEvent")
        stack.main.terminate()
        assert await stack.main.wait_exit() == 0
        with sqlite3.connect(stack.store_path) as store:
            changed = store.execute("UPDATE corral_checkpoints SET snapshot = replace(snapshot, 'touched', 'hacked')")
            assert changed.rowcount == 2
        store.close()
        await stack.main.restart()
        with pytest.raises(TaskFailed, match="seal does not fit") as caught:
            await touched.result()
        assert caught.value.fields["error"].type == "state_refused"
        await answer(left)
        await check_endings([left])
        assert "hacked" not in {mark.name for mark in read_marks(tmp_path)}
