"""Agents behind `corral serve`: streaming, tools, a person, a session, a restart in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import TIME, Corral

Serve = Callable[..., Corral]
pytestmark = pytest.mark.process
APPROVAL = {"type": "Approval", "value": {"response": "yes", "by": "ada"}}


def events(corral: Corral, task: str) -> list[Any]:
    """The whole log as the original's clients read it: one event's fields a line."""
    with corral.http.stream("GET", f"/tasks/{task}/events", headers={"Accept": "text/event-stream"}) as stream:
        return [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]


@pytest.mark.promise("P3", "P4", "P7")
@pytest.mark.parametrize("flavour", ["asyncio", "anyio"])
def test_served_agents(serve: Serve, flavour: str) -> None:
    names = ("adding", "asking", "team", "talking", *(("threads",) if flavour == "asyncio" else ()))
    corral = serve("--step-flavour", flavour, module="agents.py", names=names)

    for name in ("adding", *names[4:]):
        answer = corral.run(name, {"user_msg": "add"}).raise_for_status().json()
        assert answer["result"]["response"]["blocks"] == [{"block_type": "text", "text": "it is 3"}]
        assert corral.result(answer["task_id"])["result"] == "it is 3"  # the original's text
        log = events(corral, answer["task_id"])
        assert [each["delta"] for each in log if "delta" in each] == ["", "it ", "is ", "3"]
        assert [each["tool_output"]["raw_output"] for each in log if "tool_output" in each] == [3]

    session = corral.http.post("/sessions/create").json()
    first = corral.result(corral.add(session, "talking", {"user_msg": "hello"}))
    second = corral.result(corral.add(session, "talking", {"user_msg": "and now?"}))
    assert first["result"] == "1 messages, the first was hello"
    assert second["result"] == "3 messages, the first was hello"

    waiting = {name: corral.begin(name, {"user_msg": "go"}) for name in ("asking", "team")}
    for name, question in (("asking", 4), ("team", 9)):
        corral.wait_event(waiting[name], question)
    assert corral.answer(waiting["asking"], {"type": "Approval", "value": {"response": "yes"}}).status_code == 422
    assert corral.stop() == 0
    corral.start()
    for task in waiting.values():
        assert corral.answer(task, APPROVAL).status_code == 200
        assert corral.result(task)["result"] == "thank you"
        indices, ending = corral.read(task)
        assert (indices, ending) == (list(range(len(indices))), "end")
    third = corral.result(corral.add(session, "talking", {"user_msg": "still there?"}))
    assert third["result"] == "5 messages, the first was hello"
    assert corral.stop() == 0
    assert "Traceback" not in corral.log


@pytest.mark.parametrize(("name", "why"), [("threads", "sync tool 'add_in_thread'"), ("plain", "a ChatMemoryBuffer")])
def test_what_cannot_be_served_natively_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    target = f"{Path(__file__).with_name('agents.py')}:{name}"
    store = f"sqlite:///{tmp_path / 'corral.db'}"
    command = ["serve", target, "--port", "0", "--store", store, "--step-flavour", "anyio"]
    ended = subprocess.run(
        [sys.executable, "-m", "llama_corral.cli", *command], capture_output=True, text=True, timeout=TIME
    )
    assert ended.returncode == 78
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("corral: agent 'Agent' cannot run in the 'anyio' flavour on trio")
    assert why in line
    assert "--step-flavour asyncio" in line
