"""What `st run` cannot know: ids that exist, and which requests wait by design. Loaded by test_openapi.py."""

from __future__ import annotations

import json
import os
from typing import Any

import requests
import schemathesis

URL = os.environ["CORRAL_FUZZ_URL"]
KNOWN: dict[str, list[str]] = json.loads(os.environ["CORRAL_FUZZ_IDS"])
SHORT = 0.5
_turn = 0


@schemathesis.deserializer("application/x-ndjson")
def ndjson(ctx: Any, response: Any) -> list[Any]:
    return [json.loads(line) for line in response.content.splitlines()]


@schemathesis.deserializer("text/event-stream")
def sse(ctx: Any, response: Any) -> list[str]:
    frames = response.content.decode().split("\n\n")
    assert frames.pop() == "", "the last frame is cut"
    assert any(frame.startswith("event: end\n") for frame in frames), "there is no end"
    return frames


@schemathesis.hook
def before_call(ctx: Any, case: Any, **kwargs: Any) -> None:
    """Half of the time, what exists; and never wait for longer than this test has."""
    global _turn
    _turn += 1
    for name, ids in KNOWN.items():
        if name in case.path_parameters and _turn % 2:
            case.path_parameters[name] = ids[_turn // 2 % len(ids)]
    if case.path == "/services/deregister" and case.query.get("service_name") in KNOWN.get("service_name", ()):
        case.query["service_name"] = "elsewhere"  # who deregisters what still runs has to wait for its next heartbeat
    if case.path.endswith("/run") and case.path_parameters.get("service_name") != "echo":
        case.query.setdefault("timeout", SHORT)  # a run that waits for a person waits for as long as it takes
    for part in (case.query, case.body):
        if isinstance(part, dict) and _number(part.get("wait")) > SHORT:
            part["wait"] = SHORT
    if case.path.endswith(("/events", "/result_stream")) and isinstance(case.path_parameters.get("task_id"), str):
        # A stream lasts as long as its task.
        task = requests.utils.quote(case.path_parameters["task_id"], safe="")
        requests.post(f"{URL}/tasks/{task}/cancel", timeout=10)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0


@schemathesis.hook
def filter_failure(ctx: Any, failure: Any, case: Any, response: Any) -> bool:
    """A run that was given no time has not been answered in time."""
    return not (response.status_code == 504 and "timeout" in case.query)
