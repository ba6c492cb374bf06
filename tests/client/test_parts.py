"""The pure parts: frames, errors, what is sent, and finishing under cancellation."""

from __future__ import annotations

import json

import anyio
import pytest
from workflows.context import JsonSerializer
from workflows.events import HumanResponseEvent

from llama_corral import exceptions
from llama_corral.client import sse
from llama_corral.client.http import delay_of
from llama_corral.client.outgoing import event_text, start_arguments
from llama_corral.client.shielding import finish
from llama_corral.client.sse import Frame, SseParser
from llama_corral.client.tasks import outcome
from llama_corral.exceptions import BadInput, TaskFailed, TooLarge, Unavailable
from llama_corral.http_answers import from_answer
from llama_corral.http_urls import check_url, path_of
from llama_corral.protocol.messages import ErrorRecord, TaskResult

STREAM = (
    b': heartbeat\n\nid: 0\nevent: a.Tick\ndata: {"text": "\xc3\xa4\\n"}\n\n'
    b"id:1\r\nevent:x\r\ndata: 1\r\ndata: 2\r\n\r\nevent: end\ndata: {}\n\nid: 9\ndata: cut off"
)
FRAMES = [Frame("a.Tick", '{"text": "ä\\n"}', "0"), Frame("x", "1\n2", "1"), Frame("end", "{}")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_come_in_pieces_of_any_size(size: int) -> None:
    parser = SseParser()
    frames = []
    for start in range(0, len(STREAM), size):
        frames += parser.feed(STREAM[start : start + size])
    assert frames == FRAMES


def test_a_frame_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_FRAME", 1000)
    parser = SseParser()
    for _ in range(20):
        parser.feed(b"data: small\n\n" * 20)
    for endless in (b"data: " + b"x" * 94 + b"\n", b"x" * 100):
        with pytest.raises(TooLarge):
            [parser.feed(endless) for _ in range(20)]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "not_found", exceptions.NotFound),
        (409, "conflict", exceptions.Conflict),
        (422, "bad_input", exceptions.BadInput),
        (400, "malformed", exceptions.UsageError),
        (415, "unsupported_media_type", exceptions.BadInput),
        (401, "unauthorized", exceptions.Unauthorized),
        (413, "too_large", exceptions.TooLarge),
        (429, "too_many_tasks", exceptions.TooManyTasks),
        (503, "draining", exceptions.Draining),
        (503, "store_unavailable", exceptions.StoreUnavailable),
        (405, "method_not_allowed", exceptions.UsageError),
        (500, "internal", exceptions.CorralError),
        (424, "task_failed", exceptions.TaskFailed),
    ],
)
def test_an_answer_becomes_its_family(status: int, code: str, kind: type[Exception]) -> None:
    body = json.dumps({"error": {"code": code, "message": "no", "hint": "do"}, "detail": "no"}).encode()
    error = from_answer(status, body, {"x-request-id": "r1", "retry-after": "3"}, "http://host")
    assert type(error) is kind
    assert (error.message, error.hint) == ("no", "do")
    assert (error.fields["status"], error.fields["request_id"], error.fields["retry_after"]) == (status, "r1", 3.0)
    assert error.fields["sent"] is not isinstance(error, Unavailable)


@pytest.mark.parametrize("status", [302, 404, 500, 502, 503, 599])
def test_an_answer_that_is_not_ours(status: int) -> None:
    error = from_answer(status, b"<html>", {}, "http://host")
    assert f"http://host answered {status}" in error.message
    assert error.fields["sent"]
    assert isinstance(error, Unavailable) is (status in (502, 503))


def test_urls_and_paths() -> None:
    assert check_url("http://[::1]:80/base/") == "http://[::1]:80/base"
    assert path_of("sessions", "a/b ?&ä") == "/sessions/a%2Fb%20%3F%26%C3%A4"


def test_delays_grow_and_listen_to_the_server() -> None:
    assert [delay_of(failures) for failures in (1, 2, 3, 50)] == [0.05, 0.1, 0.2, 5.0]
    assert delay_of(1, Unavailable("x", retry_after=2.0)) == 2.0


def test_events_as_text() -> None:
    event = HumanResponseEvent(response="yes")
    assert json.loads(event_text(event)) == json.loads(JsonSerializer().serialize(event))
    assert json.loads(event_text("a.B", {"c": 1}))["qualified_name"] == "a.B"
    for wrong in (HumanResponseEvent, 3, None):
        with pytest.raises(BadInput):
            event_text(wrong)
    with pytest.raises(BadInput):
        event_text(HumanResponseEvent(response="a"), {"b": 1})
    with pytest.raises(BadInput):
        event_text("a.B", {"c": object()})


def test_start_arguments() -> None:
    assert start_arguments({"timeout": 1}, {"event": HumanResponseEvent(response="a")})["timeout"] == 1
    for wrong in (float("nan"), object()):
        with pytest.raises(BadInput, match="start argument x"):
            start_arguments(None, {"x": wrong})


def test_outcomes() -> None:
    assert outcome(TaskResult(task_id="t", result="1", value=1)) == 1
    assert outcome(TaskResult(task_id="t", result="None")) is None
    assert outcome(TaskResult(task_id="t", result="text of the original")) == "text of the original"
    error = ErrorRecord(type="ValueError", message="no", step="work")
    with pytest.raises(TaskFailed, match="the task t failed in step work: ValueError: no"):
        outcome(TaskResult(task_id="t", result="no", status="failed", error=error))


@pytest.mark.anyio
async def test_finish(anyio_backend: str) -> None:
    async def work() -> int:
        return 1

    async def fail() -> int:
        raise ValueError("plain, not in a group")

    assert await finish(work, 1) == 1
    with pytest.raises(ValueError, match="plain"):
        await finish(fail, 1)


@pytest.mark.anyio
@pytest.mark.promise("P6")
@pytest.mark.parametrize("in_time", [True, False])
async def test_finish_when_cancelled(anyio_backend: str, in_time: bool) -> None:
    done = []

    async def work() -> None:
        scope.cancel()
        await (anyio.lowlevel.checkpoint() if in_time else anyio.sleep_forever())
        done.append(True)

    with anyio.CancelScope() as scope:
        await finish(work, 10 if in_time else 0)
        done.append(False)
    assert done == [True] * in_time
    assert scope.cancelled_caught
